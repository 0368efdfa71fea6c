"""Which texts a config means, and reading them for a stage."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.calibration_config import BUNDLED, HubFile
from pipeline.config import LoadedConfig
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH
from pipeline.errors import PlanError, Problem
from pipeline.quant.data import (
    CalibrationData,
    DialogueEncoder,
    Document,
    TextEncoder,
    TextFile,
    calibration_data,
    load_documents,
)
from pipeline.quant.data.candidates import pool_chars
from pipeline.quant.data.characters import profile
from pipeline.quant.data.hub import download_dataset_file
from pipeline.quant.data.preflight import Needed, beginning, file_problems
from pipeline.quant.data.report import comparison_warnings
from pipeline.quant.light_tokenizer import quick_encoder

CALIBRATION_KEYS = ("quantize", "calibration")
HELDOUT_KEYS = ("verify",)


def calibration_path(loaded: LoadedConfig) -> Path | None:
    """The file that `quantize.calibration.data` names; None for one on the Hub."""
    data = loaded.config.quantize.calibration.data
    if isinstance(data, HubFile):
        return None
    if data == BUNDLED:
        return CALIBRATION_PATH
    return loaded.resolve(data, *CALIBRATION_KEYS, "data")


def heldout_path(loaded: LoadedConfig) -> Path:
    """The file that `verify.data` names."""
    data = loaded.config.verify.data
    return HELDOUT_PATH if data == BUNDLED else loaded.resolve(data, *HELDOUT_KEYS, "data")


def needed_to_read(path: Path | None) -> tuple[str, ...]:
    """Distributions that reading a text takes; None: a file on the Hub, which may be of any kind."""
    if path is None:
        return ("huggingface_hub", "pyarrow")
    return ("pyarrow",) if path.suffix == ".parquet" else ()


def calibration_subset(loaded: LoadedConfig) -> dict[str, Any]:
    """What of `quantize.calibration` decides its windows; a local file counts by content instead."""
    calibration = loaded.config.quantize.calibration
    subset = calibration.model_dump(mode="json", exclude_defaults=True, exclude={"data"})
    if isinstance(calibration.data, HubFile):
        subset["data"] = calibration.data.model_dump()
    if calibration.layout == "packed":
        subset.pop("padding", None)
    sizes = ("num_samples", "seq_len", "batch_size")
    return {**{size: getattr(calibration, size) for size in sizes}, **subset}


def calibration_file(loaded: LoadedConfig) -> TextFile:
    """The calibration text as a local file; downloads one that is on the Hub, or finds it in the cache.

    Raises:
        ToolError: the download failed.
    """
    calibration = loaded.config.quantize.calibration
    path = calibration_path(loaded)
    if path is None:
        assert isinstance(calibration.data, HubFile)
        path = download_dataset_file(calibration.data)
    return TextFile(path, calibration.column, calibration.messages)


def heldout_file(loaded: LoadedConfig) -> TextFile:
    """The held-out text."""
    verify = loaded.config.verify
    return TextFile(heldout_path(loaded), verify.column, verify.messages)


def load_calibration(
    loaded: LoadedConfig, encoder: DialogueEncoder, vocab_size: int
) -> CalibrationData:
    """The windows that the config asks for, and their report.

    Raises:
        PlanError, ToolError: see `calibration_file` and `calibration_data`; with the YAML's line.
    """
    options = loaded.config.quantize.calibration
    source = calibration_file(loaded)
    try:
        return calibration_data(source, encoder, options, vocab_size=vocab_size)
    except PlanError as error:
        line = loaded.where(*CALIBRATION_KEYS, "data")
        places = [replace(each, where=f"{line}: {each.where}") for each in error.problems]
        raise PlanError(places) from error


def load_heldout(loaded: LoadedConfig) -> list[Document]:
    """The documents that the engine is measured on; of a large file, a sample that is more than enough.

    Raises:
        PlanError: see `load_documents`.
    """
    verify = loaded.config.verify
    return load_documents(heldout_file(loaded), pool_chars(verify.num_windows, verify.seq_len))


def text_problems(loaded: LoadedConfig, source_dir: Path | None) -> Iterator[Problem]:
    """Everything that shows in moments that a text cannot be used; missing files are the plan's.

    Args:
        source_dir: the checkpoint, for its tokenizer; None before a download.
    """

    @functools.cache
    def encoder() -> TextEncoder | None:
        return None if source_dir is None else quick_encoder(source_dir)

    if loaded.has_network:
        verify = loaded.config.verify
        yield from file_problems(
            heldout_file(loaded),
            lambda *keys: loaded.where(*HELDOUT_KEYS, *keys),
            source_dir,
            Needed(verify.num_windows, verify.seq_len, encoder=encoder),
        )
    if loaded.config.quantize.format == "fp16":
        return
    calibration = loaded.config.quantize.calibration
    path = calibration_path(loaded)
    if path is None:
        assert isinstance(calibration.data, HubFile)
        path = Path(calibration.data.file)
    yield from file_problems(
        TextFile(path, calibration.column, calibration.messages),
        lambda *keys: loaded.where(*CALIBRATION_KEYS, *keys),
        source_dir,
        Needed(
            calibration.num_samples,
            calibration.seq_len,
            padded=calibration.layout == "padded",
            clean=calibration.clean,
            encoder=encoder,
        ),
    )


def comparison_notes(loaded: LoadedConfig) -> list[str]:
    """Whether calibration and held-out text look like texts of different kinds.

    From the beginnings of local files; a file that is not there yet, or cannot be read, says nothing.
    """
    path, calibration = calibration_path(loaded), loaded.config.quantize.calibration
    bundled = (path, heldout_path(loaded)) == (CALIBRATION_PATH, HELDOUT_PATH)
    if path is None or bundled or not loaded.has_network or loaded.config.quantize.format == "fp16":
        return []
    source = TextFile(path, calibration.column, calibration.messages)
    texts = (beginning(source), beginning(heldout_file(loaded)))
    return list(comparison_warnings(*map(profile, texts)))


def heldout_warnings(loaded: LoadedConfig, data: CalibrationData) -> list[str]:
    """Whether the windows that were chosen look unlike the held-out text.

    Not a part of the calibration's report: what is quantized does not depend on the held-out text.
    """
    if not loaded.has_network:
        return []
    heldout = profile(beginning(heldout_file(loaded)))
    return list(comparison_warnings(data.characters, heldout))
