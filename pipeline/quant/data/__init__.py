"""Calibration data: text files of several kinds, cleaned, chosen by a strategy, cut and described.

Nothing heavy is imported here, so `plan` may use it. `calibration_data` is the way from a file to a
`TokenWindows`; `token_windows` cuts any texts into packed windows, for measuring.
"""

from __future__ import annotations

from pipeline.quant.data.documents import DOCUMENT_SEPARATOR, Document, Message, TextFile
from pipeline.quant.data.encoding import DialogueEncoder, TextEncoder
from pipeline.quant.data.selection import (
    CalibrationData,
    calibration_data,
    load_documents,
    load_texts,
    token_windows,
)
from pipeline.quant.data.windows import TokenWindows

__all__ = [
    "DOCUMENT_SEPARATOR",
    "CalibrationData",
    "DialogueEncoder",
    "Document",
    "Message",
    "TextEncoder",
    "TextFile",
    "TokenWindows",
    "calibration_data",
    "load_documents",
    "load_texts",
    "token_windows",
]
