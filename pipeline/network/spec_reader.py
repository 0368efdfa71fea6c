"""config.json of a TensorRT-LLM checkpoint -> NetworkSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.network.config_fields import ConfigFields
from pipeline.network.families import read_features
from pipeline.network.spec import NetworkSpec

# Applied by TensorRT-LLM when exclude_modules is null; a list given replaces them.
DEFAULT_EXCLUDED_MODULES = ("*lm_head", "*vocab_embedding", "*position_embedding", "*router")


def read_spec(config: Mapping[str, Any], where: str) -> NetworkSpec:
    """NetworkSpec of a checkpoint's config.json; `where` names the file in errors.

    Raises:
        CheckpointError: every missing field and every value that is not implemented, at once.
    """
    fields = ConfigFields(config, where)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    head_size = fields.size("head_size", max(hidden_size // num_heads, 1))
    if fields.problems:
        head_size = 2  # a placeholder that causes no problems of its own
    elif num_heads % num_kv_heads:
        fields.refuse(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    if fields.get("dtype") is None:
        fields.refuse("dtype is missing", "float16")
    fields.only("dtype", ("float16",))
    quantization = fields.section("quantization")
    quantization.only("kv_cache_quant_algo", (None,))
    excluded = quantization.get("exclude_modules")
    world_size = fields.section("mapping").size("world_size", 1)
    if world_size != 1:
        fields.refuse(f"mapping.world_size is {world_size}", "1: tp and pp are not built yet")
    spec = NetworkSpec(
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_epsilon=fields.number("norm_epsilon", 1e-5),
        quant_algo=quantization.choice(
            "quant_algo", {name: name for name in (None, "W4A16_AWQ", "W4A16_GPTQ")}, default=None
        ),
        group_size=quantization.size("group_size", 128),
        excluded_modules=DEFAULT_EXCLUDED_MODULES if excluded is None else tuple(excluded),
        shared_embedding=fields.flag("share_embedding_table") or fields.flag("tie_word_embeddings"),
        features=read_features(fields, head_size),
    )
    # GPTQ without zero points is written as W4A16_AWQ, which is the same layout.
    quantization.only("has_zero_point", (spec.asymmetric,))
    fields.finish()
    return spec
