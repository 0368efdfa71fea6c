"""Proof that an engine still is the model it was made from: perplexity, KL, agreement, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.verification.comparison import compare
    from pipeline.verification.gates import Gates, VerifyOptions
    from pipeline.verification.page import write_report
    from pipeline.verification.report import Report, Verdict, read_report

__all__ = [
    "Gates",
    "Report",
    "Verdict",
    "VerifyOptions",
    "compare",
    "read_report",
    "write_report",
]

_MODULES = {
    "compare": "comparison",
    "Gates": "gates",
    "VerifyOptions": "gates",
    "Report": "report",
    "Verdict": "report",
    "read_report": "report",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must start without numpy and pydantic models."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
