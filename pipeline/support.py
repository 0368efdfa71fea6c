"""What is supported, as Markdown made from the tables of the code: the README's support section.

`python -m pipeline.support` prints it; a test compares it with README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.engine import BACKENDS
from pipeline.models import ARCHITECTURES
from pipeline.quant.formats import FORMATS
from pipeline.targets import TARGETS


def support_markdown() -> str:
    """Architectures, formats, and which backend builds for which target."""
    facts = _table(
        ("what", "supported"),
        [
            ("architectures", ", ".join(sorted(ARCHITECTURES))),
            ("formats", ", ".join(FORMATS)),
            ("mapping", "tp 1, pp 1"),
        ],
    )
    names = sorted(BACKENDS)
    rows = [
        (target.name, f"SM{target.sm}", *(_verdict(name, target.name) for name in names))
        for target in sorted(TARGETS.values(), key=lambda target: (target.sm, target.name))
    ]
    return f"{facts}\n\n{_table(('target', 'compute capability', *names), rows)}"


def _verdict(backend: str, target: str) -> str:
    return "yes" if BACKENDS[backend].can_target(TARGETS[target]) is None else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(support_markdown())
