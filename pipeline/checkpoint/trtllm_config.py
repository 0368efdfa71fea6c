"""config.json of a TensorRT-LLM checkpoint.

Only keys that the reader of TensorRT-LLM 1.2.1 knows (PretrainedConfig and the class of the
architecture), none of the leftovers of ModelOpt's exporter; and one of ours in a padded checkpoint,
`unpadded_intermediate_size`. `mapping` holds the three keys that every version from 0.12 on takes, and
two more for a mixture of experts.

TensorRT-LLM cannot load `int4_gptq` (zero points): keys and tensor names are still its own, but the
rank files hold codes and zero points in a layout of ours (`quant.formats`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.layout import local_formats
from pipeline.checkpoint.padding import padding_record
from pipeline.models import ARCHITECTURES, ModelShape, Scope
from pipeline.models.linears import head_rule
from pipeline.models.rules import LAYER
from pipeline.parallel import layers_of_stage
from pipeline.quant.formats import KV_CACHE_ALGOS, QuantFormat

CONFIG_FILE = "config.json"
MATRIX = 2  # dimensions
QUANT_FILE = "quant_cfg.json"
"""Beside it in a checkpoint of MIXED_PRECISION: the format of every quantized linear."""


def trtllm_config(
    shape: ModelShape, fmt: QuantFormat, *, tp: int, pp: int, moe_ep: int = 1
) -> dict[str, Any]:
    """The content of config.json; sizes are global, not per rank."""
    return {
        "architecture": shape.architecture,
        "dtype": "float16",
        # TensorRT-LLM's own default; the logits of a float16 lm_head gain nothing by being cut.
        "logits_dtype": "float32",
        # Never padded here: logits of padding rows are 0 and could win, so the runtime must know them.
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "intermediate_size": shape.padded_intermediate_size or shape.intermediate_size,
        "hidden_act": shape.hidden_act,
        "norm_epsilon": shape.norm_epsilon,
        "max_position_embeddings": shape.max_position_embeddings,
        "position_embedding_type": shape.position_embedding,
        **_rotary(shape),
        "qk_layernorm": shape.qk_norm,
        **shape.config_fields,
        **_windows(shape),
        **_experts(shape),
        **_shared_head(shape, pp),
        # The embedding is cut along the vocabulary, as our rank files are.
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": _mapping(shape, tp, pp, moe_ep),
        "quantization": _quantization(shape, fmt, pp),
        **padding_record(shape),
    }


def write_trtllm_config(path: Path, config: dict[str, Any]) -> None:
    """Writes it as JSON, stable to the byte."""
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rotary(shape: ModelShape) -> dict[str, Any]:
    if not shape.position_embedding.startswith(("rope", "long_rope")):
        return {}
    scaling = shape.rotary_scaling
    fields: dict[str, Any] = {"rotary_base": shape.rotary_base, "rotary_scaling": None}
    if scaling is not None and scaling.kind == "longrope":
        assert scaling.short_factor is not None
        assert scaling.long_factor is not None
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        fields["longrope_scaling_short_factors"] = list(scaling.short_factor)
        fields["longrope_scaling_long_factors"] = list(scaling.long_factor)
    elif scaling is not None:
        fields["rotary_scaling"] = scaling.to_dict()
    return fields


def _windows(shape: ModelShape) -> dict[str, Any]:
    """TensorRT-LLM repeats the list over the layers."""
    if not shape.attention_windows:
        return {}
    return {"runtime_defaults": {"max_attention_window": list(shape.attention_windows)}}


def _experts(shape: ModelShape) -> dict[str, Any]:
    if not shape.num_experts:
        return {}
    return {
        "moe": {
            "num_experts": shape.num_experts,
            "top_k": shape.experts_per_token,
            "normalization_mode": 1,  # the weights of the chosen experts add up to 1
        }
    }


def _shared_head(shape: ModelShape, pp: int) -> dict[str, Any]:
    if not ARCHITECTURES[shape.architecture].shares_head:
        return {}
    return {"share_embedding_table": pp == 1}


def _mapping(shape: ModelShape, tp: int, pp: int, moe_ep: int) -> dict[str, int]:
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    if shape.num_experts:
        mapping |= {"moe_tp_size": tp // moe_ep, "moe_ep_size": moe_ep}
    return mapping


def mixed_config(shape: ModelShape, fmt: QuantFormat, *, pp: int) -> dict[str, Any]:
    """The content of quant_cfg.json; linears that it does not name are plain."""
    head = head_rule(shape)
    modules = _modules(shape, fmt, pp) | {head.target: fmt.of(head.sources[0].name)}
    return {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": _kv_cache_algo(fmt),
        "quantized_layers": {
            module: _algorithm(one) for module, one in modules.items() if one.quant_algo is not None
        },
    }


def _quantization(shape: ModelShape, fmt: QuantFormat, pp: int) -> dict[str, Any]:
    kv_cache = {"kv_cache_quant_algo": _kv_cache_algo(fmt)}
    if fmt.is_mixed or fmt.quant_algo is None:
        return {"quant_algo": fmt.quant_algo} | kv_cache
    plain = []
    if fmt.exceptions:
        modules = _modules(shape, fmt, pp)
        plain = [module for module, one in modules.items() if one.quant_algo is None]
    return {
        "quant_algo": fmt.quant_algo,
        **kv_cache,
        **_algorithm(fmt),
        "exclude_modules": ["lm_head", *plain, *_plain_matrices(shape, pp)],
    }


def _modules(shape: ModelShape, fmt: QuantFormat, pp: int) -> dict[str, QuantFormat]:
    """Every linear of the decoder layers under the name that it has within a stage.

    A mixture of experts is named as a whole, too: TensorRT-LLM reads the format of its parent module.
    """
    modules: dict[str, QuantFormat] = {}
    for local, formats in enumerate(local_formats(shape, fmt, pp)):
        layer = LAYER.format(layer=local)
        modules |= {f"{layer}.{module}": one for module, one in formats.items()}
        if shape.num_experts:
            modules[f"{layer}.mlp"] = formats["mlp.fc"]
    return modules


def _algorithm(fmt: QuantFormat) -> dict[str, Any]:
    fields: dict[str, Any] = {"quant_algo": fmt.quant_algo}
    if fmt.group_size is not None:
        fields |= {
            "group_size": fmt.group_size,
            "has_zero_point": fmt.has_zero_point,
            # Without it TensorRT-LLM makes no parameter for the pre-quant scales of AWQ and rejects
            # the tensors.
            "pre_quant_scale": not fmt.has_zero_point,
        }
    return fields


def _kv_cache_algo(fmt: QuantFormat) -> str | None:
    names = {ours: theirs for theirs, ours in KV_CACHE_ALGOS.items()}
    return names.get(fmt.kv_cache)


def _plain_matrices(shape: ModelShape, pp: int) -> list[str]:
    """Modules of the layers that hold a matrix in float all the same: the routers of experts.

    Numbered within a stage, as TensorRT-LLM compares them; the first stage has the most layers.
    """
    rules = ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAYER)
    return [
        rule.target.format(layer=layer)
        for layer in range(len(layers_of_stage(shape.num_layers, pp, 0)))
        for rule in rules
        if not rule.quantized and len(rule.sources[0].axes) == MATRIX
    ]
