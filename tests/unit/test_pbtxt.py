"""The typed config.pbtxt: round trips, and every mistake that it catches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import GateError
from pipeline.serving.model_config import (
    DataType,
    ModelConfig,
    TensorConfig,
    parse_pbtxt,
    to_pbtxt,
)

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

TEXT = TensorConfig(name="text", data_type=DataType.STRING, dims=(1,))
ANSWER = TensorConfig(name="answer", data_type=DataType.STRING, dims=(-1,))


def _config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "name": "m",
        "backend": "python",
        "max_batch_size": 1,
        "decoupled": True,
        "inputs": (TEXT,),
        "outputs": (ANSWER,),
    }
    return ModelConfig(**{**fields, **changes})


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
dims = st.lists(st.one_of(st.just(-1), st.integers(1, 2**40)), min_size=1, max_size=4).map(tuple)
tensor = st.builds(TensorConfig, name=names, data_type=st.sampled_from(DataType), dims=dims)
values = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda text: "${" not in text)


@given(
    tensors=st.lists(tensor, min_size=2, max_size=6, unique_by=lambda one: one.name),
    optional=st.booleans(),
    decoupled=st.booleans(),
    max_batch_size=st.integers(0, 2**31 - 1),
    parameters=st.dictionaries(names, values, max_size=4),
)
def test_whatever_is_written_reads_back(
    tensors: list[TensorConfig],
    optional: bool,
    decoupled: bool,
    max_batch_size: int,
    parameters: dict[str, str],
) -> None:
    config = _config(
        inputs=tuple(one.model_copy(update={"optional": optional}) for one in tensors[1:]),
        outputs=(tensors[0],),
        decoupled=decoupled,
        max_batch_size=max_batch_size,
        parameters=parameters,
    )
    assert parse_pbtxt(to_pbtxt(config), "here") == config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": ""}, "model name ''; allowed: letters, digits, . _ -"),
        ({"name": "a/b"}, "model name 'a/b'; allowed"),
        ({"name": "../m"}, "model name '../m'; allowed"),
        ({"inputs": ()}, "at least 1 item"),
        ({"outputs": ()}, "at least 1 item"),
        ({"inputs": (TEXT, TEXT)}, "tensor names used twice: text"),
        (
            {"outputs": (ANSWER, TEXT)},
            "tensor names used twice: text",
        ),
        (
            {"outputs": (ANSWER.model_copy(update={"optional": True}),)},
            "an output cannot be optional",
        ),
        ({"max_batch_size": -1}, "greater than or equal to 0"),
        (
            {"parameters": {"engine_dir": "${engine_dir}"}},
            "parameters with an unfilled placeholder: engine_dir",
        ),
        ({"platform": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_served_cannot_be_made(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _config(**changes)
    assert reason in str(caught.value)


@pytest.mark.parametrize("dims", [(), (0,), (-2,), (1, 0)])
def test_dims_are_lengths(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        TensorConfig(name="x", data_type=DataType.INT32, dims=dims)


GOOD = to_pbtxt(_config())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("max_batch_size", "max_bach_size", r'3:1 : .*has no field named "max_bach_size"'),
        ("TYPE_STRING", "TYPE_TEXT", r"9:14 : .*no value named TYPE_TEXT"),
        ("max_batch_size: 1", "max_batch_size: ${size}", r"3:17 : .*Couldn't parse integer: \$"),
        ('name: "m"', 'name: "m"\nname: "n"', r'2:7 : .*multiple "name" fields'),
    ],
)
def test_a_mistake_has_line_and_column(old: str, new: str, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(GateError, match=f"^there: not Triton's schema: {reason}"):
        parse_pbtxt(GOOD.replace(old, new, 1), "there")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "KIND_CPU",
            "KIND_GPU",
            r"instances \[\(1, 'KIND_GPU'\)\]; allowed: one instance of KIND_CPU",
        ),
        ("count: 1", "count: 4", r"instances \[\(4, 'KIND_CPU'\)\]"),
        (
            'backend: "python"',
            'backend: "python" dynamic_batching { }',
            r"unexpected fields: dynamic_",
        ),
        ("TYPE_STRING", "TYPE_BF16", r"not a model of this program: 'TYPE_BF16' is not a valid"),
        ('"text"', '"${text}"', r"not a model of this program: "),
        ('"answer"', '"text"', r"tensor names used twice: text"),
    ],
)
def test_schema_is_not_all_that_counts(old: str, new: str, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(GateError, match=reason):
        parse_pbtxt(GOOD.replace(old, new, 1), "there")


def test_without_tritonclient_the_fix_is_named() -> None:
    program = """
import sys
sys.modules["tritonclient"] = None
from pipeline.errors import ToolError
from pipeline.serving.model_config import parse_pbtxt
try:
    parse_pbtxt("", "there")
except ToolError as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert output.startswith("tritonclient: cannot be imported: ")
    assert output.endswith("fix: pip install 'trtpipe[triton]'\n")
