"""Rotary base and scaling from the RAW config.json.

Raw on purpose: transformers 4.57 reads a config.json of version 5 (`rope_parameters`) as base 10000
without scaling, and version 5 drops both for ModelOpt's exporter, in either case without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.hf_fields import HfFields, is_positive_number
from pipeline.models.shape import RotaryScaling

DEFAULT_BASE = 10000.0
"""What LlamaConfig means when config.json has no rope_theta (Llama 1 and 2)."""

_NEEDED = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_UNSCALED = ("default", "none")


def rotary_from_hf(fields: HfFields) -> tuple[float, RotaryScaling | None]:
    """(base, scaling): transformers 4 has rope_theta and rope_scaling, version 5 rope_parameters."""
    parameters = _mapping(fields, "rope_parameters")
    base = fields.positive("rope_theta", DEFAULT_BASE)
    scaling = _scaling(fields, "rope_scaling", _mapping(fields, "rope_scaling"))
    if parameters is None:
        return base, scaling
    newer_base = parameters.get("rope_theta", DEFAULT_BASE)
    if not is_positive_number(newer_base):
        fields.refuse("rope_parameters.rope_theta", f"{newer_base!r}", "a number above 0")
    elif fields.get("rope_theta") is not None and newer_base != base:
        fields.refuse("rope_theta", f"{base} contradicts rope_parameters, which says {newer_base}")
    newer_scaling = _scaling(fields, "rope_parameters", parameters)
    if scaling is not None and newer_scaling != scaling:
        fields.refuse("rope_scaling", "contradicts rope_parameters")
    return float(newer_base) if is_positive_number(newer_base) else base, newer_scaling


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
    wrong = [key for key in _NEEDED[kind] if not is_positive_number(values.get(key))]
    for key in wrong:
        fields.refuse(f"{name}.{key}", f"{values.get(key)!r}", "a number above 0")
    if wrong:
        return None
    return _checked_scaling(fields, name, kind, values)


def _checked_scaling(
    fields: HfFields, name: str, kind: str, values: Mapping[str, Any]
) -> RotaryScaling | None:
    if kind == "linear":
        return RotaryScaling(kind, float(values["factor"]))
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    if low >= high:
        fields.refuse(f"{name}.low_freq_factor", f"{low}", f"below high_freq_factor {high}")
        return None
    return RotaryScaling(
        kind, float(values["factor"]), low, high, int(values["original_max_position_embeddings"])
    )
