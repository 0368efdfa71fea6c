"""What a published engine says of itself, and that `verify` finds every difference and names it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.integrity import check_published
from pipeline.manifest import read_published
from pipeline.publish import publish
from pipeline.run import run
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.rank_by_hand import write_random
from tests.run_views import Recorder
from tests.unit.test_rtx_checks import plan_bytes
from tests.unit.test_rtx_formats import ALL, build

VERSION = "1.7.1.116"
HEADER_BYTES = 112
REPAIR = "run the build again: what was changed is made anew"
REPAIRED = f"; fix: {REPAIR}"


# --- a real build --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """engines/tiny of a whole build with TensorRT-RTX; tests leave it as it is."""
    root = tmp_path_factory.mktemp("rtx")
    config = write_build(root, backend="tensorrt_rtx")
    return run(load_config(config), Workspace(root), Recorder()).engine_dir


def test_a_build_says_what_it_is_and_needs(built: Path) -> None:
    plan = (built / "rank0.engine").read_bytes()
    offset, size = struct.unpack_from("<QQ", plan, 96)  # of the chunk WGHT
    manifest = json.loads((built / "manifest.json").read_text())
    identity = manifest["identity"]
    tools = identity.pop("tools")
    assert tools["build"]["tensorrt_rtx_cu13_libs"] == VERSION
    assert identity.pop("ranks") == [
        {
            "rank": 0,
            "files": ["rank0.engine", "rank0.onnx", "rank0.trt.onnx", "rank0.weights"],
            "weight_bytes": size,
            "weights_sha256": hashlib.sha256(plan[offset : offset + size]).hexdigest(),
        }
    ]
    assert identity.pop("driver")["minimum"] == "580"
    assert identity == {
        "kind": "engine",
        "backend": "tensorrt_rtx",
        "compiler": "tensorrt_rtx",
        "version": VERSION,
        "sms": [89],
        "mapping": {"tp": 1, "pp": 1, "moe_ep": 1, "world_size": 1},
        "limits": {
            "max_batch_size": 2,
            "max_seq_len": 64,
            "max_input_len": 32,
            "gather_context_logits": False,
        },
        "checkpoint_key": manifest["keys"]["convert"],
        "format": "fp16",
    }


@pytest.mark.slow
def test_the_hash_of_the_weights_is_that_of_every_build(tmp_path: Path) -> None:
    checkpoint = write_random(tmp_path / "checkpoint", ALL)
    facts = [
        build(checkpoint, tmp_path / f"{target}{turn}", target)
        for target in ("rtx4090", "rtx5090")
        for turn in range(2)
    ]
    assert len({one.weights_sha256 for one in facts}) == 1
    assert {one.sms for one in facts} == {(89,), (120,)}


def test_verify_a_copy_anywhere(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(built, copy)
    assert main(["verify", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" files as published (sha256)")
    assert lines[1].startswith(
        f"TensorRT-RTX {VERSION} for SM89, NVIDIA driver 580 or newer; 1 rank (tp 1, pp 1); checkpoint "
    )
    assert main(["verify", str(copy), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["identity"]["sms"] == [89]
    assert shown["here"]["runtime"] == VERSION
    assert main(["show", str(copy)]) == 0
    assert lines[1] in capsys.readouterr().out


def test_verify_imports_no_compiler_and_no_model_library(built: Path) -> None:
    heavy = {"tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt", "torch", "transformers", "onnx"}
    heavy |= {"onnxruntime", "modelopt"}
    code = (
        "import sys; from pipeline.cli import main; assert main(['verify', sys.argv[1]]) == 0; "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def _changed_byte(directory: Path, name: str, position: int, flip: int) -> list[str]:
    """What is said of a directory while one byte of one of its files is another."""
    path = directory / name
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)
        file.seek(position)
        file.write(bytes([old[0] ^ flip]))
        file.flush()
        try:
            return [str(problem) for problem in check_published(read_published(directory))]
        finally:
            file.seek(position)
            file.write(old)


@pytest.fixture(scope="module")
def copied(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the store's hard links."""
    copy = tmp_path_factory.mktemp("copy") / "tiny"
    shutil.copytree(built, copy)
    return copy


