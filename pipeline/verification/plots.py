"""Plots as inline SVG that take the page's text colour, so that they fit light and dark pages."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from pipeline.verification.report import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT = "#010203"  # replaced by the page's own text colour
_BLUE, _ORANGE = "#3b82c4", "#d97706"  # both readable on white and on near-black

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same plot gives the same bytes
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}


def kl_histogram_svg(histogram: Histogram, mean_kl: float, p99_kl: float) -> str:
    """Tokens by KL(original || engine), logarithmic axis in nats, mean and p99 marked."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        edges, counts = histogram.edges, histogram.counts
        axes.stairs(counts, edges, fill=True, color=_BLUE)
        axes.set_xscale("log")
        used = [index for index, count in enumerate(counts) if count]
        if used:
            axes.set_xlim(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)])
        for value, label, line, side in (
            (mean_kl, "mean ", "-", "right"),
            (p99_kl, " p99", "--", "left"),
        ):
            if edges[0] <= value <= edges[-1]:  # false for NaN
                axes.axvline(value, color=_ORANGE, linestyle=line)
                top = axes.get_ylim()[1]
                axes.text(value, top, label, va="bottom", ha=side, color=_ORANGE)
        axes.set_xlabel("KL(original || engine) of one token, nats")
        axes.set_ylabel("tokens")
        return _svg(figure)


def loss_scatter_svg(pairs: tuple[tuple[float, float], ...]) -> str:
    """Each token's loss under the original (x) and how much the engine's is higher (y), nats."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        finite = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
        axes.axhline(0, color=_ORANGE, linewidth=1)
        if finite:
            losses = [original for original, _ in finite]
            changes = [engine - original for original, engine in finite]
            axes.scatter(losses, changes, s=5, alpha=0.5, color=_BLUE, linewidths=0)
        axes.set_xlabel("loss of one token, original, nats")
        axes.set_ylabel("engine minus original, nats")
        return _svg(figure)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(_TEXT, "currentColor")
