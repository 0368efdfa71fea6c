"""verify for engines of several ranks: one process each under the real mpirun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import write_engine_config
from pipeline.errors import GateError, PipelineError, StageError
from pipeline.launch import RankJob, run_ranks
from pipeline.network import BuildLimits, export_network, weights_path
from pipeline.progress import SilentProgress
from pipeline.verification import Gates, Report, VerifyOptions, compare, write_report
from tests.tiny import write_tiny_llama
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

pytestmark = pytest.mark.mpi

TEXTS = made_up_texts(12, seed=7)
GATES = Gates(max_perplexity_ratio=1.01, max_mean_kl=1e-4, min_top1_agreement=0.99)
OPTIONS = VerifyOptions(num_windows=4, seq_len=48, gates=GATES)
LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
QUIET = SilentProgress()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that four ranks cannot share evenly."""
    directory = write_tiny_llama(tmp_path_factory.mktemp("source"), vocab_size=513)
    return write_tiny_tokenizer(directory)


def build(source: Path, root: Path, tp: int, pp: int) -> Path:
    converted, engine = root / "converted", root / "engine"
    converted.mkdir()
    engine.mkdir()
    convert_checkpoint(source, converted, tp=tp, pp=pp, progress=QUIET)
    for rank in range(tp * pp):
        export_network(converted, rank, engine, LIMITS, QUIET)
    write_engine_config(converted, engine, LIMITS)
    return engine


@pytest.fixture(scope="module")
def four_ranks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("four"), tp=2, pp=2)


def test_four_ranks_are_the_original_up_to_rounding(
    source: Path, four_ranks: Path, tmp_path: Path
) -> None:
    report = compare(source, four_ranks, TEXTS, OPTIONS, QUIET, tmp_path)
    assert not list(tmp_path.iterdir())
    assert report.passed
    assert report.executed == "4 ranks under mpirun"
    assert report.mapping.model_dump() == {"tp": 2, "pp": 2, "moe_ep": 1}
    assert report.data.num_tokens == 4 * 47
    assert 0 <= report.mean_kl < 1e-11  # observed: 9e-14
    assert report.top1_agreement == 1.0
    assert report.engine.vocab_size == report.original.vocab_size == 513
    weights = [report.engine_files[f"rank{rank}.weights"] for rank in range(4)]
    assert report.engine.weight_bytes == sum(weights)
    write_report(report, tmp_path)
    assert "4 ranks under mpirun (tp 2, pp 2)" in (tmp_path / "report.html").read_text()
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == report


@pytest.mark.slow
def test_a_rank_with_damaged_weights_is_named(
    source: Path, four_ranks: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(four_ranks, tmp_path / "engine"))
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    path = weights_path(engine, 2)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(GateError, match=r"rank 2: .*rank2\.onnx: ONNX Runtime cannot load it"):
        compare(source, engine, TEXTS, OPTIONS, QUIET, work_dir)
    assert not list(work_dir.iterdir())


def test_a_swapped_rank_is_named(source: Path, four_ranks: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(four_ranks, tmp_path / "engine"))
    shutil.copyfile(engine / "rank2.onnx", engine / "rank3.onnx")
    with pytest.raises(
        GateError, match=r"rank 3: .* is the network of .* rank 2; allowed: .* rank 3"
    ):
        compare(source, engine, TEXTS, OPTIONS, QUIET, tmp_path)


def test_a_killed_rank_ends_the_others(four_ranks: Path, tmp_path: Path) -> None:
    """Rank 1 dies when the others wait for it."""
    import numpy as np

    np.save(tmp_path / "tokens.npy", np.arange(96).reshape(2, 48))
    case = {"engine": str(four_ranks), "tokens": str(tmp_path / "tokens.npy"), "killed": 1}
    case |= {"tp": 2, "pp": 2, "moe_ep": 1, "call_len": 32, "out": str(tmp_path / "logits.npy")}
    with pytest.raises(StageError, match=r"(?s)rank 1\b.*signal"):
        run_ranks(_jobs(tmp_path, 4, case), "mpirun", tmp_path / "jobs.json")
    assert not (tmp_path / "logits.npy").exists()


def test_another_number_of_processes_is_refused(four_ranks: Path, tmp_path: Path) -> None:
    case = {"engine": str(four_ranks), "tp": 2, "pp": 2, "moe_ep": 1}
    with pytest.raises(PipelineError) as caught:
        run_ranks(_jobs(tmp_path, 2, case), "mpirun", tmp_path / "jobs.json")
    text = "started 2 processes; the engine has 4 ranks (tp 2, pp 2); allowed: -n 4"
    assert text in str(caught.value)


def _jobs(root: Path, num_ranks: int, case: dict[str, object]) -> list[RankJob]:
    return [
        RankJob(
            rank,
            "tests.mpi.sharded_worker",
            json.dumps([case]),
            log_path=str(root / f"rank{rank}.log"),
            error_path=str(root / f"rank{rank}.error.json"),
        )
        for rank in range(num_ranks)
    ]
