"""config.json of a TensorRT-LLM checkpoint.

Only keys that the reader of TensorRT-LLM 1.2.1 knows (PretrainedConfig and LLaMAConfig), none of the
leftovers of ModelOpt's exporter. `mapping` holds the three keys that every version from 0.12 on takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.models import ModelShape
from pipeline.quant.formats import QuantFormat

CONFIG_FILE = "config.json"


def trtllm_config(shape: ModelShape, fmt: QuantFormat, *, tp: int, pp: int) -> dict[str, Any]:
    """The content of config.json; sizes are global, not per rank."""
    scaling = shape.rotary_scaling
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
        "intermediate_size": shape.intermediate_size,
        "hidden_act": shape.hidden_act,
        "norm_epsilon": shape.norm_epsilon,
        "max_position_embeddings": shape.max_position_embeddings,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": shape.rotary_base,
        "rotary_scaling": None if scaling is None else scaling.to_dict(),
        "qk_layernorm": False,
        "attn_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        # The embedding is cut along the vocabulary, as our rank files are.
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": _quantization(fmt),
    }


def write_trtllm_config(path: Path, config: dict[str, Any]) -> None:
    """Writes it as JSON, stable to the byte."""
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _quantization(fmt: QuantFormat) -> dict[str, Any]:
    if fmt.quant_algo is None:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    return {
        "quant_algo": fmt.quant_algo,
        "kv_cache_quant_algo": None,
        "group_size": fmt.group_size,
        "has_zero_point": False,
        # Without it TensorRT-LLM makes no parameter for the pre-quant scales and rejects the tensors.
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }
