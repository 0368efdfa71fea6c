"""Rotary base and scaling from the RAW config.json.

Raw on purpose: transformers 4.57 reads a config.json of version 5 (`rope_parameters`) as base 10000
without scaling, and version 5 drops both for ModelOpt's exporter, in either case without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.hf_fields import (
    MAX_SIZE,
    POSITIVE,
    HfFields,
    is_positive_number,
    is_size,
    shown,
)
from pipeline.models.shape import RotaryScaling

DEFAULT_BASE = 10000.0
"""What LlamaConfig means when config.json has no rope_theta (Llama 1 and 2)."""

_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        _ORIGINAL,
    ),
}
_LONGROPE = ("short_factor", "long_factor")
_UNSCALED = ("default", "none")


def rotary_from_hf(
    fields: HfFields,
    default_base: float = DEFAULT_BASE,
    base_name: str = "rope_theta",
    fraction: float = 1.0,
) -> tuple[float, RotaryScaling | None]:
    """(base, scaling): transformers 4 has rope_theta and rope_scaling, version 5 rope_parameters.

    Args:
        fraction: of a head's channels that are rotated; a config that says another one is refused,
            because transformers obeys `partial_rotary_factor` in families that should not have it.
    """
    parameters = _mapping(fields, "rope_parameters")
    _check_fraction(fields, parameters, fraction)
    base = fields.positive(base_name, default_base)
    scaling = _scaling(fields, "rope_scaling", _mapping(fields, "rope_scaling"))
    if parameters is None:
        return base, scaling
    newer_base = parameters.get("rope_theta", default_base)
    if not is_positive_number(newer_base):
        fields.refuse("rope_parameters.rope_theta", shown(newer_base), POSITIVE)
    elif fields.get(base_name) is not None and newer_base != base:
        fields.refuse(base_name, f"{base} contradicts rope_parameters, which says {newer_base}")
    newer_scaling = _scaling(fields, "rope_parameters", parameters)
    if scaling is not None and newer_scaling != scaling:
        fields.refuse("rope_scaling", "contradicts rope_parameters")
    return float(newer_base) if is_positive_number(newer_base) else base, newer_scaling


def _check_fraction(
    fields: HfFields, parameters: Mapping[str, Any] | None, fraction: float
) -> None:
    name = "partial_rotary_factor"
    said = {name: fields.get(name), f"rope_parameters.{name}": (parameters or {}).get(name)}
    for where, value in said.items():
        if value is not None and value != fraction:
            share = "every channel" if fraction == 1.0 else f"{fraction:g} of the channels"
            what = f"{shown(value)} is not supported: {share} of a head is rotated"
            fields.refuse(where, what, f"{fraction:g}")


def unscaled_rotary_from_hf(
    fields: HfFields,
    default_base: float = DEFAULT_BASE,
    base_name: str = "rope_theta",
    fraction: float = 1.0,
) -> float:
    """The base, for families whose model in TensorRT-LLM reads no rotary_scaling: one is refused."""
    base, scaling = rotary_from_hf(fields, default_base, base_name, fraction)
    if scaling is not None:
        what = f"{scaling.kind} is not supported: TensorRT-LLM's model of this family ignores it"
        fields.refuse("rope_scaling", what, "null")
    return base


def longrope_from_hf(
    fields: HfFields, num_factors: int, max_position_embeddings: int
) -> RotaryScaling | None:
    """Phi-3's scaling, if it has one: a factor for each of `num_factors` rotated pairs.

    Older configs call the type "su" or "yarn" and mean the same, as transformers does.
    """
    scaling = _mapping(fields, "rope_scaling")
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in _UNSCALED:
        return None
    if kind not in ("longrope", "su", "yarn"):
        fields.refuse("rope_scaling.type", f"{kind} is not supported", "longrope")
        return None
    original = fields.size(_ORIGINAL, 4096)
    short, long = (_factors(fields, scaling, name, num_factors) for name in _LONGROPE)
    factor = max_position_embeddings / original
    return RotaryScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        short_factor=short,
        long_factor=long,
    )


def _factors(
    fields: HfFields, scaling: Mapping[str, Any], name: str, num_factors: int
) -> tuple[float, ...]:
    values = scaling.get(name)
    if (
        not isinstance(values, list)
        or len(values) != num_factors
        or not all(is_positive_number(value) for value in values)
    ):
        what = f"{len(values)} values" if isinstance(values, list) else f"{values!r}"
        fields.refuse(f"rope_scaling.{name}", what, f"{num_factors} numbers above 0")
        return ()
    return tuple(float(value) for value in values)


def _mapping(fields: HfFields, name: str) -> Mapping[str, Any] | None:
    value = fields.get(name)
    if value is None or isinstance(value, dict):
        return value
    fields.refuse(name, f"{value!r}", "null, a mapping")
    return None


def _scaling(fields: HfFields, name: str, values: Mapping[str, Any] | None) -> RotaryScaling | None:
    if values is None:
        return None
    kinds = {values[key] for key in ("rope_type", "type") if isinstance(values.get(key), str)}
    if len(kinds) > 1:
        fields.refuse(name, f"rope_type and type disagree: {', '.join(sorted(kinds))}")
        return None
    kind = kinds.pop() if kinds else "missing"
    if kind in _UNSCALED:
        return None
    if kind not in _NEEDED:
        fields.refuse(
            f"{name}.rope_type", f"{kind} is not supported", ", ".join(("default", *_NEEDED))
        )
        return None
    wrong = {
        key: f"an integer from 1 to {MAX_SIZE}" if key == _ORIGINAL else POSITIVE
        for key in _NEEDED[kind]
        if not (is_size if key == _ORIGINAL else is_positive_number)(values.get(key))
    }
    for key, allowed in wrong.items():
        fields.refuse(f"{name}.{key}", shown(values.get(key)), allowed)
    if wrong:
        return None
    return _checked_scaling(fields, name, kind, values)


def _checked_scaling(
    fields: HfFields, name: str, kind: str, values: Mapping[str, Any]
) -> RotaryScaling | None:
    if kind in ("linear", "dynamic"):
        return RotaryScaling(kind, float(values["factor"]))
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    if low >= high:
        fields.refuse(f"{name}.low_freq_factor", f"{low}", f"below high_freq_factor {high}")
        return None
    return RotaryScaling(kind, float(values["factor"]), low, high, values[_ORIGINAL])
