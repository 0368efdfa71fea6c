"""Where TensorRT-LLM's own modules would compute something else than config.json says, and say nothing.

Only for those who load the rank files there; the engines of this project compute what is written. Read
in the sources of the TensorRT engine workflow: models/gptneox, models/falcon and models/phi3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EPSILON = 1e-5


def upstream_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """One sentence for each field of a TensorRT-LLM config.json that its module does not read."""
    name = config.get("architecture")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    notes = []
    if name == "GPTNeoXForCausalLM" and config.get("intermediate_size") != 4 * (hidden or 0):
        notes.append(
            f"intermediate_size {config.get('intermediate_size')}: TensorRT-LLM's GPT-NeoX always has "
            f"4 x hidden_size and does not fit these weights"
        )
    epsilon = config.get("norm_epsilon")
    if name in _FIXED_EPSILON and epsilon != _EPSILON:
        notes.append(
            f"norm_epsilon {epsilon}: TensorRT-LLM computes {_FIXED_EPSILON[name]} with {_EPSILON:g}, "
            "so its logits are slightly different"
        )
    head_size = config.get("head_size")
    if name == "Phi3ForCausalLM" and (head_size or 0) * (heads or 0) != hidden:
        notes.append(
            f"head_size {head_size}: TensorRT-LLM's Phi-3 takes hidden_size / num_attention_heads and "
            "does not fit these weights"
        )
    return tuple(notes)


_FIXED_EPSILON = {
    "GPTNeoXForCausalLM": "every norm of GPT-NeoX",
    "FalconForCausalLM": "the last norm of Falcon, and without parallel attention that of the MLP,",
}
