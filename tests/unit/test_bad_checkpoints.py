"""Bad input as a user meets it: what convert says, that nothing stays behind, and what is allowed."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.convert_processes import convert_in_processes
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import CheckpointError, ExitCode, PipelineError, StageError
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several files with an index."""
    directory = write_tiny_llama(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def refusal(source: Path, out_dir: Path, kind: type[PipelineError] = CheckpointError) -> str:
    out_dir.mkdir()
    with pytest.raises(kind) as caught:
        convert_checkpoint(source, out_dir, tp=1, pp=1, progress=SilentProgress())
    assert not list(out_dir.iterdir()), "something was left behind"
    return str(caught.value)


def first_shard(directory: Path) -> Path:
    return min(directory.glob("*.safetensors"))


def test_every_shard_that_is_wrong_is_named_at_once(sharded: Path, tmp_path: Path) -> None:
    one, two, *_ = sorted(sharded.glob("*.safetensors"))
    one.write_bytes(one.read_bytes()[:-1])
    two.write_bytes(b"")
    text = refusal(sharded, tmp_path / "out")
    size = one.stat().st_size
    assert (
        f"{one}: the tensors need {size + 1} bytes, the file has {size}: truncated; fix: copy"
        in (text)
    )
    assert f"{two}: 0 bytes: too short for a safetensors file" in text


def test_links_that_lead_nowhere_or_in_a_circle(sharded: Path, tmp_path: Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    shard.symlink_to(shard)
    text = refusal(sharded, tmp_path / "a")
    assert f"{shard.name}, which is a symbolic link that leads nowhere or in a circle" in text
    shard.unlink()
    shard.symlink_to(tmp_path / "blobs" / "gone")  # a Hub cache whose blob was removed
    assert "leads nowhere or in a circle" in refusal(sharded, tmp_path / "b")

    config = sharded / "config.json"
    config.unlink()
    config.symlink_to(config)
    assert f"{config}: cannot be read: Too many levels of symbolic links" in (
        refusal(sharded, tmp_path / "c")
    )


def test_a_single_file_that_links_to_itself(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "hf")
    weights = source / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)
    text = refusal(source, tmp_path / "out")
    assert f"{weights}: a symbolic link that leads nowhere or in a circle" in text


def test_a_directory_that_links_to_itself(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
        open_checkpoint(loop)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere(sharded: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "other"
    outside.mkdir()
    shutil.copy(first_shard(sharded), outside / "model.safetensors")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    text = refusal(sharded, tmp_path / "out")
    assert f"model.norm.weight is said to be in {name!r}; allowed: a .safetensors file name" in text


def with_nan(source: Path, directory: Path) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, :5] = np.nan
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -np.inf
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


class Said(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_not_finite_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Refused with number and names; kept, and still said, when the YAML allows them."""
    source = with_nan(tiny_llama, tmp_path / "hf")
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "a", tp=1, pp=1, progress=SilentProgress())
    fix = "repair the weights, or keep them so with convert.allow_not_finite: true"
    assert sorted(map(str, caught.value.problems)) == [
        f"model.layers.0.mlp.up_proj.weight: 5 values are NaN or Inf; fix: {fix}",
        f"model.layers.1.mlp.up_proj.weight: 1 values are NaN or Inf; fix: {fix}",
    ]
    assert not (tmp_path / "a" / "config.json").exists()  # so it is no checkpoint

    said = Said()
    options = ConvertOptions(allow_not_finite=True)
    (tmp_path / "b").mkdir()
    convert_checkpoint(source, tmp_path / "b", tp=1, pp=1, progress=said, options=options)
    rank = load_file(tmp_path / "b" / "rank0.safetensors")
    assert np.isnan(rank["transformer.layers.0.mlp.gate.weight"]).sum() == 5
    assert [line for line in said.lines if "up_proj" in line] == [
        "model.layers.0.mlp.up_proj.weight: 5 values are NaN or Inf; convert.allow_not_finite "
        "keeps them",
        "model.layers.1.mlp.up_proj.weight: 1 values are NaN or Inf; convert.allow_not_finite "
        "keeps them",
    ]


def test_a_full_disk(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, and the message says how much was needed."""
    needed = len(_rank_bytes(tiny_llama, tmp_path / "first"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    text = refusal(tiny_llama, tmp_path / "out", StageError)
    assert f"needs {needed} bytes, {needed - 1} are free on the disk" in text
    assert "fix: make room" in text


def _rank_bytes(source: Path, out_dir: Path) -> bytes:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=1, pp=1, progress=SilentProgress())
    return (out_dir / "rank0.safetensors").read_bytes()


def test_a_disk_that_fills_while_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program took the room after it had been checked."""
    real, calls = os.pwrite, [0]

    def full(file: int, data: memoryview, offset: int) -> int:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    text = refusal(tiny_llama, tmp_path / "out", StageError)
    path = tmp_path / "out" / "rank0.safetensors"
    assert f"{path}: cannot be written: No space left on device; it needs " in text
    assert "bytes in all; fix: make room" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "not valid JSON"),
        ("model.safetensors.index.json", "not valid JSON"),
        ("hf_quant_config.json", "not valid JSON"),
    ],
)
def test_zero_length_files(sharded: Path, tmp_path: Path, name: str, text: str) -> None:
    (sharded / name).write_bytes(b"")
    assert f"{sharded / name}: {text}" in refusal(sharded, tmp_path / "out")


def test_scales_that_are_not_finite(tiny_llama: Path, tmp_path: Path) -> None:
    """Of quantized linears: float32 values that no cast would notice."""
    write_foreign(tiny_llama, tmp_path / "hf", method="awq")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"][0, :3] = np.inf
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CheckpointError, match=rf"^{name}.weight_scale: 3 values are NaN or Inf; fix"
    ):
        convert_checkpoint(tmp_path / "hf", tmp_path / "out", tp=2, pp=1, progress=SilentProgress())
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_disk_without_room_for_the_file_of_one_rank(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real limit of this process and its children, which the check before writing does not see."""
    monkeypatch.setattr(
        "pipeline.checkpoint.convert_processes.processes_that_fit", lambda *_, **__: 2
    )
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(StageError) as caught:
            convert_in_processes(
                tiny_llama, out_dir, tp=2, pp=1, launch="sequential", progress=SilentProgress()
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (problem,) = caught.value.problems
    path = re.fullmatch(r"rank ([01]): (.*)", problem.where)
    assert path is not None
    assert path[2] == f"{out_dir}/rank{path[1]}.safetensors"
    assert re.match(r"needs \d{6} bytes, \d+ are free on the disk", problem.what)
    assert problem.fix == "make room, or publish elsewhere"
    # The other process may have been ended with its file in hand, which has no header yet.
    assert {path.name for path in out_dir.iterdir()} <= {"rank0.safetensors", "rank1.safetensors"}


def test_exit_code(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "hf")
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert caught.value.exit_code is ExitCode.CHECKPOINT
