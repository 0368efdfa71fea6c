"""Names of the network's inputs and outputs, the same in both graphs.

Shapes: B rows, S tokens per row in this call, M positions that get logits, V vocabulary,
C key/value heads, T cache positions (max_seq_len, static), D head size.
"""

from __future__ import annotations

INPUT_IDS = "input_ids"  # int64 [B, S]
POSITION_IDS = "position_ids"  # int64 [B, S]: the cache position of each token
WRITE_INDICES = "write_indices"  # int64 [B]: first cache position written in each row
KV_LENGTHS = "kv_lengths"  # int64 [B]: valid cache length after the write
LOGIT_POSITIONS = "logit_positions"  # int64 [B, M]: which of the S positions get logits
LOGITS = "logits"  # float32 [B, M, V]


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """((past_key, present_key), (past_value, present_value)) of a layer, each [B, C, T, D].

    float32 in the CPU graph, float16 in TensorRT's.
    """
    return (
        (f"past_key_{layer}", f"present_key_{layer}"),
        (f"past_value_{layer}", f"present_value_{layer}"),
    )
