"""The sizes that the families descending from Llama spell alike in config.json."""

from __future__ import annotations

from typing import TypedDict

from pipeline.models.hf_fields import MAX_LAYERS, HfFields


class DecoderSizes(TypedDict):
    """Arguments of ModelShape."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int


def decoder_sizes(
    fields: HfFields,
    *,
    default_head_size: int | None = None,
    default_num_kv_heads: int | None = None,
) -> DecoderSizes:
    """The sizes of a config.json.

    Args:
        default_head_size: without head_dim; None: hidden_size / heads, which must be whole.
        default_num_kv_heads: without num_key_value_heads; None: as many as attention heads.
    """
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", default_num_kv_heads or num_heads)
    head_size = 2
    if not fields.problems:
        head_size = _head_size(fields, hidden_size, num_heads, default_head_size)
    if not fields.problems and num_heads % num_kv_heads:
        fields.refuse(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads"
        )
    return DecoderSizes(
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers", limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("max_position_embeddings"),
    )


def attention_windows(
    fields: HfFields, max_position_embeddings: int, name: str = "sliding_window"
) -> tuple[int, ...]:
    """The window of every layer; nothing if it never cuts anything off."""
    if fields.get(name) is None:
        return ()
    window = fields.size(name)
    return (window,) if window < max_position_embeddings else ()


def _head_size(
    fields: HfFields, hidden_size: int, num_heads: int, default_head_size: int | None
) -> int:
    if fields.get("head_dim") is None and default_head_size is None and hidden_size % num_heads:
        fields.refuse(
            "head_dim", f"missing, and hidden_size {hidden_size} / {num_heads} heads is not whole"
        )
        return 2
    head_size = fields.size("head_dim", default_head_size or max(hidden_size // num_heads, 1))
    if head_size % 2:
        fields.refuse("head_dim", f"{head_size}", "an even number: rotary embedding works on pairs")
    return head_size
