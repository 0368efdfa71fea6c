"""The sensitivities as a picture: layers from left to right, what a group loses, and what it became."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.quant.sensitivity.table import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sensitivity",  # the same plot gives the same bytes
    "font.size": 9,
}
_COLORS = {
    "int4_awq": "#2f6db3",
    "int8_wo": "#e3a72f",
    "int8_sq": "#c97b1a",
    "fp8": "#6aa84f",
    "fp16": "#b4402f",
}
_CELL = 0.34  # inches
_MOST_LABELS = 24


def sensitivity_svg(record: Mapping[str, Any]) -> str:
    """Two heat maps above each other, an SVG document.

    Args:
        record: what sensitivity.json holds.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(group["kind"] for group in record["groups"]))
    num_layers = 1 + max(group["layer"] for group in record["groups"])
    with mpl.rc_context(_STYLE):
        width = min(max(num_layers * _CELL, 4.5), 14.0) + 3.2
        height = 2 * len(kinds) * _CELL + 2.2
        figure = Figure(figsize=(width, height), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        _draw_losses(top, record, kinds, num_layers)
        _draw_choices(bottom, record, kinds, num_layers)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_losses(axes: Axes, record: Mapping[str, Any], kinds: list[str], num_layers: int) -> None:
    from matplotlib import colormaps

    smallest = record["formats"][0]
    values = [[math.nan] * num_layers for _ in kinds]
    for group in record["groups"]:
        loss = group["loss"].get(smallest, 0.0)
        if loss > 0:
            values[kinds.index(group["kind"])][group["layer"]] = math.log10(loss)
    colors = colormaps["viridis"].with_extremes(bad="#dddddd")
    image = axes.imshow(values, aspect="auto", cmap=colors, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("log10 of loss")
    axes.set_title(f"Loss in {smallest}: {MEASURES[record['measure']]}", loc="left", fontsize=9)
    _label(axes, kinds, num_layers)


def _draw_choices(axes: Axes, record: Mapping[str, Any], kinds: list[str], num_layers: int) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(dict.fromkeys((*record["formats"], "fp16")))
    values = [[math.nan] * num_layers for _ in kinds]
    for group in record["groups"]:
        values[kinds.index(group["kind"])][group["layer"]] = names.index(group["chosen"])
    colors = [_COLORS[name] for name in names]
    axes.imshow(
        values,
        aspect="auto",
        cmap=ListedColormap(colors),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        interpolation="nearest",
    )
    used = {group["chosen"] for group in record["groups"]}
    patches = [
        Patch(color=color, label=name)
        for name, color in zip(names, colors, strict=True)
        if name in used
    ]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    title = f"Chosen: {record['mean_bits']:.3f} of {record['budget_bits']:g} bits a weight"
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("layer")
    _label(axes, kinds, num_layers)


def _label(axes: Axes, kinds: list[str], num_layers: int) -> None:
    axes.set_yticks(range(len(kinds)), kinds)
    step = -(-num_layers // _MOST_LABELS)
    axes.set_xticks(range(0, num_layers, step))
    for edge in range(1, num_layers):
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in range(1, len(kinds)):
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
