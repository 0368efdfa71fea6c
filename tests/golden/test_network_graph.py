"""The exported network, pinned: change it only together with the version of the build stage.

The weights digest pins every byte of the data file; the graphs are pinned by their inputs, outputs and
operations, because their bytes may change with the onnx library.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import onnx
import pytest

from pipeline.network import (
    BuildLimits,
    cpu_graph_path,
    export_network,
    tensorrt_graph_path,
    weights_path,
)
from pipeline.progress import SilentProgress
from tests.rank_checkpoints import write_random_rank

WEIGHTS_SHA256 = {
    False: "4d077191595c481bc4ab1dca71f7e4b8dd052209628f5b7630f62a69f8f62e97",
    True: "91f1abffd72e8476c7f86dd35084994595962a841fc18e4f526dca0a87b0576a",
}
# Per layer, and once per network, without casts.
LAYER_OPS = {
    "RMSNormalization": 2,
    "MatMul": 5,
    "Reshape": 2,
    "Transpose": 2,
    "Split": 1,
    "RotaryEmbedding": 2,
    "TensorScatter": 2,
    "Attention": 1,
    "Sigmoid": 1,
    "Mul": 3,  # query scale, silu, gate
    "Add": 2,
}
ONCE_OPS = {
    "Gather": 1,
    "Unsqueeze": 1,
    "GatherND": 1,
    "RMSNormalization": 1,
    "MatMul": 1,
    "Transpose": 1,  # lm_head
}
QUANTIZED_OPS = {"DequantizeLinear": 5, "Mul": 4}  # four of five pre-quant scales are not ones


@pytest.fixture(scope="module", params=[False, True], ids=["fp16", "int4"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, Path]:
    directory = tmp_path_factory.mktemp("golden")
    checkpoint = write_random_rank(directory / "checkpoint", quantized=request.param)
    limits = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=16)
    export_network(checkpoint, 0, directory, limits, SilentProgress())
    return request.param, directory


def test_the_weights_file_is_as_it_was(exported: tuple[bool, Path]) -> None:
    quantized, directory = exported
    digest = hashlib.sha256(weights_path(directory, 0).read_bytes()).hexdigest()
    assert digest == WEIGHTS_SHA256[quantized]


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
def test_inputs_and_outputs_are_the_contract(exported: tuple[bool, Path], dtype: str) -> None:
    _, directory = exported
    cache = f"{dtype} B,2,32,64"
    expected_inputs = {
        "input_ids": "INT64 B,S",
        "position_ids": "INT64 B,S",
        "write_indices": "INT64 B",
        "kv_lengths": "INT64 B",
        "logit_positions": "INT64 B,M",
        "past_key_0": cache,
        "past_value_0": cache,
        "past_key_1": cache,
        "past_value_1": cache,
    }
    expected_outputs = {
        "logits": "FLOAT B,M,300",
        "present_key_0": cache,
        "present_value_0": cache,
        "present_key_1": cache,
        "present_value_1": cache,
    }
    graph = _model(directory, dtype).graph
    assert {value.name: _signature(value) for value in graph.input} == expected_inputs
    assert {value.name: _signature(value) for value in graph.output} == expected_outputs


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
def test_operations_are_as_they_were(exported: tuple[bool, Path], dtype: str) -> None:
    quantized, directory = exported
    model = _model(directory, dtype)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    expected: Counter[str] = Counter(ONCE_OPS)
    for _ in range(2):
        expected.update(LAYER_OPS)
        expected.update(QUANTIZED_OPS if quantized else {"Transpose": 5})
    found = Counter(node.op_type for node in model.graph.node)
    casts = found.pop("Cast")
    assert found == expected
    if dtype == "FLOAT16":
        assert casts == 1  # logits
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in attention:
        values = {field.name: onnx.helper.get_attribute_value(field) for field in node.attribute}
        assert values == {"is_causal": 1, "scale": 1.0}
        assert list(node.input)[3:] == ["", "", "", "kv_lengths"]


def _model(directory: Path, dtype: str) -> onnx.ModelProto:
    path = cpu_graph_path(directory, 0) if dtype == "FLOAT" else tensorrt_graph_path(directory, 0)
    return onnx.load(str(path), load_external_data=False)


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type)} {','.join(sizes)}"
