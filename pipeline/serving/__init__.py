"""Serving an engine: Triton model repositories, the server process, and a client."""
