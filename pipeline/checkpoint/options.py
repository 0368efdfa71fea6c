"""What convert may change about a model, and only does when it is asked to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertOptions:
    """Everything is off by default: the rank files then mean exactly what the source means.

    Attributes:
        pad_ffn: add rows and columns of zeros to the feed-forward network until its size can be cut
            into whole groups on every rank. The model computes the same.
        requantize_asymmetric: round int4 with zero points to symmetric int4, which loses a little.
        allow_not_finite: keep NaN and infinite weights instead of refusing them.
    """

    pad_ffn: bool = False
    requantize_asymmetric: bool = False
    allow_not_finite: bool = False
