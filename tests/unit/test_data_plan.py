"""Calibration data in the YAML: its mistakes, what the plan sees of files, and what decides a key."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.calibration_config import HubFile
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.plan import Plan, make_plan
from pipeline.quant.data.preflight import CHECK_BYTES
from pipeline.stages.quantize import Quantize
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.tiny_text import made_up_texts

REVISION = "0123456789abcdef0123456789abcdef01234567"
HUB = f"data: {{hub: o/n, revision: '{REVISION}', file: a/b.parquet}}"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("build"), fmt="int4_awq")


def _variant(build: Path, tmp_path: Path, verify: dict[str, Any], **calibration: Any) -> Path:
    data = yaml.safe_load(build.read_text())
    data["model"]["path"] = str(build.parent / "weights")
    data["verify"].update({"data": str(build.parent / "text.txt"), **verify})
    section = data["quantize"]["calibration"]
    section.update({"data": str(build.parent / "text.txt"), **calibration})
    path = tmp_path / "variant.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def _plan(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests())


def _texts(plan: Plan, config: Path) -> list[str]:
    """Problems, without the directory and the line of the YAML."""
    lines = [str(problem).replace(f"{config.parent}/", "") for problem in plan.problems]
    return [line[max(0, line.find("quantize.")) :] for line in lines]


def _config(tmp_path: Path, section: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{source: demo}}\nquantize:\n  calibration:\n    {section}\n")
    return path


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            "data: {hub: o/n, revision: main, file: a.txt}",
            "x.yaml:4: quantize.calibration.data.revision: 'main' does not fit; allowed: the 40 "
            "hexadecimal digits of a commit; fix: take it from its page on the Hub",
        ),
        (
            "data: {hub: name, revision: main}",
            "x.yaml:4: quantize.calibration.data.hub: 'name' does not fit; allowed: owner/name",
        ),
        (
            HUB.replace("a/b", "../b"),
            "x.yaml:4: quantize.calibration.data.file: '../b.parquet' does not fit; allowed: the path",
        ),
        (
            HUB.replace("a/b", "a/../../b"),
            "x.yaml:4: quantize.calibration.data.file: 'a/../../b.parquet' does not fit",
        ),
        (
            HUB.replace("file", "fil"),
            "x.yaml:4: quantize.calibration.data.fil: unknown key; allowed: file, hub, revision; "
            "fix: did you mean `file`?",
        ),
        (
            "data: {hub: o/n}",
            "x.yaml:4: quantize.calibration.data.revision: is missing; fix: add `revision:`",
        ),
        (
            "data: 3",
            "x.yaml:4: quantize.calibration.data: 3: Input should be a valid string; fix: put",
        ),
        (
            "{column: a, messages: b}",
            "x.yaml:3: quantize.calibration: column and messages are both given; allowed: a column",
        ),
        (
            "strategy: best",
            "x.yaml:4: quantize.calibration.strategy: 'best' is not known; allowed: 'random', 'div",
        ),
        (
            "clean: {min_chars: 5, max_chars: 4}",
            "x.yaml:4: quantize.calibration.clean: min_chars 5 is above max_chars 4; allowed: at",
        ),
        (
            "clean: {urls: true}",
            "x.yaml:4: quantize.calibration.clean.urls: unknown key; allowed: drop_duplicates, drop",
        ),
    ],
)
def test_mistakes_in_the_yaml(tmp_path: Path, section: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_config(tmp_path, section))
    texts = [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]
    assert any(text.startswith(expected) for text in texts), texts


def test_a_hub_file_replaces_the_data_of_the_parent(tmp_path: Path) -> None:
    _config(tmp_path, "data: bundled")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: x.yaml\nquantize: {{calibration: {{{HUB}}}}}\n")
    data = load_config(child).config.quantize.calibration.data
    assert data == HubFile(hub="o/n", revision=REVISION, file="a/b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        (
            "a.csv",
            "id,body\n1,x\n",
            {},
            "quantize.calibration.data: a.csv:1: has no column 'text'; allowed: id, body",
        ),
        (
            "a.csv",
            "id,body\n1,x\n",
            {"column": "bodi"},
            "quantize.calibration.column: a.csv:1: has no column 'bodi'; allowed: id, body; fix: did",
        ),
        ("a.csv", "", {}, "quantize.calibration.data: a.csv:1: has no column 'text'"),
        (
            "a.csv",
            "text\n",
            {},
            "quantize.calibration.data: a.csv: holds no text; fix: give a file",
        ),
        (
            "a.csv",
            "messages\n",
            {"messages": "messages"},
            "quantize.calibration.messages: a CSV cell cannot hold a dialogue; fix: give .jsonl",
        ),
        (
            "a.txt",
            "text",
            {"column": "text"},
            "quantize.calibration.column: a .txt file has no columns; fix: leave it out, or give "
            ".jsonl, .csv, .parquet",
        ),
        (
            "a.md",
            "text",
            {},
            "quantize.calibration.data: a.md: text data has the suffix '.md'; allo",
        ),
        (
            "a.jsonl",
            '{"text": null}\n',
            {},
            'quantize.calibration.data: a.jsonl:1: "text" is null; allowed: a text in every row',
        ),
        (
            "a.parquet",
            "PAR1",
            {},
            "quantize.calibration.data: a.parquet: is no readable Parquet file",
        ),
        (
            "a.jsonl",
            '{"text": "words"}\n',
            {},
            "quantize.calibration.data: a.jsonl: holds 5 bytes of text, 4 windows of 32 tokens need "
            "128 tokens; fix: give more text",
        ),
        (
            "a.jsonl",
            json.dumps({"text": "words " * 12}),
            {},
            "quantize.calibration.data: a.jsonl: ",  # the tokenizer says how many windows
        ),
        (
            "a.jsonl",
            json.dumps({"text": "words " * 99}),
            {"clean": {"min_chars": 1000}},
            "quantize.calibration.data: a.jsonl: cleaning left none of its 1 documents; fix: loosen",
        ),
        (
            "a.jsonl",
            json.dumps({"text": "http://example.org/" + "words" * 99 + " rest"}),
            {"clean": {"remove_urls": True}},
            "quantize.calibration.data: a.jsonl: holds 5 bytes of text, 4 windows of 32 tokens need",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n',
            {"layout": "padded"},
            "quantize.calibration.data: a.jsonl: holds 1 documents, 4 padded samples are asked for",
        ),
        (
            "a.jsonl",
            json.dumps({"talk": [{"role": "user", "content": "words " * 40}]}),
            {"messages": "talk"},
            "quantize.calibration.messages: the model's tokenizer has no chat template",
        ),
    ],
)
def test_what_the_plan_sees(
    build: Path, tmp_path: Path, name: str, content: str, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / name).write_text(content)
    config = _variant(build, tmp_path, {}, data=name, **options)
    texts = _texts(_plan(config, tmp_path), config)
    assert len(texts) == 1 + (name == "a.csv" and "messages" in options)  # and there is no template
    assert texts[0].startswith(expected)


def test_problems_of_both_texts_are_listed_at_once(build: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n")
    config = _variant(build, tmp_path, {"data": "a.csv", "column": "b"}, data="a.csv", seq_len=300)
    texts = [str(problem) for problem in _plan(config, tmp_path).problems]
    assert len(texts) == 3
    assert any("verify.column: " in text and "has no column 'b'" in text for text in texts)
    assert any("quantize.calibration.seq_len: 300 is more than" in text for text in texts)


def test_null_rows_that_are_dropped_are_no_problem(build: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in made_up_texts(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": null}', *lines]))
    config = _variant(build, tmp_path, {}, data="a.jsonl", clean={"drop_null": True})
    assert _plan(config, tmp_path).problems == ()


def test_a_plan_of_a_hub_file_touches_no_network(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = {"hub": "o/n", "revision": REVISION, "file": "train.parquet"}
    config = _variant(build, tmp_path, {}, data=data, column="body")
    plan = _plan(config, tmp_path)
    assert plan.problems == ()
    action = plan.step("quantize").action
    assert action is not None
    assert "calibration" not in action.inputs
    assert action.config["calibration"]["data"] == data
    config = _variant(build, tmp_path, {}, data={**data, "file": "train.zip"})
    (text,) = _texts(_plan(config, tmp_path), config)
    assert "train.zip: text data has the suffix '.zip'" in text


def _quantize_key(build: Path, tmp_path: Path, **options: Any) -> str:
    plan = _plan(_variant(build, tmp_path, {}, **options), tmp_path)
    assert plan.problems == ()
    action = plan.step("quantize").action
    assert action is not None
    return action.key


def test_what_decides_the_key(build: Path, tmp_path: Path) -> None:
    usual = _quantize_key(build, tmp_path)
    same = [{"seed": 0}, {"strategy": "random"}, {"padding": "right"}, {"clean": {}}]
    assert {_quantize_key(build, tmp_path, **options) for options in same} == {usual}
    hub = {"hub": "o/n", "revision": REVISION, "file": "a.txt"}
    other = [
        {"seed": 1},
        {"strategy": "diverse"},
        {"layout": "padded"},
        {"layout": "padded", "padding": "left"},
        {"clean": {"remove_urls": True}},
        {"data": hub},
        {"data": {**hub, "revision": "f" * 40}},
        {"data": {**hub, "file": "b.txt"}},
    ]
    keys = {_quantize_key(build, tmp_path, **options) for options in other}
    assert len(keys | {usual}) == len(other) + 1


def test_too_few_windows_of_the_demos_own_texts_are_counted(tmp_path: Path) -> None:
    config = _config(tmp_path, "num_samples: 275")
    (problem,) = _plan(config, tmp_path).config_problems
    assert "give 274 windows of 256 tokens, 275 were asked for" in str(problem)
    assert str(problem).startswith(f"{config}:3: quantize.calibration.data: ")
    assert not _plan(_config(tmp_path, "num_samples: 274"), tmp_path).config_problems


def test_two_ways_to_say_the_same_have_one_key(build: Path, tmp_path: Path) -> None:
    def subset(**quantize: Any) -> dict[str, Any]:
        data = yaml.safe_load(_variant(build, tmp_path, {}).read_text())
        data["quantize"].update(quantize)
        path = tmp_path / "variant.yaml"
        path.write_text(yaml.safe_dump(data))
        return Quantize().config_subset(load_config(path))

    assert subset() == subset(algorithm="awq") != subset(algorithm="gptq")
    assert subset() != subset(group_size=128)
    assert subset(format="fp8") == subset(format="fp8", group_size=128, algorithm="max")
    mixed = {"format": "mixed", "budget": "4.5 bits"}
    assert subset(**mixed) == subset(**mixed, algorithm="awq") != subset(**mixed, group_size=128)
    one, other = "*.down_proj", "model.layers.1.self_attn.*"
    kept = [subset(keep=names) for names in ([one, other], [other, one, one], [one])]
    assert kept[0] == kept[1] != kept[2]


def test_another_script_than_the_held_out_text_is_noted(build: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Слова на другом языке и другими буквами. " * 100)
    (tmp_path / "b.txt").write_text("Words of another language in other letters. " * 100)
    config = _variant(build, tmp_path, {"data": "b.txt"}, data="a.txt")
    (note,) = _plan(config, tmp_path).notes
    assert note.startswith("the calibration text is 100% Cyrillic, the held-out text 100% Latin")
    config = _variant(build, tmp_path, {"data": "b.txt"}, data="b.txt")
    assert _plan(config, tmp_path).notes == ()


def test_a_large_file_is_not_read_to_its_end_by_the_plan(build: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    line = json.dumps({"text": "words " * 1000}) + "\n"
    lines = tmp_path / "a.jsonl"
    lines.write_text(line * (2 * CHECK_BYTES // len(line)) + "wrong\n")
    numbers = [str(number) * 40 for number in range(100_000)]
    pq.write_table(pa.table({"text": numbers}), tmp_path / "a.parquet", compression="none")
    assert (tmp_path / "a.parquet").stat().st_size > CHECK_BYTES
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[1 << 20 : 2 << 20] = bytes(1 << 20)
    (tmp_path / "a.parquet").write_bytes(data)
    for name in ("a.jsonl", "a.parquet"):
        started = time.process_time()
        assert _plan(_variant(build, tmp_path, {}, data=name), tmp_path).problems == ()
        assert time.process_time() - started < 2  # 0.1 to 0.3 s, hashing of the file included
