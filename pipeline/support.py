"""What is supported, as Markdown made from the tables of the code: the README's support section.

`python -m pipeline.support` prints it; a test compares it with README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.engine import BACKENDS
from pipeline.models import ARCHITECTURES
from pipeline.quant.formats import BUILDABLE, FORMATS
from pipeline.quant.preflight import QUANTIZERS
from pipeline.targets import TARGETS


def support_markdown() -> str:
    """Which architecture in which format, and which backend builds for which target."""
    formats = _table(
        ("architecture", *FORMATS),
        [(name, *(_depth(name, fmt) for fmt in FORMATS)) for name in sorted(ARCHITECTURES)],
    )
    names = sorted(BACKENDS)
    rows = [
        (target.name, f"SM{target.sm}", *(_verdict(name, target.name) for name in names))
        for target in sorted(TARGETS.values(), key=lambda target: (target.sm, target.name))
    ]
    targets = _table(("target", "compute capability", *names), rows)
    return "\n\n".join((formats, _LEGEND, targets))


_LEGEND = """\
"read": a checkpoint that is in this format already is read and converted. "made": the quantize stage
makes it of plain weights. "built": an engine is built of it, with tp 1 and pp 1; `build.backend: none`
converts for any legal tp, pp and moe_ep."""


def _depth(architecture: str, fmt: str) -> str:
    """How far an architecture gets in a format."""
    if fmt not in ARCHITECTURES[architecture].formats:
        return "no"
    made = ["made"] if fmt in QUANTIZERS else []
    built = ["built"] if fmt in BUILDABLE else []
    return ", ".join(("read", *made, *built))


def _verdict(backend: str, target: str) -> str:
    return "yes" if BACKENDS[backend].can_target(TARGETS[target]) is None else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(support_markdown())
