"""Paths that no file can have: in the YAML with their line, on the command line, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.links import possible_path

LONG = "a" * 256
TOO_LONG = (
    "'aaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaa' has a name of 256 bytes; files have at most 255"
)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("~nobody-here/x", "'~nobody-here/x': there is no such user"),
        (f"x/{'é' * 128}/y", "has a name of 256 bytes; files have at most 255"),
        ("a\0b", r"'a\x00b' holds a null character"),
        ("a/" * 2049, "is longer than 4095 bytes"),
        ("a\ud800", r"'a\ud800' is not text that can name a file"),
    ],
)
def test_impossible(path: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        possible_path(path)


def test_possible() -> None:
    assert possible_path("~/x") == Path.home() / "x"
    assert possible_path("~nobody-here", home=False) == Path("~nobody-here")
    assert possible_path("a" * 255).name == "a" * 255
    assert possible_path("") == Path()


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            "model: {source: directory, path: ~no-one/x}",
            "build.yaml:1: model.path: '~no-one/x': ",
        ),
        (f"model: {{source: directory, path: {LONG}}}", f"build.yaml:1: model.path: {TOO_LONG}"),
        (
            f"model: {{source: demo}}\nverify:\n  data: {LONG}",
            f"build.yaml:3: verify.data: {TOO_LONG}",
        ),
        (
            f"model: {{source: demo}}\nquantize:\n  calibration:\n    data: {LONG}",
            f"build.yaml:4: quantize.calibration.data: {TOO_LONG}",
        ),
        (f"extends: {LONG}\nmodel: {{source: demo}}", f"build.yaml:1: extends: {TOO_LONG}"),
        (
            'model: {source: directory, path: "a\\0b"}',
            r"build.yaml:1: model.path: 'a\x00b' holds a null character",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "explain", "run"])
def test_in_the_yaml(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    lines: str,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.yaml").write_text(f"{lines}\n")
    assert main([verb, "build.yaml"]) == 2
    assert text in capsys.readouterr().err.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


@pytest.mark.parametrize("verb", ["show", "plan", "verify", "serve", "explain"])
def test_on_the_command_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, LONG]) == 2
    assert TOO_LONG in capsys.readouterr().err.replace("\n", "")


def test_as_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "build.yaml"
    config.write_text("model: {source: demo}\n")
    assert main(["plan", str(config), "--weights", "~no-one/x"]) == 2
    assert "--weights: '~no-one/x': there is no such user" in capsys.readouterr().err