@settings(max_examples=60, deadline=None)
@given(data=st.data(), flip=st.integers(1, 255))
def test_one_byte_of_an_engine(copied: Path, data: st.DataObject, flip: int) -> None:
    path = copied / "rank0.engine"
    size = path.stat().st_size
    offset, length = struct.unpack_from("<QQ", path.read_bytes()[:HEADER_BYTES], 96)
    position = data.draw(
        st.one_of(
            st.integers(0, HEADER_BYTES - 1),
            st.integers(0, size - 1),
            st.integers(offset, offset + length - 1),
        )
    )
    problems = _changed_byte(copied, path.name, position, flip)
    assert problems[0] == f"{path}: was changed after publishing (sha256 differs){REPAIRED}"
    if offset <= position < offset + length:
        assert f"{path}: its weights are not those that were published{REPAIRED}" in problems
    elif position >= HEADER_BYTES:
        whole = f"{path}: its weights are those that were published; other bytes of it differ"
        assert f"{whole}{REPAIRED}" in problems
    elif 24 <= position < 28:
        assert "its header says TensorRT-RTX " in problems[1]
        assert f"allowed: {VERSION}, as in manifest.json" in problems[1]
    elif position == 32:
        assert "its header says " in problems[1] or flip & 0b110111 == 0  # bits of no GPU
    elif position in (*range(4), *range(16, 24), *range(28, 32), *range(64, 68)):
        assert len(problems) == 2  # magic, size, tag: the header's own message


@settings(max_examples=25, deadline=None)
@given(data=st.data(), flip=st.integers(1, 255))
def test_one_byte_of_any_other_file(copied: Path, data: st.DataObject, flip: int) -> None:
    names = sorted(json.loads((copied / "manifest.json").read_text())["files"])
    path = copied / (name := data.draw(st.sampled_from(names)))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    problems = _changed_byte(copied, name, position, flip)
    assert problems[0] == f"{path}: was changed after publishing (sha256 differs){REPAIRED}"


# --- two ranks, published by the real code from plans laid out by hand -------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """engines/pair: tp 2 for SM86 and SM89."""
    weights = {rank: os.urandom(64) for rank in range(2)}
    loaded = load_config(write_build(tmp_path, backend="tensorrt_rtx", mapping={"tp": 2}))
    manifest = {
        "schema": 3,
        "name": "pair",
        "rehearsal": False,
        "config": loaded.config.model_dump(mode="json"),
        "keys": {},
        "actions": {},
        "facts": {},
        "identity": {
            "kind": "engine",
            "backend": "tensorrt_rtx",
            "compiler": "tensorrt_rtx",
            "version": VERSION,
            "sms": [86, 89],
            "driver": {"minimum": "580", "source": "https://example.invalid"},
            "mapping": {"tp": 2, "pp": 1, "moe_ep": 1, "world_size": 2},
            "limits": {
                "max_batch_size": 2,
                "max_seq_len": 64,
                "max_input_len": 32,
                "gather_context_logits": False,
            },
            "checkpoint_key": "a" * 64,
            "format": "fp16",
            "tools": {},
            "ranks": [
                {
                    "rank": rank,
                    "files": [f"rank{rank}.engine", f"rank{rank}.weights"],
                    "weight_bytes": 64,
                    "weights_sha256": hashlib.sha256(weights[rank]).hexdigest(),
                }
                for rank in range(2)
            ],
        },
    }

    def fill(directory: Path) -> None:
        for rank in range(2):
            plan = plan_bytes(sm_mask=4 + 8, weights=weights[rank])
            (directory / f"rank{rank}.engine").write_bytes(plan)
            (directory / f"rank{rank}.weights").write_bytes(b"w" * (10 + rank))
        config = {
            "pretrained_config": {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}},
            "build_config": {"max_batch_size": 2, "max_seq_len": 64, "max_input_len": 32},
        }
        (directory / "config.json").write_text(json.dumps(config))

    publish(fill, tmp_path / "engines" / "pair", manifest=manifest)
    return tmp_path / "engines" / "pair"


def _said(engine: Path) -> list[str]:
    """What is said of it, without the directory and the usual fix."""
    texts = [str(problem) for problem in check_published(read_published(engine))]
    return [text.replace(f"{engine}/", "").replace(REPAIRED, "") for text in texts]


def test_a_whole_engine(engine: Path) -> None:
    assert _said(engine) == []


@pytest.mark.parametrize("kept", [0, 63, 111, 183])
def test_a_truncated_engine(engine: Path, kept: int) -> None:
    path = engine / "rank1.engine"
    path.write_bytes(path.read_bytes()[:kept])
    assert _said(engine) == [f"rank1.engine: has {kept} bytes, 184 were published"]


def test_swapped_ranks(engine: Path) -> None:
    for kind in ("engine", "weights"):
        (engine / f"rank0.{kind}").rename(engine / "x")
        (engine / f"rank1.{kind}").rename(engine / f"rank0.{kind}")
        (engine / "x").rename(engine / f"rank1.{kind}")
    said = _said(engine)
    changed = "was changed after publishing (sha256 differs); it holds what was published as"
    assert said[:4] == [
        f"rank0.engine: {changed} rank1.engine",
        "rank0.weights: has 11 bytes, 10 were published; it holds what was published as rank1.weights",
        f"rank1.engine: {changed} rank0.engine",
        "rank1.weights: has 10 bytes, 11 were published; it holds what was published as rank0.weights",
    ]
    assert said[4:] == [
        f"rank{rank}.engine: its weights are not those that were published" for rank in (0, 1)
    ]


