"""The graphs of ranks, pinned: what goes in and out, what is summed, what they say about themselves.

A Llama of 2 layers, hidden 256, 8 heads and 2 key/value heads of 32, FFN 512, 331 tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.network import BuildLimits
from tests.modelopt_exports import write_plain
from tests.ranks_in_step import export_ranks

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=16)
ALWAYS = {"position_ids": "INT64 B,S", "write_indices": "INT64 B", "kv_lengths": "INT64 B"}
FIRST = {"input_ids": "INT64 B,S"}
LATER = {"hidden_states": "{dtype} B,S,256"}
LAST = {"logit_positions": "INT64 B,M"}
DENSE = "transformer.layers.{}.attention.dense.all_reduce"
PROJ = "transformer.layers.{}.mlp.proj.all_reduce"
# tp, pp, rank -> inputs besides ALWAYS, key/value heads, layers, output, sums, first_layer, first_row.
RANKS: dict[tuple[int, int, int], tuple[Any, int, int, dict[str, str], list[str], int, int]] = {
    (2, 1, 0): (
        {**FIRST, **LAST},
        1,
        2,
        {"logits": "FLOAT B,M,166"},
        ["embedding.all_reduce", DENSE.format(0), PROJ.format(0), DENSE.format(1), PROJ.format(1)],
        0,
        0,
    ),
    (2, 1, 1): (
        {**FIRST, **LAST},
        1,
        2,
        {"logits": "FLOAT B,M,166"},
        ["embedding.all_reduce", DENSE.format(0), PROJ.format(0), DENSE.format(1), PROJ.format(1)],
        0,
        166,
    ),
    (1, 2, 0): (FIRST, 2, 1, {"hidden_states_out": "{dtype} B,S,256"}, [], 0, 0),
    (1, 2, 1): ({**LATER, **LAST}, 2, 1, {"logits": "FLOAT B,M,331"}, [], 1, 0),
    (2, 2, 1): (
        FIRST,
        1,
        1,
        {"hidden_states_out": "{dtype} B,S,256"},
        ["embedding.all_reduce", DENSE.format(0), PROJ.format(0)],
        0,
        0,
    ),
    (2, 2, 3): (
        {**LATER, **LAST},
        1,
        1,
        {"logits": "FLOAT B,M,166"},
        [DENSE.format(0), PROJ.format(0)],
        1,
        166,
    ),
    (4, 1, 3): (
        {**FIRST, **LAST},
        1,
        2,
        {"logits": "FLOAT B,M,83"},
        ["embedding.all_reduce", DENSE.format(0), PROJ.format(0), DENSE.format(1), PROJ.format(1)],
        0,
        249,
    ),
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    directory = tmp_path_factory.mktemp("ranks")
    source = write_plain("LlamaForCausalLM", directory / "source", vocab_size=331)
    found = {}
    for tp, pp in {(tp, pp) for tp, pp, _ in RANKS}:
        paths = export_ranks(source, directory / f"{tp}-{pp}", LIMITS, tp=tp, pp=pp)
        found |= {(tp, pp, rank): path for rank, path in enumerate(paths)}
    return found


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("which", RANKS, ids=lambda which: "tp{}-pp{}-rank{}".format(*which))
def test_a_rank_has_its_part(
    graphs: dict[Any, Path], which: tuple[int, int, int], dtype: str
) -> None:
    inputs, num_kv_heads, num_layers, outputs, sums, first_layer, first_row = RANKS[which]
    path = graphs[which]
    path = path if dtype == "FLOAT" else path.with_name(path.name.replace(".onnx", ".trt.onnx"))
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    caches = [f"{{}}_{part}_{i}" for i in range(num_layers) for part in ("key", "value")]
    cache = f"{dtype} B,{num_kv_heads},32,32"
    assert {value.name: _signature(value) for value in model.graph.input} == {
        **{name: text.format(dtype=dtype) for name, text in {**inputs, **ALWAYS}.items()},
        **{name.format("past"): cache for name in caches},
    }
    assert {value.name: _signature(value) for value in model.graph.output} == {
        **{name: text.format(dtype=dtype) for name, text in outputs.items()},
        **{name.format("present"): cache for name in caches},
    }
    marks = [node.name for node in model.graph.node if node.name.endswith(".all_reduce")]
    assert marks == sums
    operations = Counter(node.op_type for node in model.graph.node)
    assert operations["Identity"] == len(sums) + ("hidden_states_out" in outputs)
    assert operations["Attention"] == num_layers
    properties = {entry.key: entry.value for entry in model.metadata_props}
    tp, pp, rank = which
    assert json.loads(properties["trtpipe.rank"]) == {
        "tp": tp,
        "pp": pp,
        "moe_ep": 1,
        "rank": rank,
        "first_layer": first_layer,
        "vocab_size": 331,
        "first_row": first_row,
    }


def test_biases_come_after_the_sum(tmp_path: Path) -> None:
    """tests/tiny_models.py gives Llama biases everywhere."""
    source = write_plain("LlamaForCausalLM", tmp_path / "source")
    path, _ = export_ranks(source, tmp_path / "ranks", LIMITS, tp=2)
    nodes = {node.name: node for node in onnx.load(str(path), load_external_data=False).graph.node}
    for module in ("attention.dense", "mlp.proj"):
        name = f"transformer.layers.1.{module}"
        assert list(nodes[f"{name}.all_reduce"].input) == [name]
        assert nodes[f"{name}.biased"].input[0] == f"{name}.all_reduce"


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type)} {','.join(sizes)}"
