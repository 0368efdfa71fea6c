"""Limits that an engine must keep, and the options of a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.verification.report import NotFinite, Verdict, within


@dataclass(frozen=True)
class Gates:
    """The engine passes when all three hold.

    Attributes:
        max_perplexity_ratio: engine over original.
        max_mean_kl: mean KL(original || engine), nats per token.
        min_top1_agreement: share of tokens, 0 to 1.
    """

    max_perplexity_ratio: float
    max_mean_kl: float
    min_top1_agreement: float


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared.

    Attributes:
        num_windows, seq_len: held-out windows and tokens of each.
        gates: None judges only whether all logits are finite (a rehearsal on random weights).
        seed: chooses the windows.
        num_threads: of each side; None leaves it to the libraries.
    """

    num_windows: int
    seq_len: int
    gates: Gates | None = None
    seed: int = 0
    num_threads: int | None = None


def judge(
    gates: Gates | None,
    *,
    perplexity_ratio: float,
    mean_kl: float,
    top1_agreement: float,
    not_finite: tuple[NotFinite, ...],
) -> tuple[Verdict, ...]:
    """One verdict per gate. Without all logits finite no gate is passed, whatever the numbers say."""
    note = "; ".join(
        f"{bad.side}: logits of window {bad.window} are not finite from position {bad.position} on"
        for bad in not_finite
    )
    verdicts = [
        Verdict(
            gate="finite",
            measured=float(len(not_finite)),
            comparison="<=",
            limit=0.0,
            passed=not not_finite,
            note=note,
        )
    ]
    if gates is None:
        return tuple(verdicts)
    unknown = math.nan
    values = (
        ("max_perplexity_ratio", perplexity_ratio, "<=", gates.max_perplexity_ratio),
        ("max_mean_kl", mean_kl, "<=", gates.max_mean_kl),
        ("min_top1_agreement", top1_agreement, ">=", gates.min_top1_agreement),
    )
    for gate, value, comparison, limit in values:
        measured = unknown if not_finite else value
        verdicts.append(
            Verdict.model_validate(
                {
                    "gate": gate,
                    "measured": measured,
                    "comparison": comparison,
                    "limit": limit,
                    "passed": within(measured, "<=" if comparison == "<=" else ">=", limit),
                    "note": note,
                }
            )
        )
    return tuple(verdicts)
