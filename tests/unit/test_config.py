"""Every mistake in a YAML is one line: file, line, key, what is allowed, the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import HubSource, load_config
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def _problems(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    assert load_config(path).config.name == path.stem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {source: demo}\nbuild:\n  max_batch_sze: 4\n",
            "x.yaml:3: build.max_batch_sze: unknown key; allowed: also_for, backend, hostfile, "
            "launch, max_batch_size, max_input_len, max_memory_gb, max_seq_len, tensorrt, "
            "tensorrt_llm; fix: did you mean `max_batch_size`?",
        ),
        (
            "model: {source: demo}\nbuild:\n  max_batch_size: four\n",
            "x.yaml:3: build.max_batch_size: 'four': Input should be a valid integer",
        ),
        (
            "model: {source: demo}\nbuild:\n  max_batch_size: 2.0\n",
            "x.yaml:3: build.max_batch_size: 2.0: Input should be a valid integer",
        ),
        (
            "model: {source: demo}\nbuild: {max_seq_len: 64}\nbuild: {}\n",
            "x.yaml:3: duplicate key `build`, first on line 2; allowed: each key once",
        ),
        (
            "model: {source: demo}\ntarget: rtx4080x\n",
            "x.yaml:2: target: unknown target 'rtx4080x'; allowed: a10, a100-80gb, b200, "
            "h100-80gb, h200, l4, l40s, orin-agx-64gb, rtx3090, rtx4090, rtx5090",
        ),
        (
            "model:\n  source: hub\n  id: meta-llama/Llama-2-13b-hf\n  revision: main\n",
            "x.yaml:4: model.revision: 'main' does not fit; allowed: the 40 hexadecimal digits of a "
            "commit; fix: take it from its page on the Hub, Files, History: a branch name moves",
        ),
        (
            "model: {source: hub, id: a/b, revision: 1234}\n",
            "x.yaml:1: model.revision: 1234: Input should be a valid string; fix: put it in quotes",
        ),
        ("model: {source: hug}\n", "x.yaml:1: model.source: 'hug' is not known; allowed: "),
        ("target: rtx4090\n", "x.yaml:1: model: is missing; fix: add `model:`"),
        (
            "model: {}\n",
            "x.yaml:1: model: has no `source:`; allowed: demo, hub, directory, synthetic",
        ),
        (
            "model: {source: demo}\nquantize:\n  group_size: 32\n",
            "x.yaml:3: quantize.group_size: 32 is not known; allowed: 64 or 128",
        ),
        (
            "model: {source: demo}\nbuild: {max_input_len: 1024, max_seq_len: 1024}\n",
            "x.yaml:2: build: max_input_len 1024 leaves no room for an answer in max_seq_len 1024; "
            "allowed: less than max_seq_len",
        ),
        ("name: ../x\nmodel: {source: demo}\n", "x.yaml:1: name: '../x' cannot name a directory"),
        ('name: "x\\n"\nmodel: {source: demo}\n', r"x.yaml:1: name: 'x\n' cannot name a directory"),
        (
            'model: {source: demo}\nserve: {model_name: "x\\n"}\n',
            r"x.yaml:2: serve.model_name: 'x\n' does not fit",
        ),
        ("model: [demo\n", "x.yaml:2: YAML syntax: "),
        ("- a\n", "x.yaml:1: is not a mapping; allowed: `key: value` lines"),
        ("", "x.yaml:1: is not a mapping"),
        ("1: 2\n", "x.yaml:1: key 1 is not text"),
        ("model: !!python/object:os.system {}\n", "x.yaml:1: "),
        ("extends: nowhere.yaml\n", "x.yaml:1: extends: no such file: nowhere.yaml"),
        ("extends: x.yaml\n", "x.yaml:1: extends: goes round in a circle: x.yaml -> x.yaml"),
        (
            "model: {source: demo}\nquantize:\n",
            "x.yaml:2: quantize: None is not a section; allowed: ",
        ),
        ("model: \0\n", "x.yaml: is not text: special characters are not allowed at position 7"),
        ("a: &x {b: *x}\n", "x.yaml:1: YAML syntax: aliases (*) are not allowed"),
        ('!!int "abc": 3\n', "x.yaml:1: key 'abc' is not text"),
        (
            "model: {source: demo}\nverify: {gates: {max_perplexity_ratio: .inf}}\n",
            "x.yaml:2: verify.gates.max_perplexity_ratio: inf: Input should be a finite number",
        ),
        (
            "model: {source: demo}\nserve: {grpc_port: 8000}\n",
            "x.yaml:2: serve: http_port, grpc_port and metrics_port are 8000, 8000, 8002; allowed: "
            "three different ports",
        ),
        *(
            (
                "model: {source: demo}\nbuild: {tensorrt_llm: {environment: " + given + "}}\n",
                "x.yaml:2: build.tensorrt_llm.environment" + said,
            )
            for given, said in (
                ("here", ": 'here' is not known; allowed: current, {venv: DIRECTORY} or {image: "),
                ("{A: 1}", ": {'A': 1} is not known; allowed: current, "),
                ("{venv: a, foo: 1}", ".foo: unknown key; allowed: venv; fix: remove it"),
                ("{image: x}", ".image: 'x' does not fit; allowed: name:tag or name@sha256:digest"),
                (
                    "{image: a:latest}",
                    ": a:latest moves; allowed: a tag with a version, or a digest",
                ),
            )
        ),
        (b"model: \xff\n", "x.yaml: byte 7 is not valid UTF-8"),
        (
            "model: {source: demo}\nverify: {gates: {min_top1_agreement: 1.5}}\n",
            "x.yaml:2: verify.gates.min_top1_agreement: 1.5: Input should be less than or equal to 1",
        ),
    ],
)
def test_each_mistake_has_its_own_message(tmp_path: Path, text: str | bytes, expected: str) -> None:
    problems = _problems(tmp_path, text)
    assert any(problem.startswith(expected) for problem in problems), problems


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = "model: {source: demo}\ntargt: a10\nbuild: {backend: trt}\nmapping: {tp: 0}\n"
    lines = [problem.split(":")[1] for problem in _problems(tmp_path, text)]
    assert sorted(lines) == ["2", "3", "4"]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("model: {source: demo}\n")
    (tmp_path / ".hidden.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"dmo.yaml: no such file; allowed: demo;"):
        load_config(tmp_path / "dmo.yaml")


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {source: demo}\nverify: {gates: {max_mean_kl: 1e-3}}\n")
    assert load_config(path).config.verify.gates.max_mean_kl == 0.001


def test_extends_merges_deeply_and_keeps_locations(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\nmodel: {source: demo}\nbuild:\n  max_batch_size: 8\n  max_seq_len: 256\n"
        "  max_input_len: 128\n"
    )
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text(
        "extends: ../base.yaml\nmodel:\n  source: hub\n  id: a/b\n  revision: " + "a" * 40 + "\n"
        "build: {max_batch_size: 2}\n"
    )
    loaded = load_config(child)
    assert loaded.config.name == "child"
    assert loaded.config.build.max_batch_size == 2
    assert loaded.config.build.max_seq_len == 256
    assert isinstance(loaded.config.model, HubSource)
    assert loaded.where("build", "max_seq_len").endswith("base.yaml:5: build.max_seq_len")
    assert loaded.where("build", "max_batch_size").endswith("child.yaml:6: build.max_batch_size")


def test_relative_paths_start_at_the_file_that_has_the_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {source: directory, path: weights}\n")
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../base.yaml\nverify: {data: text.txt}\n")
    loaded = load_config(child)
    assert loaded.resolve("weights", "model", "path") == tmp_path / "weights"
    assert loaded.resolve("text.txt", "verify", "data") == tmp_path / "sub" / "text.txt"
