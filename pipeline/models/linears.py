"""Linears of the decoder layers, by their Hugging Face names without ".weight"."""

from __future__ import annotations

from pipeline.models import ARCHITECTURES
from pipeline.models.architecture import Scope, WeightRule
from pipeline.models.shape import ModelShape


def rule_linears(rule: WeightRule, shape: ModelShape, layer: int) -> tuple[str, ...]:
    """What one target of a layer is made of, those of every expert included."""
    names = (
        source.name.format(layer=layer, expert=expert)
        for expert in range(shape.num_experts if rule.experts else 1)
        for source in rule.sources
    )
    return tuple(dict.fromkeys(names))  # fused sources share a linear


def decoder_linears(shape: ModelShape) -> tuple[str, ...]:
    """Every linear that a format can store in its own way, layer by layer, those of every expert too.

    Embeddings and lm_head are outside the decoder layers.
    """
    names = (
        name
        for layer in range(shape.num_layers)
        for group in fused_groups(shape, layer)
        for name in group
    )
    return tuple(names)


def fused_groups(shape: ModelShape, layer: int) -> tuple[tuple[str, ...], ...]:
    """Linears of a layer that must have one format: those of one target.

    All experts of a layer are one group: TensorRT-LLM has one format for both of its stacks.
    """
    rules = ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAYER)
    groups = []
    experts: dict[str, None] = {}
    for rule in rules:
        if rule.quantized and rule.experts:
            experts |= dict.fromkeys(rule_linears(rule, shape, layer))
        elif rule.quantized:
            groups.append(rule_linears(rule, shape, layer))
    return (*groups, tuple(experts)) if experts else tuple(groups)


def head_rule(shape: ModelShape) -> WeightRule:
    """The rule of lm_head; `sources[0].name` is its own Hugging Face name, tied or not."""
    rules = ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAST)
    (found,) = (rule for rule in rules if rule.tied_sources)
    return found


def within_layer(linear: str, layer: int) -> str:
    """The part of a name behind its layer's number: "self_attn.q_proj"."""
    _, _, rest = linear.partition(f".{layer}.")
    assert rest, (linear, layer)
    return rest
