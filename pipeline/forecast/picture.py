"""A plan as a picture: one stacked bar of memory for each rank, as PNG or SVG.

Imported only when a picture is asked for: matplotlib takes longer than a plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, Problem, ToolError
from pipeline.forecast.device import RankMemory
from pipeline.forecast.from_config import Forecast
from pipeline.forecast.sizes_text import exact_text, size_text
from pipeline.forecast.tables import alike

SUFFIXES = (".png", ".svg")
_PARTS = (
    ("weights", "#2f5d8a"),
    ("KV cache", "#5fa8a1"),
    ("activations (estimate)", "#e3a857"),
    ("runtime (assumption)", "#b9b4ab"),
)
_LEFT, _MISSING, _INK = "#f1efec", "#b3372f", "#2b2b2b"
_LABELLED = 0.07
"""Share of the axis from which a part has room for its size."""


def check_picture_path(path: Path) -> None:
    """Refuse what no picture can be written to, before anything is planned.

    Raises:
        ConfigError: another kind of file, or no directory to put it in.
    """
    if path.suffix not in SUFFIXES:
        what = f"{path.name} is no picture that can be made"
        raise ConfigError(Problem("--picture", what, " or ".join(f"*{one}" for one in SUFFIXES)))
    if not path.parent.is_dir():
        raise ConfigError(Problem("--picture", f"no such directory: {path.parent}"))


def write_picture(path: Path, title: str, found: Forecast) -> None:
    """Write it; ranks that are alike share a bar.

    Raises:
        ToolError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install matplotlib, or `make venv` in a clone"
        raise ToolError(
            Problem("--picture", f"matplotlib cannot be loaded: {error}", fix=fix)
        ) from (error)
    bars = list(alike(found.ranks))
    figure = Figure(figsize=(9, 2.2 + 0.62 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, found, bars)
    _describe(figure, title, bars)
    # Without a date, the same plan makes the same bytes.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)


def _describe(figure: Any, title: str, bars: list[tuple[str, RankMemory]]) -> None:
    """Title and legend."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold", color=_INK)
    handles = [_patch(colour, name) for name, colour in _PARTS]
    if any(rank.left > 0 for _, rank in bars):
        handles.append(_patch(_LEFT, "left"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.3,
    )


def _draw(axes: Any, found: Forecast, bars: list[tuple[str, RankMemory]]) -> None:
    capacity = found.subject.target.memory_bytes / 1e9
    widest = max([capacity, *(_filled(rank) / 1e9 for _, rank in bars)])
    for row, (_, rank) in enumerate(bars):
        _draw_bar(axes, row, rank, widest)
    axes.axvline(capacity, color=_INK, linewidth=1.6)
    axes.annotate(
        f"{found.subject.target.name}: {exact_text(found.subject.target.memory_bytes)}",
        (capacity, -0.52),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_INK,
    )
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=10)
    axes.set_ylim(len(bars) - 0.45, -0.85)
    axes.set_xlim(0, widest * 1.14)
    axes.set_xlabel("GB of memory of each GPU", fontsize=9, color=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelsize=9, colors=_INK)


def _draw_bar(axes: Any, row: int, rank: RankMemory, widest: float) -> None:
    start = 0.0
    sizes = (rank.weights.total, rank.kv_cache, rank.activations, rank.overhead)
    for (_, colour), size in zip(_PARTS, sizes, strict=True):
        width = size / 1e9
        axes.barh(
            row, width, left=start, height=0.6, color=colour, edgecolor="white", linewidth=0.6
        )
        if width > _LABELLED * widest:
            ink = "white" if colour == _PARTS[0][1] else _INK
            axes.text(
                start + width / 2,
                row,
                size_text(size),
                ha="center",
                va="center",
                fontsize=9,
                color=ink,
            )
        start += width
    left = rank.left / 1e9
    if left > 0:
        axes.barh(
            row, left, left=start, height=0.6, color=_LEFT, edgecolor="#c9c5bf", linewidth=0.6
        )
    said = f"{size_text(abs(rank.left))} {'left' if left >= 0 else 'missing'}"
    axes.text(
        max(start, rank.capacity / 1e9) + 0.01 * widest,
        row,
        f"{rank.verdict}\n{said}",
        va="center",
        fontsize=9,
        color=_INK if rank.verdict == "fits" else _MISSING,
    )


def _filled(rank: RankMemory) -> int:
    return rank.capacity - rank.left


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#c9c5bf", linewidth=0.5, label=label)
