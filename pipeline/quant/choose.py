"""Which linear gets which format: from the YAML's `quantize` section to one LayerRecipe per layer.

Plain arguments and no heavy import, so that `plan` and the quantize stage ask the same functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal

from pipeline.models import ModelShape
from pipeline.models.linears import decoder_linears, fused_groups, head_rule, within_layer
from pipeline.quant.formats import FORMATS, MIXED, KvCache, QuantFormat
from pipeline.quant.recipe import ALGORITHMS, LayerRecipe

MODELOPT_SEARCH: Final = ("int4_awq", "w4a8_awq", "int8_wo", "int8_sq", "fp8")
"""Formats that ModelOpt can make itself: all but the one with zero points."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?) bits")
MAX_BUDGET: Final = 16.0


def recipe_for(
    shape: ModelShape,
    layer: int,
    *,
    format: str,
    group_size: int,
    algorithm: str | None = None,
    search: Literal["gram", "modelopt"] = "gram",
    kv_cache: KvCache = "fp16",
    keep: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
) -> LayerRecipe:
    """How one decoder layer is quantized.

    Args:
        layer: its number in the model.
        format, group_size, algorithm, search, kv_cache, keep: as in the YAML's `quantize` section.
        chosen: with format "mixed", the format of each linear by its full name; others stay fp16.
    """
    names = [name for group in fused_groups(shape, layer) for name in group]
    formats = {}
    for name in names:
        wanted = (chosen or {}).get(name, "fp16") if format == MIXED else format
        formats[within_layer(name, layer)] = "fp16" if is_kept(name, keep) else wanted
    used = dict.fromkeys(name for name in formats.values() if name != "fp16")
    return LayerRecipe(
        formats=formats,
        algorithms={name: algorithm_of(name, algorithm) for name in used},
        group_size=group_size,
        search=search,
        kv_cache=kv_cache,
    )


def algorithm_of(format: str, algorithm: str | None) -> str:
    """The algorithm for a format: the one asked for where the format has it, else its usual one."""
    known = ALGORITHMS[format]
    return algorithm if algorithm in known else known[0]


def is_kept(linear: str, keep: Sequence[str]) -> bool:
    """Whether a `keep` pattern names the linear; case matters."""
    return any(fnmatchcase(linear, pattern) for pattern in keep)


def model_format(
    shape: ModelShape,
    *,
    format: str,
    group_size: int,
    kv_cache: KvCache = "fp16",
    keep: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
    lm_head: str = "fp16",
) -> QuantFormat:
    """The QuantFormat of a whole model that is quantized with these values; see `recipe_for`.

    Args:
        lm_head: of the head; if it is not fp16, the whole is a mixed format, in which the head is one
            exception more.
    """
    linears = decoder_linears(shape)
    if lm_head != "fp16":
        if format != MIXED:
            chosen = dict.fromkeys(linears, format)
        format = MIXED
    if format == MIXED:
        exceptions = {
            name: _sized(found, group_size)
            for name, found in (chosen or {}).items()
            if found != "fp16" and not is_kept(name, keep)
        }
    else:
        exceptions = {name: FORMATS["fp16"] for name in linears if is_kept(name, keep)}
    if lm_head != "fp16":
        exceptions[head_rule(shape).sources[0].name] = _sized(lm_head, group_size)
    fmt = _sized(format, group_size)
    if exceptions:
        fmt = fmt.with_exceptions(exceptions)
    return fmt.with_kv_cache(kv_cache)


def budget_bits(budget: str) -> float | None:
    """Mean bits per weight that "4.5 bits" asks for; None: it is written otherwise."""
    match = _BUDGET.fullmatch(budget.strip())
    return None if match is None else float(match[1])


def unused_patterns(shape: ModelShape, keep: Sequence[str]) -> list[str]:
    """Those that name no linear of a decoder layer."""
    linears = decoder_linears(shape)
    return [pattern for pattern in keep if not any(fnmatchcase(one, pattern) for one in linears)]


def split_groups(shape: ModelShape, keep: Sequence[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Of each group of linears that must have one format but is kept in part: the kept ones."""
    found = {}
    for layer in range(shape.num_layers):
        for group in fused_groups(shape, layer):
            kept = tuple(name for name in group if is_kept(name, keep))
            if kept and len(kept) < len(group):
                found[group] = kept
    return found


def _sized(name: str, group_size: int) -> QuantFormat:
    fmt = FORMATS[name]
    return fmt if fmt.group_size is None else fmt.with_group_size(group_size)
