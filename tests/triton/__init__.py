"""Tests with the real tritonserver, and the tiny engine and tokenizers that they serve."""
