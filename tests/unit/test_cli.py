"""The contract of the command line: exit codes, one JSON document, errors with fixes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    ExitCode,
    GateError,
    PipelineError,
    PlanError,
    Problem,
    RequestError,
    StageError,
    ToolError,
)
from pipeline.support import support_markdown
from tests.build_config import write_build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _readme_codes() -> dict[int, str]:
    table = (ROOT / "README.md").read_text().split("## Exit codes")[1].split("##")[0]
    return {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+?) \|$", table, re.M)}


def test_exit_codes_are_those_of_the_readme() -> None:
    assert {int(code) for code in ExitCode} == set(_readme_codes())
    kinds = (
        ConfigError,
        PlanError,
        CheckpointError,
        ToolError,
        StageError,
        GateError,
        RequestError,
    )
    assert [int(kind.exit_code) for kind in kinds] == [2, 2, 3, 4, 5, 6, 2]


def test_every_error_kind_survives_the_way_from_a_stage() -> None:
    """run.py finds the class by its name in pipeline.errors."""
    from pipeline import errors

    for kind in PipelineError.__subclasses__():
        assert getattr(errors, kind.__name__) is kind


def test_a_problem_reads_as_one_line() -> None:
    problem = Problem("a.yaml:3: build.x", "is 4", "1 to 3", "choose one")
    assert str(problem) == "a.yaml:3: build.x: is 4; allowed: 1 to 3; fix: choose one"


def test_a_bad_config_ends_with_2(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x.yaml").write_text("model: {source: demo}\ntargt: l4\n")
    assert main(["plan", "x.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: x.yaml:2: targt: unknown key" in captured.err
    assert "  fix: did you mean `target`?" in captured.err


def test_errors_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "ConfigError"
    assert document["problems"][0]["what"] == "no such file"


def test_an_impossible_plan_ends_with_2_and_starts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_build(here, mapping={"tp": 3})
    assert main(["run", str(config)]) == 2
    assert ": mapping: " in capsys.readouterr().err
    assert not list((here / "engines").glob("*")) if (here / "engines").exists() else True


def test_an_impossible_plan_as_json_is_one_document(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_build(here, mapping={"tp": 3})
    assert main(["plan", str(config), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    where = [problem["where"].rpartition(": ")[2] for problem in document["problems"]]
    assert where == ["mapping"] * 3  # attention heads, KV heads, feed-forward network


@pytest.mark.parametrize("kind", ["directory", "config.json", "option"])
def test_weights_that_are_a_link_to_themselves(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    link = here / "loop"
    weights = "loop"
    if kind == "config.json":
        (here / "hf").mkdir()
        link, weights = here / "hf" / "config.json", "hf"
    link.symlink_to(link.name)
    if kind == "option":
        config, options = write_build(here), ["--weights", weights]
    else:
        config = write_build(here, model={"source": "directory", "path": weights})
        options = []
    for verb in ("plan", "run"):
        assert main([verb, str(config), *options, "--json"]) == 3
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert problem["what"] == f"a symbolic link that leads in a circle (to {link.name})"
        assert problem["where"] == str(link)


def test_a_config_that_is_a_link_to_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.yaml").symlink_to("a.yaml")
    assert main(["plan", "a.yaml"]) == 2
    assert "a.yaml: cannot be read: Too many levels of symbolic links" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["show", "verify", "serve"])
def test_what_is_not_published_names_the_fix(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    config = write_build(here)
    assert main([verb, str(config)]) == 5
    assert "is not published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"mapping": {"tp": 2}}, "has 2 ranks; a server runs one, on the CPU"),
        ({"backend": "none"}, "was built without a server: it ends with its checkpoint"),
        (
            {"backend": "tensorrt_llm"},
            "was built without a server: backend tensorrt_llm ends with an engine or a kit",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["serve", "client"])
def test_a_build_that_has_no_server_says_why(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    sections: dict[str, Any],
    expected: str,
) -> None:
    """Not that it has to be run: a run would change nothing."""
    config = write_build(here, **sections)
    assert main([verb, str(config), *(["x"] if verb == "client" else [])]) == 5
    assert f"{config}: {expected}" in capsys.readouterr().err


def test_weights_that_do_not_exist(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_build(here)
    assert main(["plan", str(config), "--weights", "nowhere"]) == 3
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_corrupt_tokenizer(here: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    config = write_build(here)
    (here / "weights" / "tokenizer.json").write_text(content)
    assert main(["plan", str(config)]) == 3
    assert "tokenizer.json" in capsys.readouterr().err


def test_corrupt_config_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_build(here)
    (here / "weights" / "config.json").write_text("{")
    assert main(["plan", str(config)]) == 3
    assert "config.json" in capsys.readouterr().err


def test_an_unknown_verb_is_refused_by_the_parser() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "biuld"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: trtpipe: argument VERB: invalid choice: 'biuld'" in done.stderr


def test_a_wrong_command_line_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"


def test_a_reader_that_leaves_is_no_error(here: Path) -> None:
    config = write_build(here)
    command = f"{sys.executable} -m pipeline plan {config} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny: fp16")


def test_the_support_section_of_the_readme_is_made_from_the_code() -> None:
    section = (ROOT / "README.md").read_text().split("<!-- support:begin -->")[1]
    assert section.split("<!-- support:end -->")[0].strip() == support_markdown()


def test_the_readme_names_only_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    code = re.findall(r"```sh\n(.*?)```|`(make [^`]+)`", (ROOT / "README.md").read_text(), re.S)
    used = set(re.findall(r"^make (?:PYTHON=\S+ )?([a-z-]+)", "\n".join(map("".join, code)), re.M))
    assert used
    assert used <= targets
