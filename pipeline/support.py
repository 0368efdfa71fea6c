"""What is supported, as Markdown made from the tables of the code: the README's support section.

`python -m pipeline.support` prints it; a test compares it with README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.engine import BACKENDS
from pipeline.models import ARCHITECTURES
from pipeline.quant.backends import (
    KNOWN_SMS,
    ONNXRUNTIME,
    TENSORRT_LLM,
    TENSORRT_RTX,
    refusal,
    sms_for,
)
from pipeline.quant.formats import FORMATS, MIXABLE, MIXED
from pipeline.quant.preflight import MADE
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
    backends = (ONNXRUNTIME, TENSORRT_RTX, TENSORRT_LLM)
    runs = _table(
        ("format", ONNXRUNTIME, TENSORRT_RTX, f"{TENSORRT_LLM} refuses"),
        [(fmt, *(_runs(fmt, backend) for backend in backends)) for fmt in FORMATS],
    )
    return "\n\n".join((formats, _LEGEND, runs, _reasons(), targets))


_LEGEND = """\
"read": a checkpoint that is in this format already is read and converted. "made": the quantize stage
makes it of plain weights. Any legal tp, pp and moe_ep, but mixed formats need pp 1. Which format runs
where:"""


def _depth(architecture: str, fmt: str) -> str:
    """How far an architecture gets in a format."""
    if fmt not in ARCHITECTURES[architecture].formats:
        return "no"
    return "read, made" if fmt in MADE else "read"


def _runs(fmt: str, backend: str) -> str:
    """SMs on which a backend runs a format; of TensorRT-LLM, those on which it is known not to."""
    if fmt == MIXED:
        return "as its parts"
    if backend == ONNXRUNTIME:
        return "yes"
    runs = sms_for(fmt, backend)
    if backend == TENSORRT_LLM:
        refused = [sm for sm in KNOWN_SMS if sm not in runs]
        return _sms(refused) if runs else "every SM"
    return _sms(runs) or "no"


def _sms(sms: Iterable[int]) -> str:
    return ", ".join(f"SM{sm}" for sm in sms)


def _reasons() -> str:
    """Why formats do not run somewhere, each reason once."""
    found: dict[str, dict[str, None]] = {}
    for backend in (TENSORRT_RTX, TENSORRT_LLM):
        for fmt in (*MIXABLE, "int4_gptq"):
            for sm in KNOWN_SMS:
                refused = refusal(fmt, backend, sm)
                if refused is not None and refusal("fp16", backend, sm) is None:
                    text = f"{refused.reason} ({refused.source})"
                    found.setdefault(text, {})[fmt] = None
    return "\n".join(f"- {', '.join(formats)}: {text}" for text, formats in found.items())


def _verdict(backend: str, target: str) -> str:
    return "yes" if BACKENDS[backend].can_target(TARGETS[target]) is None else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(support_markdown())
