"""What a quantized checkpoint says of itself: hf_quant_config.json, and the same in config.json."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.models import ARCHITECTURES, ModelShape, Scope, WeightRule
from pipeline.models.linears import head_rule

_KV_CACHE_ALGORITHMS = {"fp16": None, "fp8": "FP8", "int8": "INT8"}
_GPTQ = "W4A16_GPTQ"


@dataclass(frozen=True)
class QuantConfig:
    """Two forms of the same facts.

    Attributes:
        hf_quant_config: content of hf_quant_config.json.
        quantization_config: the field of that name in config.json.
    """

    hf_quant_config: dict[str, Any]
    quantization_config: dict[str, Any]


def quant_config_json(
    shape: ModelShape,
    formats: Mapping[str, str],
    *,
    group_size: int,
    kv_cache: Literal["fp16", "fp8", "int8"] = "fp16",
) -> QuantConfig:
    """What ModelOpt 0.47 writes for such a model, by its own functions.

    One format for all linears in `formats`: its name, and `exclude_modules` for what stays plain.
    Several: MIXED_PRECISION, and in `quantized_layers` what each linear is. `pre_quant_scale` is true
    for int4_awq whatever the algorithm, also where no linear has such a tensor. int4_gptq, which
    ModelOpt does not know, is described in the same way as W4A16_GPTQ with `has_zero_point`.

    Args:
        formats: full name of a linear -> format; what is not in it, or has "fp16", stays plain.
        group_size: of the formats that have groups.
    """
    import modelopt
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import process_layer_quant_config

    quantization = {
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        **process_layer_quant_config(_layer_facts(shape, formats, group_size)),
    }
    has_head = formats.get(head_rule(shape).sources[0].name, "fp16") != "fp16"
    if has_head and "quantized_layers" not in quantization:
        # One format for all, the head too: said by name, since readers take it to be plain otherwise.
        names = [name for name, fmt in formats.items() if fmt != "fp16"]
        one = {"quant_algo": quantization["quant_algo"]}
        quantization = {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": {name: dict(one) for name in names},
        }
    described = [quantization, *quantization.get("quantized_layers", {}).values()]
    for description in described:
        if description["quant_algo"] == "int4_gptq":
            description |= {
                "quant_algo": _GPTQ,
                "group_size": group_size,
                "has_zero_point": True,
                "pre_quant_scale": False,
            }
    quantization["kv_cache_quant_algo"] = _KV_CACHE_ALGORITHMS[kv_cache]
    producer = {"name": "modelopt", "version": modelopt.__version__}
    whole = {"producer": producer, "quantization": quantization}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"Unsupported quantization algorithm '{_GPTQ}'")
        converted = convert_hf_quant_config_format(whole)
    for group in converted.get("config_groups", {}).values():
        if group.pop("quant_algo", None) == _GPTQ:
            group["weights"] = {
                "dynamic": False,
                "num_bits": 4,
                "type": "int",
                "group_size": group_size,
                "symmetric": False,
            }
    return QuantConfig(whole, converted)


def _layer_facts(
    shape: ModelShape, formats: Mapping[str, str], group_size: int
) -> dict[str, str | int | None]:
    """Every matrix of the model in the form that ModelOpt describes: two entries for each."""
    facts: dict[str, str | int | None] = {}
    left = {name: fmt for name, fmt in formats.items() if fmt != "fp16"}
    assert left, "nothing is quantized"
    for name in matrices(shape):
        facts[f"{name}.quantization"] = left.pop(name, None)
        facts[f"{name}.awq_block_size"] = group_size
    assert not left, f"{shape.architecture} has no {sorted(left)}"
    return facts


def matrices(shape: ModelShape) -> Iterator[str]:
    """Linears and embeddings of the whole checkpoint, lm_head too where it is tied."""
    rules = ARCHITECTURES[shape.architecture]
    names: dict[str, None] = {}
    for rule in rules.rules_for(shape, Scope.FIRST):
        names |= dict.fromkeys(_names(rule, shape, None))
    for layer in range(shape.num_layers):
        for rule in rules.rules_for(shape, Scope.LAYER):
            names |= dict.fromkeys(_names(rule, shape, layer))
    for rule in rules.rules_for(shape, Scope.LAST):
        names |= dict.fromkeys(_names(rule, shape, None))
    yield from names


def _names(rule: WeightRule, shape: ModelShape, layer: int | None) -> Iterator[str]:
    for source in rule.sources:
        if len(source.axes) == 2:
            for expert in range(shape.num_experts if rule.experts else 1):
                yield source.name.format(layer=layer, expert=expert)
