"""A build on texts of its own: a padded set from Parquet calibrates, a CSV file measures."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.progress import SilentProgress
from pipeline.quant.data import TextFile, load_documents
from pipeline.stages import STAGES
from pipeline.stages.stage import StageContext
from pipeline.stages.texts import load_heldout
from tests.build_config import write_build
from tests.tiny_text import made_up_texts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _write_texts(directory: Path) -> None:
    calibration = [*made_up_texts(30, num_words=12), None, "see https://x.org/y ok"]
    pq.write_table(pa.table({"body": calibration}), directory / "train.parquet")
    with (directory / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "body"])
        writer.writerows(enumerate(made_up_texts(30, seed=5)))


def _build(tmp_path: Path) -> Path:
    _write_texts(tmp_path)
    calibration = {
        "data": "train.parquet",
        "column": "body",
        "num_samples": 6,
        "seq_len": 48,
        "batch_size": 4,
        "layout": "padded",
        "strategy": "diverse",
        "clean": {"drop_null": True, "remove_urls": True},
    }
    return write_build(
        tmp_path,
        backend="none",
        quantize={"format": "int4_awq", "group_size": 64, "calibration": calibration},
        verify={"data": "test.csv", "column": "body", "num_windows": 3, "seq_len": 32, "gates": {}},
    )


WARNING = "6 samples are few: 128 to 1000 are usual"


def test_the_stage_calibrates_on_what_data_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _build(tmp_path)
    assert main(["data", str(config), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["calibration"]
    out_dir, work_dir = tmp_path / "out", tmp_path / "work"
    out_dir.mkdir()
    work_dir.mkdir()
    facts = STAGES["quantize"].run(
        StageContext(
            loaded=load_config(config),
            inputs={"source": tmp_path / "weights"},
            out_dir=out_dir,
            log_path=out_dir / "log",
            progress=SilentProgress(),
            work_dir=work_dir,
        )
    )
    report = json.loads((out_dir / "quant_report.json").read_text())["calibration"]
    assert report["tokens_sha256"] == shown["tokens_sha256"]
    assert report["documents"]["null"] == 1
    assert report["documents"]["urls_removed"] == 1
    assert report["num_tokens"] < 6 * 48
    assert report["padding"] == "right"
    assert report["warnings"] == shown["warnings"] == facts["calibration_warnings"]
    assert report["warnings"][0] == WARNING


@pytest.mark.slow  # processes of their own for every stage
def test_warnings_are_said_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _build(tmp_path)
    assert main(["run", str(config)]) == 0
    assert f"warning: {WARNING}" in capsys.readouterr().err
    assert main(["show", str(config)]) == 0
    assert f"quantize.calibration_warnings: {WARNING}\n" in capsys.readouterr().out
    assert main(["show", str(config), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]["quantize"]
    assert facts["calibration_warnings"][0] == WARNING


def test_held_out_text_is_read_from_its_column(tmp_path: Path) -> None:
    _write_texts(tmp_path)
    config = write_build(tmp_path, verify={"data": "test.csv", "column": "body"})
    texts = [document.text for document in load_heldout(load_config(config))]
    assert texts == made_up_texts(30, seed=5)


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps({"text": "word " * 200}) + "\n"
    path.write_text(line * 20_000)  # 20 MB
    tracemalloc.start()
    try:
        assert load_documents(TextFile(path), max_chars=100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # 0.3 MB
