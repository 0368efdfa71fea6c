"""What a config.json and a rank file of several ranks must say, and who refuses a rank alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.errors import CheckpointError, GateError
from pipeline.network import BuildLimits, export_network
from pipeline.network.modules import layer_modules
from pipeline.network.spec import NetworkSpec
from pipeline.network.spec_reader import read_spec
from pipeline.progress import SilentProgress
from tests.modelopt_exports import write_plain
from tests.rank_checkpoints import write_random_rank
from tests.ranks_in_step import export_ranks

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=16)
LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 331,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
}
MIXTRAL = {
    **LLAMA,
    "architecture": "MixtralForCausalLM",
    "hidden_act": "swiglu",
    "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 1},
}


def spec_of(
    fields: dict[str, Any], rank: int = 0, *, cut: bool = True, **mapping: int
) -> NetworkSpec:
    config = {**fields, "mapping": mapping, "use_parallel_embedding": cut}
    return read_spec(config, "config.json", rank)


def problems_of(fields: dict[str, Any], rank: int = 0, **mapping: int) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        spec_of(fields, rank, **mapping)
    return [str(problem).removeprefix("config.json: ") for problem in caught.value.problems]


def test_a_rank_has_its_share_of_everything() -> None:
    spec = spec_of(LLAMA, 6, tp_size=4, pp_size=2)
    assert (spec.mapping.tp_rank, spec.mapping.pp_rank) == (2, 1)
    assert (spec.rank_heads, spec.rank_kv_heads, spec.rank_intermediate_size) == (2, 1, 128)
    assert (spec.rank_layers, spec.has_embedding, spec.has_head) == (range(3, 5), False, True)
    assert (spec.hidden_size, spec.num_heads, spec.vocab_size) == (256, 8, 331)


def test_experts_are_numbered_in_the_model_and_stacked_on_the_rank() -> None:
    spec = spec_of(MIXTRAL, 3, tp_size=4, moe_tp_size=2, moe_ep_size=2)
    assert (spec.rank_experts, spec.rank_intermediate_size) == (range(4, 8), 256)
    mlps = layer_modules(spec, 0).mlps
    assert [mlp.proj.module.rpartition("mlp.")[2] for mlp in mlps] == [
        f"experts.{expert}.proj" for expert in range(4, 8)
    ]
    assert [mlp.proj.expert for mlp in mlps] == [0, 1, 2, 3]
    name = "transformer.layers.0.mlp.proj.bias"
    # Two ranks share an expert: the bias would be added twice.
    assert name not in mlps[0].proj.optional()
    whole = spec_of(MIXTRAL, 3, tp_size=4, moe_ep_size=4)
    assert name in layer_modules(whole, 0).mlps[0].proj.optional()


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({}, (4, 1)),
        ({"moe_tp_size": -1, "moe_ep_size": -1}, (4, 1)),
        ({"moe_ep_size": 2}, (2, 2)),
        ({"moe_tp_size": 1}, (1, 4)),
    ],
)
def test_sizes_of_a_mixture_follow_from_each_other(
    moe: dict[str, int], expected: tuple[int, int]
) -> None:
    mapping = spec_of(MIXTRAL, tp_size=4, **moe).mapping
    assert (mapping.moe_tp, mapping.moe_ep) == expected


@pytest.mark.parametrize(
    ("fields", "rank", "mapping", "problem"),
    [
        (LLAMA, 4, {"tp_size": 2, "pp_size": 2}, "mapping: there is no rank 4; allowed: 0 to 3"),
        (
            LLAMA,
            0,
            {"tp_size": 2, "world_size": 4},
            "mapping: world_size is 4, but tp_size 2 x pp_size 1 is 2; allowed: 2",
        ),
        (
            LLAMA,
            0,
            {"tp_size": 0},
            "mapping: tp_size is 0; allowed: an integer, 1 or more",
        ),
        (
            LLAMA,
            0,
            {"tp_size": 2, "cp_size": 2},
            "mapping: cp_size is 2; allowed: 1",
        ),
        (
            LLAMA,
            0,
            {"pp_size": 6},
            "mapping.pp_size is 6, but there are 5 layers; allowed: 1 to 5",
        ),
        (
            MIXTRAL,
            0,
            {"tp_size": 4, "moe_tp_size": 4, "moe_ep_size": 2},
            "mapping: moe_tp_size 4 x moe_ep_size 2 is 8; allowed: tp_size 4",
        ),
        (
            {**MIXTRAL, "moe": {"num_experts": 6, "top_k": 2, "normalization_mode": 1}},
            0,
            {"tp_size": 4, "moe_ep_size": 4},
            "mapping.moe_ep_size is 4, but there are 6 experts; allowed: a divisor of their number",
        ),
        (
            {**LLAMA, "intermediate_size": 511},
            0,
            {"tp_size": 2},
            "intermediate_size 511 cannot be shared out evenly over tp=2",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_named(
    fields: dict[str, Any], rank: int, mapping: dict[str, int], problem: str
) -> None:
    assert problems_of(fields, rank, **mapping) == [problem]


def test_every_size_that_does_not_divide_is_named() -> None:
    assert problems_of(LLAMA, tp_size=3) == [
        "num_attention_heads 8 cannot be shared out evenly over tp=3",
        "num_key_value_heads 2 cannot be shared out evenly over tp=3",
        "intermediate_size 512 cannot be shared out evenly over tp=3",
    ]


def test_tables_cut_by_columns_are_refused() -> None:
    assert problems_of({**LLAMA, "embedding_sharding_dim": 1}, tp_size=2) == [
        "embedding_sharding_dim is 1; allowed: 0"
    ]
    # One rank has the whole table, however it would be cut.
    spec_of({**LLAMA, "embedding_sharding_dim": 1}, tp_size=1)


@pytest.mark.parametrize(
    ("mapping", "cut", "shared"),
    [
        ({"tp_size": 1}, True, True),
        ({"tp_size": 2}, True, True),
        ({"tp_size": 2}, False, False),
        ({"tp_size": 2, "pp_size": 2}, True, False),
    ],
)
def test_a_table_is_shared_only_where_both_uses_have_the_same_rows(
    mapping: dict[str, int], cut: bool, shared: bool
) -> None:
    fields = {**LLAMA, "share_embedding_table": True}
    assert spec_of(fields, cut=cut, **mapping).shared_embedding is shared


def test_a_file_of_another_rank_does_not_fit(tmp_path: Path) -> None:
    """Rank 0 of one, called rank 0 of two."""
    mapping = {"world_size": 2, "tp_size": 2, "pp_size": 1}
    checkpoint = write_random_rank(tmp_path / "c", quantized=False, config={"mapping": mapping})
    with pytest.raises(CheckpointError) as caught:
        export_network(checkpoint, 0, tmp_path, LIMITS, SilentProgress())
    lines = [str(problem).partition("safetensors: ")[2] for problem in caught.value.problems]
    assert (
        "transformer.layers.0.attention.qkv.weight: is F16 [512, 256]; allowed: F16 [256, 256]"
        in (lines)
    )
    assert (
        "transformer.layers.1.mlp.proj.weight: is F16 [256, 512]; allowed: F16 [256, 256]" in lines
    )


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    mapping = {"world_size": 2, "tp_size": 2, "pp_size": 1}
    checkpoint = write_random_rank(tmp_path / "c", quantized=False, config={"mapping": mapping})
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors: no such file; fix: convert"):
        export_network(checkpoint, 1, tmp_path, LIMITS, SilentProgress())


def test_one_rank_of_several_is_not_run_as_the_whole(tmp_path: Path) -> None:
    source = write_plain("LlamaForCausalLM", tmp_path / "source")
    path, _ = export_ranks(source, tmp_path / "ranks", LIMITS, tp=2)
    with pytest.raises(GateError) as caught:
        OnnxNetwork(path.parent, 0)
    assert str(caught.value) == (
        f"{path}: is rank 0 of 2; one process runs an engine of one rank; fix: build with tp: 1 and "
        "pp: 1, or let `verify` run the ranks under mpirun"
    )


def test_later_stages_without_positions_do_not_ask_for_them(tmp_path: Path) -> None:
    """TensorRT refuses inputs that nothing reads; GPT-2 adds its positions in the first stage."""
    import onnx

    source = write_plain("GPT2LMHeadModel", tmp_path / "source")
    paths = export_ranks(source, tmp_path / "ranks", LIMITS, pp=2)
    names = [
        [value.name for value in onnx.load(str(path), load_external_data=False).graph.input]
        for path in paths
    ]
    assert "position_ids" in names[0]
    assert names[1][:4] == ["hidden_states", "write_indices", "kv_lengths", "logit_positions"]
    assert json.loads((tmp_path / "ranks/checkpoint/config.json").read_text())["mapping"] == {
        "world_size": 2,
        "tp_size": 1,
        "pp_size": 2,
    }
