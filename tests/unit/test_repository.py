"""Emitted model repositories: complete, self-contained, checked before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import GateError, PlanError
from pipeline.serving import repository
from pipeline.serving.model_config import parse_pbtxt
from pipeline.serving.repository import RepositoryOptions, emit_repository, text_model_config

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

OPTIONS = RepositoryOptions(model_name="demo")


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    """The files of an engine; the emitter looks into config.json only."""
    engine = tmp_path / "engine"
    (engine / "tokenizer").mkdir(parents=True)
    config = {
        "version": "1",
        "pretrained_config": {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}},
        "build_config": {"max_batch_size": 4, "max_seq_len": 64, "max_input_len": 32},
    }
    (engine / "config.json").write_text(json.dumps(config))
    for name in ("rank0.onnx", "rank0.weights", "rank0.trt.onnx", "rank0.engine", "report.html"):
        (engine / name).write_text(f"content of {name}")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (engine / "tokenizer" / name).write_text(f"content of {name}")
    return engine


def test_the_tree(engine_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    emit_repository(engine_dir, out, OPTIONS)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [
        "demo/1/engine/config.json",
        "demo/1/engine/rank0.onnx",
        "demo/1/engine/rank0.weights",
        "demo/1/engine/tokenizer/generation_config.json",
        "demo/1/engine/tokenizer/tokenizer.json",
        "demo/1/engine/tokenizer/tokenizer_config.json",
        "demo/1/model.py",
        "demo/config.pbtxt",
    ]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    text = (out / "demo" / "config.pbtxt").read_text()
    assert parse_pbtxt(text, "emitted") == text_model_config(OPTIONS)
    compile((out / "demo" / "1" / "model.py").read_text(), "model.py", "exec")
    assert str(tmp_path) not in text + (out / "demo" / "1" / "model.py").read_text()


def test_weights_take_no_second_place_and_outlive_the_engine(
    engine_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repository"
    emit_repository(engine_dir, out, OPTIONS)
    linked = out / "demo" / "1" / "engine" / "rank0.weights"
    assert linked.samefile(engine_dir / "rank0.weights")
    shutil.rmtree(engine_dir)
    assert linked.read_text() == "content of rank0.weights"


def test_links_of_the_engine_are_followed(engine_dir: Path, tmp_path: Path) -> None:
    (engine_dir / "rank0.weights").rename(tmp_path / "stored")
    (engine_dir / "rank0.weights").symlink_to(tmp_path / "stored")
    emit_repository(engine_dir, tmp_path / "repository", OPTIONS)
    linked = tmp_path / "repository" / "demo" / "1" / "engine" / "rank0.weights"
    assert not linked.is_symlink()
    assert linked.read_text() == "content of rank0.weights"


def test_another_file_system_gets_copies(engine_dir: Path) -> None:
    """/dev/shm is one of its own on every Linux."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == engine_dir.stat().st_dev:
        pytest.skip("no second file system")
    out = shm / f"trtpipe-test-{os.getpid()}"
    try:
        emit_repository(engine_dir, out, OPTIONS)
        copied = out / "demo" / "1" / "engine" / "rank0.weights"
        assert copied.read_text() == "content of rank0.weights"
        assert copied.stat().st_nlink == 1
    finally:
        shutil.rmtree(out)


def test_missing_parts_are_all_listed_and_nothing_is_written(
    engine_dir: Path, tmp_path: Path
) -> None:
    (engine_dir / "rank0.onnx").unlink()
    (engine_dir / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(GateError) as caught:
        emit_repository(engine_dir, tmp_path / "repository", OPTIONS)
    assert str(caught.value).splitlines() == [
        f"{engine_dir}/rank0.onnx: there is no such file; fix: build the engine again",
        f"{engine_dir}/tokenizer/tokenizer.json: there is no such file; fix: build the engine again",
    ]
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pretrained_config": {"mapping": {}}}'])
def test_a_config_that_is_none(content: str, engine_dir: Path, tmp_path: Path) -> None:
    (engine_dir / "config.json").write_text(content)
    with pytest.raises(GateError, match=r"config\.json: not an engine config: .*; fix: build"):
        emit_repository(engine_dir, tmp_path / "repository", OPTIONS)


def test_several_ranks(engine_dir: Path, tmp_path: Path) -> None:
    config = json.loads((engine_dir / "config.json").read_text())
    config["pretrained_config"]["mapping"]["world_size"] = 4
    (engine_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as caught:
        emit_repository(engine_dir, tmp_path / "repository", OPTIONS)
    assert str(caught.value) == (
        f"{engine_dir}/config.json: the engine has 4 ranks; allowed: 1 rank: the CPU runtime has no "
        "collective operations; fix: build it with tp 1 and pp 1"
    )


def test_wrong_options_are_all_listed(engine_dir: Path, tmp_path: Path) -> None:
    options = RepositoryOptions(model_name="../demo", num_slots=5, num_threads=0)
    with pytest.raises(PlanError) as caught:
        emit_repository(engine_dir, tmp_path / "repository", options)
    assert str(caught.value).splitlines() == [
        "model name: '../demo'; allowed: letters, digits, and . _ - inside",
        "num_slots: 5; allowed: 1 to the engine's max_batch_size = 4",
        "num_threads: 0; allowed: 1 or more",
    ]
    assert not (tmp_path / "repository").exists()


def test_a_newline_after_the_model_name_is_no_part_of_it(engine_dir: Path, tmp_path: Path) -> None:
    options = RepositoryOptions(model_name="demo\n")
    with pytest.raises(PlanError, match=r"model name: 'demo\\n'; allowed: letters, digits"):
        emit_repository(engine_dir, tmp_path / "repository", options)
    with pytest.raises(ValueError, match=r"model name 'demo\\n'"):
        text_model_config(options)


def test_a_config_that_does_not_read_back_is_refused(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is alive: let the writer lose a line."""
    write = repository.to_pbtxt
    monkeypatch.setattr(
        repository, "to_pbtxt", lambda config: write(config).replace("  optional: true\n", "", 1)
    )
    with pytest.raises(GateError, match=r"demo/config\.pbtxt: reads back as "):
        emit_repository(engine_dir, tmp_path / "repository", OPTIONS)
