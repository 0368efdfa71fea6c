"""Names of the network's inputs and outputs, the same in both graphs.

A rank's graph has what it needs of them: the first stage starts from token ids, the others from the
hidden states of the stage before; the last stage ends with logits, the others with hidden states.
Position ids are left out where nothing in the rank depends on them (GPT-2's later stages). The caches
are those of the rank's own layers and heads; their layers are numbered from 0.

Shapes: B rows, S tokens per row in this call, M positions that get logits, H hidden size, V rows of the
rank's part of lm_head, C key/value heads of the rank, T cache positions (max_seq_len, static), D head
size.
"""

from __future__ import annotations

INPUT_IDS = "input_ids"  # int64 [B, S]
POSITION_IDS = "position_ids"  # int64 [B, S]: the cache position of each token
WRITE_INDICES = "write_indices"  # int64 [B]: first cache position written in each row
KV_LENGTHS = "kv_lengths"  # int64 [B]: valid cache length after the write
LOGIT_POSITIONS = "logit_positions"  # int64 [B, M]: which of the S positions get logits
HIDDEN_STATES = "hidden_states"  # [B, S, H], float32 in the CPU graph, float16 in TensorRT's
HIDDEN_STATES_OUT = "hidden_states_out"  # the same
# float32 [B, M, V]. With one tensor-parallel rank V is the number of tokens. With several, the ranks'
# logits are joined in tp_rank order and cut after the last token: see network.rank_facts.
LOGITS = "logits"


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """((past_key, present_key), (past_value, present_value)) of the rank's layer, each [B, C, T, D].

    float32 in the CPU graph, float16 in TensorRT's.
    """
    return (
        (f"past_key_{layer}", f"present_key_{layer}"),
        (f"past_value_{layer}", f"present_value_{layer}"),
    )
