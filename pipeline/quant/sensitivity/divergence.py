"""How far the model's predictions move when one group alone is quantized: KL of the logits.

One walk over the layers. Each layer starts one variant of the hidden states for each of its groups and
formats; variants of earlier layers go on through the original layer. With L layers, G groups in each
and F formats that is about L * L * G * F / 2 passes of a layer instead of L: for small models.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.quant.float32_products import float32_products
from pipeline.quant.layers.commits import MEASURED
from pipeline.quant.layers.frame import Frame
from pipeline.quant.layers.hidden import HiddenStates
from pipeline.quant.sensitivity.groups import Group
from pipeline.quant.sensitivity.variants import exchanged
from pipeline.quant.sensitivity.walk import GroupLosses, SensitivityWalk
from pipeline.store import replace_json


@dataclass(frozen=True)
class _Variant:
    group: int
    format: str
    hidden: HiddenStates


def divergences(
    walk: SensitivityWalk, groups: Sequence[Group], formats: Sequence[str]
) -> GroupLosses:
    """Mean KL(original || variant) of the next token, in nats; empty for groups that are kept.

    The result is kept in the walk's work directory; a killed run begins again.

    Raises:
        StageError: weights or activations that are not finite; no room on the disk.
    """
    digests = [walk.skeleton.layer_digest(layer) for layer in range(walk.skeleton.num_layers)]
    wanted = json.loads(json.dumps([walk.fingerprint(groups, formats), digests]))
    path = walk.work_dir / MEASURED
    if path.is_file():
        stored = json.loads(path.read_text("utf-8"))
        if stored["of"] == wanted:
            walk.progress.say("divergences were measured before")
            found: GroupLosses = stored["losses"]
            return found
    folder = walk.work_dir / "variants"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with float32_products(), torch.no_grad():
        original, variants = _walk(walk, groups, [f for f in formats if f != "fp16"], folder)
        losses = _compare(walk, original, variants, groups, formats)
    shutil.rmtree(folder)
    replace_json(path, {"of": wanted, "losses": losses})
    return losses


def _walk(
    walk: SensitivityWalk, groups: Sequence[Group], formats: Sequence[str], folder: Path
) -> tuple[HiddenStates, list[_Variant]]:
    """Outputs of the last layer: of the original, and of every variant."""
    num_layers = walk.skeleton.num_layers
    in_memory = walk.fits(len(groups) * len(formats) + 1)
    hidden = walk.embedded(folder / "original")
    variants: list[_Variant] = []
    walk.progress.start(num_layers, "layers measured")
    for layer in range(num_layers):
        mini = walk.skeleton.mini(layer).to(walk.devices[0])
        for variant in variants:  # each batch is read before it is written
            walk.passes.outputs(mini, layer, variant.hidden, variant.hidden)
        own = [i for i, group in enumerate(groups) if group.layer == layer and not group.is_kept]
        for fmt in formats:
            quantized = walk.quantized_copy(mini, layer, hidden, [groups[i] for i in own], fmt)
            for index in own:
                path = folder / f"{index}-{fmt}"
                variant = _Variant(index, fmt, walk.hidden(path, in_memory=in_memory))
                variant.hidden.create()
                with exchanged(mini, quantized, groups[index], walk.skeleton.layers_path):
                    walk.passes.outputs(mini, layer, hidden, variant.hidden)
                variants.append(variant)
            del quantized
        walk.passes.outputs(mini, layer, hidden, hidden)
        walk.progress.advance(f"layer {layer}, {len(variants)} variants")
    return hidden, variants


def _compare(
    walk: SensitivityWalk,
    original: HiddenStates,
    variants: Sequence[_Variant],
    groups: Sequence[Group],
    formats: Sequence[str],
) -> GroupLosses:
    """Logits of one window at a time."""
    head: Any = Frame(walk.skeleton, None)
    is_tuple = walk.passes.returns_tuple
    totals = [0.0] * len(variants)
    positions = 0
    for index, batch in enumerate(walk.batches):
        of_original = original.get(index)
        of_variants = [variant.hidden.get(index) for variant in variants]
        for row in range(len(batch.tokens_BT)):
            wanted_TV = _log_probabilities(head, of_original[row : row + 1], is_tuple)
            positions += len(wanted_TV)
            for number, hidden_BTH in enumerate(of_variants):
                found_TV = _log_probabilities(head, hidden_BTH[row : row + 1], is_tuple)
                kl_T = (wanted_TV.exp() * (wanted_TV - found_TV)).sum(dim=-1)
                totals[number] += float(kl_T.double().sum())
    losses: GroupLosses = [
        {name: 0.0 for name in formats if name == "fp16" and not group.is_kept} for group in groups
    ]
    for variant, total in zip(variants, totals, strict=True):
        losses[variant.group][variant.format] = max(total / positions, 0.0)
    return losses


def _log_probabilities(head: Frame, hidden_BTH: torch.Tensor, is_tuple: bool) -> torch.Tensor:
    """float32 [T, V] of one window."""
    logits_BTV = head.logits(hidden_BTH, returns_tuple=is_tuple)
    return torch.log_softmax(logits_BTV[0].float(), dim=-1)
