"""Commands on something published: as a config, as a directory, and damaged in every way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.manifest import read_published
from pipeline.publish import publish
from tests.build_config import write_build

VERBS = ["show", "verify", "serve", "client"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working copy with engines/tiny and triton_repo/tiny, published by the real code."""
    monkeypatch.chdir(tmp_path)
    loaded = load_config(write_build(tmp_path, serve={"http_port": 9}))  # nobody listens there
    manifest = {
        "schema": 3,
        "identity": repository_identity(),
        "name": "tiny",
        "rehearsal": False,
        "config": loaded.config.model_dump(mode="json"),
        "keys": {"build": "0" * 64},
        "actions": {},
        "facts": {
            "build": {"ranks": [{"rank": 0, "engine_bytes": 1234567}]},
            "serve": {"model_name": "tiny"},
            "verify": {"passed": True},
        },
    }
    for parent, name in (("engines", "report.json"), ("triton_repo", "tiny/config.pbtxt")):

        def fill(directory: Path, name: str = name) -> None:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text('{"passed": true}')

        publish(fill, tmp_path / parent / "tiny", manifest=manifest)
    return tmp_path


def repository_identity() -> dict[str, Any]:
    """Of an engine for the CPU, whose own files are not looked at here."""
    return {
        "kind": "engine",
        "backend": "onnxruntime",
        "compiler": "onnxruntime",
        "version": "1.0.0",
        "sms": [],
        "driver": None,
        "mapping": {"tp": 1, "pp": 1, "moe_ep": 1, "world_size": 1},
        "limits": None,
        "checkpoint_key": "0" * 64,
        "format": "fp16",
        "tools": {},
        "ranks": [],
    }


def _arguments(verb: str, subject: str) -> list[str]:
    return [verb, subject, "x"] if verb == "client" else [verb, subject]


def _rewrite(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


def test_what_is_read(here: Path) -> None:
    published = read_published(here / "triton_repo" / "tiny")
    assert published.manifest.model_name == "tiny"
    assert published.manifest.config == load_config(here / "tiny.yaml").config
    assert list(published.manifest.files) == ["tiny/config.pbtxt"]
    assert published.document["actions"] == {}


@pytest.mark.parametrize("subject", ["tiny.yaml", "engines/tiny", "triton_repo/tiny"])
def test_show(here: Path, capsys: pytest.CaptureFixture[str], subject: str) -> None:
    assert main(["show", subject]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("tiny in ")
    assert "fp16, onnxruntime for rtx4090, batch 2, 64 tokens" in shown
    assert "verify.passed: True" in shown
    assert "build.ranks: engine_bytes 1.23 MB, rank 0\n" in shown


def test_verify_an_engine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tiny.yaml"]) == 0
    assert capsys.readouterr().out == (
        "1 files as published (sha256)\n"
        "ONNX Runtime 1.0.0; 1 rank (tp 1, pp 1); checkpoint 000000000000\n"
        "passed: True\n"
    )


def test_verify_a_repository(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "triton_repo/tiny"]) == 0
    assert capsys.readouterr().out == (
        "1 files as published (sha256)\n"
        "ONNX Runtime 1.0.0; 1 rank (tp 1, pp 1); checkpoint 000000000000\n"
        "no quality report here: it is published with the engine, engines/tiny\n"
    )
    assert main(["verify", "triton_repo/tiny", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["here"]["can_run"]
    assert (shown["files"], shown["report"]) == (1, None)
    assert shown["identity"] == repository_identity()
    (here / "triton_repo" / "tiny" / "tiny" / "config.pbtxt").write_text("changed")
    assert main(["verify", "triton_repo/tiny"]) == 6


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"{", b"", b"\xff\xfe", b'"x"', b'{"facts": {"serve": []}}']
)
def test_a_manifest_that_is_none(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, content: bytes
) -> None:
    for parent in ("engines", "triton_repo"):
        (here / parent / "tiny" / "manifest.json").write_bytes(content)
    assert main(_arguments(verb, "tiny.yaml")) == 6
    errors = capsys.readouterr().err
    assert "tiny/manifest.json: " in errors
    assert "fix: run the build again" in errors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": {"x": {"bytes": "1"}}}, ["files.x.bytes: ", "files.x.sha256: Field required"]),
        ({"facts": {"serve": {}}}, ["facts: Value error, serve.model_name is None"]),
        ({"facts": {"serve": {"model_name": "../x"}}}, ["serve.model_name is '../x'"]),
        ({"config": {"name": "tiny"}, "keys": 5}, ["config.model: Field required", "keys: "]),
    ],
)
def test_every_problem_of_a_manifest_is_listed(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: list[str]
) -> None:
    _rewrite(here / "engines" / "tiny" / "manifest.json", **changes)
    assert main(["show", "tiny.yaml"]) == 6
    errors = capsys.readouterr().err
    assert [text for text in expected if text not in errors] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_in_the_place_of_a_published_directory(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    for parent in ("engines", "triton_repo"):
        (here / parent / "tiny").rename(here / parent / "moved")
        (here / parent / "tiny").touch()
    assert main(_arguments(verb, "tiny.yaml")) == 5
    assert "is not published: it is a file" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("source", ["argument", "standard input", "stop word"])
def test_a_prompt_that_is_not_utf8(here: Path, protocol: str, source: str) -> None:
    prompt = {"argument": b"a\xff", "standard input": b"-", "stop word": b"x"}[source]
    command = [sys.executable, "-m", "pipeline", "client", "tiny.yaml", prompt]
    command += ["--protocol", protocol]
    command += ["--stop", b"b\xff"] if source == "stop word" else []
    done = subprocess.run(command, input=b"a\xff", capture_output=True, check=False)
    where = "--stop" if source == "stop word" else "prompt"
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        f"error: {where}: invalid UTF-8 at byte 1 (0xff)",
        "  allowed: UTF-8 text",
    ]


def test_numbers_beyond_the_wire(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["client", "tiny.yaml", "x", "--protocol", "grpc", "--seed", "-1"]
    assert main([*arguments, "--max-tokens", str(2**31)]) == 2
    errors = capsys.readouterr().err
    assert "error: max_tokens: 2147483648\n  allowed: -2147483648 to 2147483647" in errors
    assert "error: seed: -1\n  allowed: 0 to 18446744073709551615" in errors


def test_a_server_that_is_not_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ü".encode())))
    assert main(["client", "triton_repo/tiny", "-"]) == 4
    assert "http://127.0.0.1:9: no server answers" in capsys.readouterr().err


def test_nohup_is_respected(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of ours instead of the ignored SIGHUP would end the command with the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def show(_options: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr("pipeline.cli._show", show)
    try:
        assert main(["show", "tiny.yaml"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
