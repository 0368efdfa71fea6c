"""The `mapping` of a TensorRT-LLM config.json, whoever wrote it, and the rank files that it implies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.errors import CheckpointError, Problem

MAX_RANKS: Final = 4096
"""More than any machine that engines are built for has; a larger number is a mistake."""

_UNSET: Final = -1
"""TensorRT-LLM's own default of the sizes that it derives from the others, such as moe_ep_size."""
_ALWAYS_SET: Final = ("tp", "pp", "cp")
_SHOWN_FILES: Final = 8


def mapping_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a TensorRT-LLM config.json: tp, pp, and what else is set. Raises CheckpointError."""
    fields = config.get("mapping")
    where = "config.json: mapping"
    sizes = {"tp": 1, "pp": 1}
    if isinstance(fields, dict):
        named = {key: value for key, value in fields.items() if key.endswith("_size")}
        sizes |= {key.removesuffix("_size"): value for key, value in named.items()}
        sizes.pop("world", None)
    sizes = {
        name: size
        for name, size in sizes.items()
        if name in _ALWAYS_SET or type(size) is not int or size != _UNSET
    }
    if not isinstance(fields, dict) or not all(
        type(size) is int and size >= 1 for size in sizes.values()
    ):
        allowed = '{"tp_size": 1, "pp_size": 1} or more; -1 for a size that follows from these'
        raise CheckpointError(Problem(where, repr(fields), allowed))
    if num_ranks(sizes) > MAX_RANKS:
        what = f"{mapping_text(sizes)} are {num_ranks(sizes)} ranks"
        raise CheckpointError(Problem(where, what, f"up to {MAX_RANKS}"))
    return sizes


def num_ranks(mapping: Mapping[str, int]) -> int:
    """How many rank files there are."""
    return mapping["tp"] * mapping["pp"]


def mapping_text(mapping: Mapping[str, int]) -> str:
    """tp 2, pp 4."""
    return ", ".join(f"{name} {size}" for name, size in mapping.items())


def check_ranks(
    directory: Path, mapping: Mapping[str, int], present: Collection[int], suffix: str
) -> None:
    """Raises CheckpointError if a rank has no file rank{r}.`suffix`."""
    missing = [rank for rank in range(num_ranks(mapping)) if rank not in present]
    if not missing:
        return
    names = ", ".join(f"rank{rank}.{suffix}" for rank in missing[:_SHOWN_FILES])
    more = f" and {len(missing) - _SHOWN_FILES} more" if len(missing) > _SHOWN_FILES else ""
    what = f"{mapping_text(mapping)}, but no {names}{more}"
    raise CheckpointError(Problem(str(directory), what))
