"""`mapping` of a TensorRT-LLM config.json: how many ranks there are, and how they share the model."""

from __future__ import annotations

from pipeline.network.config_fields import ConfigFields, is_size
from pipeline.parallel import Axis, Dim, Extent, Mapping, why_not

_UNSET = -1


def read_mapping(fields: ConfigFields, rank: int) -> Mapping:
    """Mapping of `rank`; problems are left in `fields`, and then it is that of a single rank."""
    known = len(fields.problems)
    sizes = fields.section("mapping")
    tp, pp = sizes.size("tp_size", 1), sizes.size("pp_size", 1)
    world_size = sizes.size("world_size", tp * pp)
    sizes.only("cp_size", (1,))
    if len(fields.problems) == known and world_size != tp * pp:
        what = f"world_size is {world_size}, but tp_size {tp} x pp_size {pp} is {tp * pp}"
        sizes.refuse(what, str(tp * pp))
    moe_ep = _expert_blocks(sizes, tp)
    if len(fields.problems) > known:
        return Mapping()
    if not 0 <= rank < tp * pp:
        sizes.refuse(f"there is no rank {rank}", f"0 to {tp * pp - 1}")
        return Mapping()
    return Mapping(tp, pp, rank, moe_ep)


def check_mapping(
    fields: ConfigFields,
    mapping: Mapping,
    *,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    num_layers: int,
    num_experts: int,
) -> None:
    """Leaves a problem in `fields` for each size that cannot be shared out (num_experts 0: none)."""
    ffn = Axis.EXPERT_FFN if num_experts else Axis.FFN
    for axis, size in (
        (Axis.Q, num_heads),
        (Axis.KV, num_kv_heads),
        (ffn, intermediate_size),
    ):
        ranks = mapping.moe_tp if axis is Axis.EXPERT_FFN else mapping.tp
        reason = why_not(Dim(axis, Extent(size)), ranks)
        if reason:
            fields.refuse(reason)
    if mapping.pp > num_layers:
        what = f"mapping.pp_size is {mapping.pp}, but there are {num_layers} layers"
        fields.refuse(what, f"1 to {num_layers}")
    if (num_experts or 1) % mapping.moe_ep:
        what = f"mapping.moe_ep_size is {mapping.moe_ep}, but there are {num_experts} experts"
        fields.refuse(what, "a divisor of their number")


def _expert_blocks(sizes: ConfigFields, tp: int) -> int:
    """moe_ep: each of the two sizes follows from the other; -1 and absent are the same."""
    moe_tp, moe_ep = (_size_or_none(sizes, name) for name in ("moe_tp_size", "moe_ep_size"))
    if moe_ep is None:
        moe_ep = 1 if moe_tp is None else max(tp // moe_tp, 1)
    if moe_tp is None:
        moe_tp = max(tp // moe_ep, 1)
    if moe_tp * moe_ep != tp:
        what = f"moe_tp_size {moe_tp} x moe_ep_size {moe_ep} is {moe_tp * moe_ep}"
        sizes.refuse(what, f"tp_size {tp}")
    return moe_ep


def _size_or_none(sizes: ConfigFields, name: str) -> int | None:
    value = sizes.get(name)
    if value is None or value == _UNSET:
        return None
    if not is_size(value):
        sizes.refuse(
            f"{name} is {value!r}", "an integer, 1 or more; -1 for one that follows from tp"
        )
        return None
    return int(value)