def test_a_missing_rank_and_an_extra_file(engine: Path) -> None:
    (engine / "rank1.engine").rename(engine / "rank2.engine")
    assert _said(engine) == [
        "rank1.engine: is missing",
        "rank2.engine: is not in the manifest; fix: move it away",
    ]


def test_an_engine_of_another_version_and_sm(engine: Path) -> None:
    path = engine / "rank0.engine"
    data = bytearray(path.read_bytes())
    data[24:28] = bytes((1, 6, 1, 120))
    data[32] = 16
    path.write_bytes(data)
    assert _said(engine) == [
        "rank0.engine: was changed after publishing (sha256 differs)",
        f"rank0.engine: its header says TensorRT-RTX 1.6.1.120; allowed: {VERSION}, as in manifest.json",
        "rank0.engine: its header says SM120; allowed: SM86, SM89, as in manifest.json",
        "rank0.engine: its weights are those that were published; other bytes of it differ",
    ]


def _edit(path: Path, *keys: str | int, value: Any) -> None:
    document = json.loads(path.read_text())
    section = document
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path.write_text(json.dumps(document))


EDITED = "manifest.json: was edited after publishing (its digest differs)"


@pytest.mark.parametrize(
    ("keys", "value", "also"),
    [
        (("rehearsal",), True, []),
        (("identity", "driver", "minimum"), "470", []),
        (("identity", "ranks", 0, "weights_sha256"), "0" * 64, []),
        (
            ("identity", "version"),
            "1.6.1.120",
            [
                f"rank{rank}.engine: its header says TensorRT-RTX {VERSION}; allowed: 1.6.1.120, as in "
                "manifest.json"
                for rank in (0, 1)
            ],
        ),
        (
            ("identity", "sms"),
            [89],
            [
                f"rank{rank}.engine: its header says SM86, SM89; allowed: SM89, as in manifest.json"
                for rank in (0, 1)
            ],
        ),
        (
            ("identity", "mapping", "pp"),
            2,
            [
                "manifest.json: identity.mapping: tp 2, pp 2 with world_size 2; allowed: world_size = "
                "tp x pp",
                "config.json: mapping says pp 1; allowed: 2, as in manifest.json",
            ],
        ),
        (
            ("identity", "limits", "max_seq_len"),
            128,
            ["config.json: build_config.max_seq_len is 64; allowed: 128, as in manifest.json"],
        ),
        (
            ("identity", "ranks", 1, "files"),
            ["rank1.weights"],
            [
                "manifest.json: identity.ranks does not name the rank files that `files` lists",
                "manifest.json: rank 1 has no rank1.engine",
            ],
        ),
        (
            ("identity", "ranks", 1, "rank"),
            2,
            [
                "manifest.json: identity.ranks has ranks 0, 2; tp 2, pp 1; allowed: ranks 0, 1",
                "manifest.json: identity.ranks does not name the rank files that `files` lists",
            ],
        ),
        (
            ("files", "rank0.engine", "sha256"),
            "0" * 64,
            [
                "rank0.engine: was changed after publishing (sha256 differs)",
                "rank0.engine: its weights are those that were published; other bytes of it differ",
            ],
        ),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_edited_manifest(
    engine: Path, keys: tuple[str | int, ...], value: Any, also: list[str]
) -> None:
    _edit(engine / "manifest.json", *keys, value=value)
    assert _said(engine) == [EDITED, *also]


def test_a_config_of_another_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(engine / "config.json", "pretrained_config", "mapping", "tp_size", value=4)
    assert "config.json: mapping says tp 4; allowed: 2, as in manifest.json" in _said(engine)
    assert main(["verify", str(engine), "--json"]) == 6
    shown = json.loads(capsys.readouterr().out)
    assert shown["error"] == "GateError"
    assert all(problem["fix"] == REPAIR for problem in shown["problems"])


@pytest.mark.parametrize(("schema", "age"), [(2, "an older"), (4, "a newer")])
@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_manifest_of_another_schema(
    engine: Path, capsys: pytest.CaptureFixture[str], schema: int, age: str, verb: str
) -> None:
    document = json.loads((engine / "manifest.json").read_text())
    del document["identity"], document["digest"]
    (engine / "manifest.json").write_text(json.dumps({**document, "schema": schema}))
    assert main([verb, str(engine)]) == 6
    assert capsys.readouterr().err.splitlines() == [
        f"error: {engine}/manifest.json: was published by {age} version of this program "
        f"(schema {schema})",
        "  allowed: schema 3",
        "  fix: run the build again",
    ]
