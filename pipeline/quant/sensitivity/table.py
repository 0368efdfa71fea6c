"""The measured sensitivities as lines of text: the worst groups first, and what was chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

WORST = 8
MEASURES = {
    "layer": "|error|^2 / |hidden state|^2 behind the layer",
    "output": "error of the linears' outputs / their energy",
    "kl": "KL of the next token, in nats",
}
"""What a loss is, by the name of the measure."""


def table_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record is what sensitivity.json holds."""
    formats = [name for name in record["formats"] if name != "fp16"]
    groups = [group for group in record["groups"] if not group["kept"]]
    if formats and groups:
        worst = sorted(groups, key=lambda group: -float(group["loss"][formats[0]]))[:WORST]
        width = max(len(group["kind"]) for group in worst)
        yield f"worst groups of {len(groups)}: {MEASURES[record['measure']]}"
        header = "".join(f"  {name:>9}" for name in formats)
        yield f"layer  {'group':{width}}{header}  chosen"
        for group in worst:
            losses = "".join(f"  {group['loss'][name]:9.2e}" for name in formats)
            yield f"{group['layer']:>5}  {group['kind']:{width}}{losses}  {group['chosen']}"
    counts = Counter(group["chosen"] for group in record["groups"])
    chosen = ", ".join(f"{name} {counts[name]}" for name in record["formats"] if counts[name])
    yield (
        f"chosen: {chosen} groups; {record['mean_bits']:.3f} of {record['budget_bits']:g} bits a weight"
    )
