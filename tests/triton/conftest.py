"""One real tritonserver for the whole session, on a tiny random engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.network import BuildLimits
from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.session import Session
from pipeline.serving.ports import free_ports
from pipeline.serving.repository import RepositoryOptions, emit_repository
from pipeline.serving.server import TritonServer
from tests.triton.tiny_engine import build_tiny_engine

MODEL = "ensemble"
NUM_SLOTS = 2
LIMITS = BuildLimits(max_batch_size=NUM_SLOTS, max_seq_len=16384, max_input_len=96)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this directory needs tritonserver."""
    here = Path(__file__).parent
    missing = importlib.util.find_spec("pytriton") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.triton)
            if missing:
                item.add_marker(pytest.mark.skip(reason="nvidia-pytriton is not installed"))


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine: 2 slots, 16384 positions, prompts of at most 96 tokens, never at an end."""
    return build_tiny_engine(tmp_path_factory.mktemp("engine"), LIMITS, eos_ids=())


@pytest.fixture(scope="session")
def repository(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model repository, moved after it was written, as a user may do."""
    written = tmp_path_factory.mktemp("written") / "repository"
    emit_repository(engine_dir, written, RepositoryOptions(model_name=MODEL))
    (written / "manifest.json").write_text("{}")  # the store leaves one at the top
    return written.rename(tmp_path_factory.mktemp("moved") / "elsewhere")


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    """The running server; it has answered once."""
    with TritonServer(repository, MODEL, ports=free_ports(), drain_s=5) as running:
        running.start()
        running.wait_until_answers(timeout_s=120)
        yield running


@pytest.fixture(scope="session")
def local(engine_dir: Path) -> Session:
    """The same engine in this process: what the server must answer."""
    return Session(engine_dir)


def local_text(session: Session, request: GenerationRequest) -> str:
    """The whole answer of an engine in this process."""
    return "".join(event.text for event in session.generate(request))
