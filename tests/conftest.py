"""Settings and fixtures for every test."""

from __future__ import annotations

import os
import signal

# Two spinning OpenMP threads on a busy two-core machine cost a factor of ten; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import hypothesis
import pytest

from tests.tiny import write_tiny_llama

# A shell that starts the tests in the background has Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline is a timed test: it fails on a busy machine and finds no bug.
hypothesis.settings.register_profile("trtpipe", deadline=None)
hypothesis.settings.load_profile("trtpipe")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint directory (see tests/tiny.py); read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


# Tests that may be skipped in the pinned environment, as "file.py::test: reason". A skip that is not
# listed here fails `make test`: a test that nobody runs proves nothing.
EXPECTED_SKIPS: frozenset[str] = frozenset()

_skipped: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail on a skip that is not listed"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.add(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    unlisted = sorted(_skipped - EXPECTED_SKIPS)
    if unlisted and session.config.getoption("--strict-skips"):
        print("\nskipped, but not listed in tests/conftest.py:", *unlisted, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
