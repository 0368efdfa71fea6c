"""What conversion found in the values: lost ones, and rounded weights. Adds up over processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.checkpoint.options import ConvertOptions
from pipeline.errors import Problem

FLOAT16_MAX = 65504.0


@dataclass
class Losses:
    """Values of one tensor that are not numbers, or none that float16 can hold."""

    not_finite: int = 0
    too_large: int = 0
    largest: float = 0.0

    def add(self, other: Losses) -> None:
        """Count those of another part of the tensor, too."""
        self.not_finite += other.not_finite
        self.too_large += other.too_large
        self.largest = max(self.largest, other.largest)


@dataclass
class Findings:
    """Of some ranks.

    Attributes:
        losses: (source tensor, target tensor that is made of it) -> what got lost on the way.
        rescaled: source tensors whose FP8 codes were rounded to a larger scale.
        unlike_experts: first pre-quant scale of every stack of experts whose scales differ.
    """

    losses: dict[tuple[str, str], Losses] = field(default_factory=dict)
    rescaled: set[str] = field(default_factory=set)
    unlike_experts: set[str] = field(default_factory=set)

    def add_losses(self, source: str, target: str, losses: Losses) -> None:
        """Count those of one part of a tensor."""
        self.losses.setdefault((source, target), Losses()).add(losses)

    def by_source(self) -> dict[str, Losses]:
        """Source tensor -> its losses; each of two uses (a tied embedding) has all of them."""
        return {source: losses for (source, _), losses in sorted(self.losses.items(), reverse=True)}

    def problems(self, options: ConvertOptions) -> list[Problem]:
        """Every way in which a source tensor lost values that it may not lose."""
        problems = []
        for name, losses in sorted(self.by_source().items()):
            if losses.not_finite and not options.allow_not_finite:
                what = f"{losses.not_finite} values are NaN or Inf"
                fix = "repair the weights, or keep them so with convert.allow_not_finite: true"
                problems.append(Problem(name, what, fix=fix))
            if losses.too_large:
                what = (
                    f"{losses.too_large} values do not fit float16, the largest is "
                    f"{losses.largest:.6g}"
                )
                problems.append(Problem(name, what, f"-{FLOAT16_MAX:.0f} to {FLOAT16_MAX:.0f}"))
        return problems

    def notes(self) -> list[str]:
        """What was done to values, where there are no problems."""
        notes = [
            f"{name}: {lost.not_finite} values are NaN or Inf; convert.allow_not_finite keeps them"
            for name, lost in sorted(self.by_source().items())
        ]
        if self.rescaled:
            notes.append(
                f"{len(self.rescaled)} FP8 weights are rounded to the scale of the largest weight "
                "that they are fused with: TensorRT-LLM has one scale for q, k and v"
            )
        if self.unlike_experts:
            notes.append(
                f"{len(self.unlike_experts)} stacks of experts have a pre-quant scale for each expert: "
                "engines made here use them, TensorRT-LLM uses the first one for all"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Plain data, to hand it to another process."""
        losses = [[*use, asdict(lost)] for use, lost in self.losses.items()]
        return {
            "losses": losses,
            "rescaled": sorted(self.rescaled),
            "unlike_experts": sorted(self.unlike_experts),
        }


def findings_from_json(data: dict[str, Any]) -> Findings:
    """The inverse of `Findings.to_json`."""
    losses = {(source, target): Losses(**lost) for source, target, lost in data["losses"]}
    return Findings(losses, set(data["rescaled"]), set(data["unlike_experts"]))


def merged(parts: Iterable[Findings]) -> Findings:
    """Of all ranks, from those of some each."""
    total = Findings()
    for found in parts:
        total.rescaled |= found.rescaled
        total.unlike_experts |= found.unlike_experts
        for use, losses in found.losses.items():
            total.add_losses(*use, losses)
    return total
