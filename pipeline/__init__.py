"""One YAML file -> quantized, sharded, built, verified and served LLM engines."""

__version__ = "0.1.0"
