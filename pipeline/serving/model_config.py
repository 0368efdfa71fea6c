"""Triton's config.pbtxt as typed models: written from them, and read back through Triton's own schema.

A placeholder that nobody filled, a misspelt field or an output without a name fails here, with a line
number, instead of in the log of a server that does not start.
"""

from __future__ import annotations

import json
from collections import Counter
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import GateError, Problem, ToolError
from pipeline.names import MODEL_NAME


class DataType(str, Enum):
    """The data types of Triton's schema that text models need."""

    BOOL = "TYPE_BOOL"
    INT32 = "TYPE_INT32"
    UINT64 = "TYPE_UINT64"
    FP32 = "TYPE_FP32"
    STRING = "TYPE_STRING"


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorConfig(_Message):
    """One input or output; -1 is a dimension of any length. `optional` is for inputs only."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    data_type: DataType
    dims: Annotated[tuple[int, ...], Field(min_length=1)]
    optional: bool = False

    @model_validator(mode="after")
    def _dims_are_lengths(self) -> TensorConfig:
        if any(dim < 1 and dim != -1 for dim in self.dims):
            raise ValueError(f"{self.name}: dims {list(self.dims)}; allowed: 1 or more, or -1")
        return self


class ModelConfig(_Message):
    """The part of Triton's ModelConfig that our models use; one CPU instance each.

    Attributes:
        name: also the name of the model's directory.
        backend: Triton backend, e.g. "python".
        max_batch_size: rows of one request; tensors then have a leading batch dimension.
        decoupled: a request may get any number of responses, as streaming needs.
        inputs: in the order they are written.
        outputs: likewise.
        parameters: key -> text, handed to the model.
    """

    name: str
    backend: str
    max_batch_size: Annotated[int, Field(ge=0)]
    decoupled: bool
    inputs: Annotated[tuple[TensorConfig, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorConfig, ...], Field(min_length=1)]
    parameters: dict[str, str] = {}

    @model_validator(mode="after")
    def _is_servable(self) -> ModelConfig:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(f"model name {self.name!r}; allowed: letters, digits, . _ -")
        counts = Counter(tensor.name for tensor in (*self.inputs, *self.outputs))
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"tensor names used twice: {', '.join(repeated)}")
        if any(tensor.optional for tensor in self.outputs):
            raise ValueError("an output cannot be optional")
        unfilled = [key for key, value in self.parameters.items() if "${" in value]
        if unfilled:
            raise ValueError(f"parameters with an unfilled placeholder: {', '.join(unfilled)}")
        return self


def to_pbtxt(config: ModelConfig) -> str:
    """The text of config.pbtxt."""
    lines = [
        f"name: {_quoted(config.name)}",
        f"backend: {_quoted(config.backend)}",
        f"max_batch_size: {config.max_batch_size}",
        "model_transaction_policy {",
        f"  decoupled: {_word(config.decoupled)}",
        "}",
    ]
    for tensor in config.inputs:
        lines += _tensor_lines("input", tensor)
    for tensor in config.outputs:
        lines += _tensor_lines("output", tensor)
    lines += ["instance_group {", "  count: 1", "  kind: KIND_CPU", "}"]
    for key, value in sorted(config.parameters.items()):
        lines += [
            "parameters {",
            f"  key: {_quoted(key)}",
            f"  value {{ string_value: {_quoted(value)} }}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def parse_pbtxt(text: str, where: str) -> ModelConfig:
    """Read a config.pbtxt through the protobuf schema that tritonclient ships.

    Args:
        text: content of the file.
        where: its path, for errors.

    Raises:
        GateError: not of Triton's schema (with line and column), or not what our models are.
        ToolError: tritonclient is not installed.
    """
    message = _parse_message(text, where)
    unexpected = [
        field.name for field, _ in message.ListFields() if field.name not in _KNOWN_FIELDS
    ]
    if unexpected:
        raise GateError(
            Problem(where, f"unexpected fields: {', '.join(unexpected)}", ", ".join(_KNOWN_FIELDS))
        )
    instances = [(group.count, group.Kind.Name(group.kind)) for group in message.instance_group]
    if instances != [(1, "KIND_CPU")]:
        raise GateError(Problem(where, f"instances {instances}", "one instance of KIND_CPU"))
    try:
        return ModelConfig(
            name=message.name,
            backend=message.backend,
            max_batch_size=message.max_batch_size,
            decoupled=message.model_transaction_policy.decoupled,
            inputs=tuple(_tensor(tensor, optional=tensor.optional) for tensor in message.input),
            outputs=tuple(_tensor(tensor, optional=False) for tensor in message.output),
            parameters={key: value.string_value for key, value in message.parameters.items()},
        )
    except ValueError as error:  # pydantic's ValidationError is one
        raise GateError(Problem(where, f"not a model of this program: {error}")) from error


_KNOWN_FIELDS = (
    "name",
    "backend",
    "max_batch_size",
    "model_transaction_policy",
    "input",
    "output",
    "instance_group",
    "parameters",
)


def _parse_message(text: str, where: str) -> Any:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise ToolError(
            Problem(
                where="tritonclient",
                what=f"cannot be imported: {error}",
                fix="pip install 'trtpipe[triton]'",
            )
        ) from error
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise GateError(Problem(where, f"not Triton's schema: {error}")) from error


def _tensor(message: Any, *, optional: bool) -> TensorConfig:
    number = message.data_type
    name = message.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[number].name
    return TensorConfig(
        name=message.name, data_type=DataType(name), dims=tuple(message.dims), optional=optional
    )


def _tensor_lines(kind: str, tensor: TensorConfig) -> list[str]:
    lines = [
        f"{kind} {{",
        f"  name: {_quoted(tensor.name)}",
        f"  data_type: {tensor.data_type.value}",
        f"  dims: {list(tensor.dims)}",
    ]
    if tensor.optional:
        lines.append("  optional: true")
    return [*lines, "}"]


def _quoted(text: str) -> str:
    """A protobuf text-format string; its escapes include those that JSON uses here."""
    return json.dumps(text, ensure_ascii=False)


def _word(value: bool) -> str:
    return "true" if value else "false"
