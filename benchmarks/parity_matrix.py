"""Which architecture is proven in which format and mapping, as a table made from the tests themselves.

    python benchmarks/parity_matrix.py

Collects the tests that carry the mark `covers`, without running them, and counts the mappings
(tp x pp, "e" and the expert parallelism) among their parameters. A mapping counts once, slow tests
included. What is printed is what `make test-all` runs; whether it passes, only running it tells.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KINDS = {
    "ModelOpt": "M: rank files equal those of ModelOpt's TensorRT-LLM exporter, bit for bit",
    "slices": "S: rank files equal slices made by hand, bit for bit",
    "logits": "L: logits of the network in ONNX Runtime equal transformers' with dequantized weights",
}
FORMATS = ("fp16", "int4_awq", "int4_gptq", "w4a8_awq", "fp8", "int8_sq", "int8_wo")


class Collector:
    """architecture, format -> kind -> mappings."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(
            lambda: defaultdict(set)
        )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("covers"):
                params: dict[str, Any] = {**item.callspec.params, **mark.kwargs}
                mappings = params.get("mappings") or [[params.get("tp", 1), params.get("pp", 1)]]
                experts = f"e{params['moe_ep']}" if params.get("moe_ep", 1) > 1 else ""
                cell = self.found[params["architecture"], params["fmt"]]
                cell[mark.args[0]] |= {f"{tp}x{pp}{experts}" for tp, pp in mappings}


def main() -> int:
    """Prints the table. Returns 1 if the tests cannot be collected."""
    collector = Collector()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        arguments = [
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / "parity"),
        ]
        status = pytest.main(arguments, plugins=[collector])
    if status != pytest.ExitCode.OK:
        print(output.getvalue(), file=sys.stderr)
        return 1
    print("\n".join(table(collector.found)))
    return 0


def table(found: dict[tuple[str, str], dict[str, set[str]]]) -> list[str]:
    """Markdown; "M4" means: of kind M, in 4 mappings, which are listed below."""
    lines = [
        f"| architecture | {' | '.join(FORMATS)} |",
        f"|{' --- |' * (len(FORMATS) + 1)}",
    ]
    for architecture in sorted({name for name, _ in found}):
        cells = (_cell(found.get((architecture, fmt), {})) for fmt in FORMATS)
        lines.append(f"| {architecture} | {' | '.join(cells)} |")
    lines.append("")
    for kind, text in KINDS.items():
        mappings = sorted({one for cell in found.values() for one in cell.get(kind, ())})
        lines.append(f"{text}; tp x pp: {', '.join(mappings)}.")
    return lines


def _cell(kinds: dict[str, set[str]]) -> str:
    shown = (f"{kind[0].upper()}{len(kinds[kind])}" for kind in KINDS if kind in kinds)
    return " ".join(shown) or "-"


if __name__ == "__main__":
    sys.exit(main())
