"""config.pbtxt: written once by hand here, and read through NVIDIA's protobuf schema."""

from __future__ import annotations

import pytest

from pipeline.serving.model_config import parse_pbtxt, to_pbtxt
from pipeline.serving.repository import RepositoryOptions, text_model_config

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

GOLDEN = """\
name: "demo"
backend: "python"
max_batch_size: 1
model_transaction_policy { decoupled: true }
input { name: "text_input" data_type: TYPE_STRING dims: 1 }
input { name: "max_tokens" data_type: TYPE_INT32 dims: 1 }
input { name: "temperature" data_type: TYPE_FP32 dims: 1 optional: true }
input { name: "top_k" data_type: TYPE_INT32 dims: 1 optional: true }
input { name: "top_p" data_type: TYPE_FP32 dims: 1 optional: true }
input { name: "seed" data_type: TYPE_UINT64 dims: 1 optional: true }
input { name: "stop_words" data_type: TYPE_STRING dims: -1 optional: true }
input { name: "stream" data_type: TYPE_BOOL dims: 1 optional: true }
input { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: 1 optional: true }
output { name: "text_output" data_type: TYPE_STRING dims: -1 }
output { name: "finish_reason" data_type: TYPE_STRING dims: 1 }
output { name: "num_input_tokens" data_type: TYPE_INT32 dims: 1 }
output { name: "num_output_tokens" data_type: TYPE_INT32 dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "engine_dir" value { string_value: "engine" } }
parameters { key: "num_slots" value { string_value: "3" } }
parameters { key: "num_threads" value { string_value: "2" } }
"""

OPTIONS = RepositoryOptions(model_name="demo", num_slots=3, num_threads=2)


def test_the_generated_config_means_what_the_golden_one_means() -> None:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    generated = text_format.Parse(to_pbtxt(text_model_config(OPTIONS)), ModelConfig())
    assert generated == text_format.Parse(GOLDEN, ModelConfig())


def test_the_golden_config_reads_back_as_ours() -> None:
    assert parse_pbtxt(GOLDEN, "golden") == text_model_config(OPTIONS)


def test_the_text_is_stable() -> None:
    """Its bytes are part of the serve stage's version: raise that when this has to change."""
    lines = to_pbtxt(text_model_config(RepositoryOptions("demo"))).splitlines()
    assert lines[:11] == [
        'name: "demo"',
        'backend: "python"',
        "max_batch_size: 1",
        "model_transaction_policy {",
        "  decoupled: true",
        "}",
        "input {",
        '  name: "text_input"',
        "  data_type: TYPE_STRING",
        "  dims: [1]",
        "}",
    ]
    assert lines[-8:] == [
        "instance_group {",
        "  count: 1",
        "  kind: KIND_CPU",
        "}",
        "parameters {",
        '  key: "engine_dir"',
        '  value { string_value: "engine" }',
        "}",
    ]
    assert len(lines) == 6 + 2 * 5 + 7 * 6 + 4 * 5 + 4 + 4
