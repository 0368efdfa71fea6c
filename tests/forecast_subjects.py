"""What is forecast in tests: well-known models by config.json of their public repositories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.forecast.subject import Subject
from pipeline.models import shape_from_hf
from pipeline.network.limits import BuildLimits
from pipeline.quant.formats import FORMATS
from pipeline.targets import TARGETS


def llama(
    hidden: int, ffn: int, heads: int, kv_heads: int, layers: int, vocab: int
) -> dict[str, Any]:
    """The fields of a Llama that decide sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


LLAMA_2_7B = llama(4096, 11008, 32, 32, 32, 32000)
LLAMA_2_13B = llama(5120, 13824, 40, 40, 40, 32000)
LLAMA_2_70B = llama(8192, 28672, 64, 8, 80, 32000)
LLAMA_31_8B = llama(4096, 14336, 32, 8, 32, 128256)


def subject_of(shape: dict[str, Any], **changes: Any) -> Subject:
    """A model in int4 for one RTX 4090, but for `changes`."""
    usual = Subject(
        shape=shape_from_hf(shape),
        format=FORMATS["int4_awq"],
        tp=1,
        pp=1,
        moe_ep=1,
        limits=BuildLimits(max_batch_size=4, max_seq_len=4096, max_input_len=2048),
        backend="tensorrt_rtx",
        target=TARGETS["rtx4090"],
    )
    return replace(usual, **changes)
