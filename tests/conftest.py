"""Settings and fixtures for every test."""

from __future__ import annotations

import os

# Two spinning OpenMP threads on a busy two-core machine cost a factor of ten; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from tests.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint directory (see tests/tiny.py); read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
