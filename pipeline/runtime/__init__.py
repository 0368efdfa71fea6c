"""Generating text with an engine: requests, sampling, text assembly, KV slots."""
