"""config.json of a TensorRT-LLM checkpoint -> NetworkSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.network.config_fields import ConfigFields
from pipeline.network.features import read_features
from pipeline.network.mapping_reader import check_mapping, read_mapping
from pipeline.network.spec import NetworkSpec
from pipeline.quant.formats import FORMATS, QuantFormat

QUANTIZED_LAYERS = "quantized_layers"
"""Of quant_cfg.json, which `read_spec` expects within the config's `quantization`."""
# Applied by TensorRT-LLM when exclude_modules is null; a list given replaces them.
DEFAULT_EXCLUDED_MODULES = ("*lm_head", "*vocab_embedding", "*position_embedding", "*router")


def read_spec(config: Mapping[str, Any], where: str, rank: int = 0) -> NetworkSpec:
    """NetworkSpec of one rank by a checkpoint's config.json; `where` names the file in errors.

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
    mapping = read_mapping(fields, rank)
    cut_embedding = mapping.tp > 1 and fields.flag("use_parallel_embedding")
    if cut_embedding:
        fields.only("embedding_sharding_dim", (0,))
    # Where both tables lie on one rank, cut alike.
    can_share = mapping.pp == 1 and (mapping.tp == 1 or cut_embedding)
    shares = fields.flag("share_embedding_table") or fields.flag("tie_word_embeddings")
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
        format=(fmt := _read_format(quantization)),
        excluded_modules=_usually_excluded(fmt) if excluded is None else tuple(excluded),
        shared_embedding=shares and can_share,
        features=read_features(fields, head_size),
        mapping=mapping,
        cut_embedding=cut_embedding,
    )
    experts = spec.features.experts
    check_mapping(
        fields,
        mapping,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_experts=0 if experts is None else experts.num_experts,
    )
    fields.finish()
    return spec


def _usually_excluded(fmt: QuantFormat) -> tuple[str, ...]:
    """In a mixed checkpoint nothing is quantized that is not named, lm_head included."""
    return () if fmt.is_mixed else DEFAULT_EXCLUDED_MODULES


def _read_format(quantization: ConfigFields) -> QuantFormat:
    """Of all linears; in MIXED_PRECISION, of each that `quantized_layers` names.

    GPTQ without zero points is written as W4A16_AWQ, which is the same layout.
    """
    known = {fmt.quant_algo: fmt for fmt in FORMATS.values()}
    fmt = quantization.choice("quant_algo", known, default=None)
    quantization.only("has_zero_point", (fmt.has_zero_point,))
    if fmt.group_size is not None:
        fmt = fmt.with_group_size(quantization.size("group_size", 128))
    if not fmt.is_mixed:
        return fmt
    layers = quantization.section(QUANTIZED_LAYERS)
    return fmt.with_exceptions({name: _read_format(layers.section(name)) for name in layers.names})
