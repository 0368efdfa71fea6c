"""Device memory beside weights and KV cache: activations at the largest shapes, and the runtime.

Both are estimates. That of activations is what TensorRT-RTX 1.7.1 reports for engines of several
shapes (benchmarks/plan_against_reality.py compares them); other compilers plan their memory otherwise.
What a CUDA context, kernels and communication buffers take was never measured here: `OVERHEAD_BYTES`
is an assumption.
"""

from __future__ import annotations

from typing import Final

from pipeline.forecast.subject import Subject
from pipeline.models import ModelShape
from pipeline.parallel import Mapping

OVERHEAD_BYTES: Final = 600 * 1024**2
"""An assumption: a CUDA context with its libraries, and kernels that are compiled when loading."""
COMMUNICATION_BYTES: Final = 300 * 1024**2
"""An assumption: buffers of NCCL, where ranks add up or pass on activations."""
CODE_BYTES_PER_LAYER: Final = 1_000_000
"""What a TensorRT-RTX plan holds beside its weights."""
WORKSPACE_BYTES: Final = 8 * 1024**2
"""What engines of any size report."""
_HALF = 2


def activation_bytes(subject: Subject, mapping: Mapping) -> int:
    """Estimate for a call of the most tokens.

    Fitted to TensorRT-RTX: twice the hidden state and three times the inner values of the feed-forward
    network (both branches and their product) in float16, and a workspace.
    """
    shape = subject.shape
    ffn = _ffn_width(shape, mapping)
    values = max(
        2 * shape.hidden_size + 3 * ffn, 2 * shape.hidden_size + 2 * _heads_width(shape, mapping)
    )
    return WORKSPACE_BYTES + subject.num_tokens * _HALF * values + _logits_bytes(subject, mapping)


def overhead_bytes(subject: Subject) -> int:
    """What the runtime takes beside the engine's own memory: an assumption."""
    layers = -(-subject.shape.num_layers // subject.pp)
    communication = COMMUNICATION_BYTES if subject.world_size > 1 else 0
    return OVERHEAD_BYTES + communication + layers * CODE_BYTES_PER_LAYER


def kv_heads(shape: ModelShape, tp: int) -> int:
    """KV heads of a rank: repeated where there are fewer than ranks."""
    return max(1, shape.num_kv_heads // tp)


def _heads_width(shape: ModelShape, mapping: Mapping) -> int:
    """Channels of the fused query, key and value."""
    heads = shape.num_heads // mapping.tp + 2 * kv_heads(shape, mapping.tp)
    return heads * shape.head_size


def _ffn_width(shape: ModelShape, mapping: Mapping) -> int:
    """Inner channels of a rank: of a dense network, or of one expert."""
    width = shape.padded_intermediate_size or shape.intermediate_size
    return width // (mapping.moe_tp if shape.num_experts else mapping.tp)


def _logits_bytes(subject: Subject, mapping: Mapping) -> int:
    """float32 logits of one position of every row, on the last stage."""
    if mapping.pp_rank != mapping.pp - 1:
        return 0
    return 4 * subject.limits.max_batch_size * -(-subject.shape.vocab_size // mapping.tp)
