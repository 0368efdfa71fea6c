"""`data`: the calibration data of a build before anything is quantized, as a page or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.calibration_config import HubFile
from pipeline.checkpoint import read_config
from pipeline.config import LoadedConfig
from pipeline.errors import PlanError, Problem
from pipeline.models import shape_from_hf
from pipeline.plan import make_plan
from pipeline.quant.data import CalibrationData
from pipeline.quant.data.selection import decoded
from pipeline.quant.light_tokenizer import encoder_of
from pipeline.quant.source import refuse_foreign_tokens
from pipeline.stages.fetch import local_directory
from pipeline.stages.texts import heldout_warnings, load_calibration, text_problems
from pipeline.workspace import Workspace

_SHOWN_SAMPLES = 3
_SHOWN_CHARS = 400
_BAR_WIDTH = 40


@dataclass(frozen=True)
class DataPage:
    """What the quantizer will see.

    Attributes:
        source: which file it comes from.
        data: windows and report.
        warnings: of the report, and of the comparison with the held-out text.
        samples: text of the first windows.
    """

    source: str
    data: CalibrationData
    warnings: tuple[str, ...]
    samples: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `warnings` has those of the comparison with the held-out text, too."""
        report = {**self.data.report, "warnings": list(self.warnings)}
        return {"source": self.source, "calibration": report, "samples": list(self.samples)}


def look_at_data(loaded: LoadedConfig, workspace: Workspace) -> DataPage:
    """The windows that `quantize` will use, chosen in the same way; needs no torch for most models.

    Downloads a file that is on the Hub.

    Raises:
        PlanError: the weights are not fetched yet, so there is no tokenizer; the build quantizes
            nothing; or anything that is wrong with the texts.
        CheckpointError: the tokenizer cannot be read, or does not fit the weights.
        ToolError: a download failed.
    """
    calibration = loaded.config.quantize.calibration
    if loaded.config.quantize.format == "fp16":
        what = "fp16 is not quantized, so it needs no calibration data"
        raise PlanError(Problem(loaded.where("quantize", "format"), what))
    source_dir = _source_dir(loaded, workspace)
    problems = list(text_problems(loaded, source_dir))
    if problems:
        raise PlanError(problems)
    encoder = encoder_of(source_dir, dialogues=calibration.messages is not None)
    vocab_size = shape_from_hf(read_config(source_dir)).vocab_size
    data = load_calibration(loaded, encoder, vocab_size)
    refuse_foreign_tokens(data.windows, vocab_size, source_dir)
    return DataPage(
        source=_source_text(loaded),
        data=data,
        warnings=(*data.warnings, *heldout_warnings(loaded, data)),
        samples=tuple(decoded(data.windows, encoder, _SHOWN_SAMPLES)),
    )


def _source_dir(loaded: LoadedConfig, workspace: Workspace) -> Path:
    local = local_directory(loaded)
    if local is not None:
        return local
    fetched = make_plan(loaded, workspace.store, workspace.digests()).step("fetch").artifact
    if fetched is None:
        what = "the model is not fetched yet, so there is no tokenizer for the data"
        raise PlanError(Problem(loaded.where("model"), what, fix="trtpipe run, or --weights DIR"))
    return fetched.path


def _source_text(loaded: LoadedConfig) -> str:
    calibration = loaded.config.quantize.calibration
    data = calibration.data
    name = data
    if isinstance(data, HubFile):
        name = f"{data.file} of {data.hub} at {data.revision[:12]}"
    column = calibration.messages or calibration.column
    return f"{name}, {column}" if column else str(name)


def page_text(page: DataPage) -> str:
    """A page: what was chosen, what it covers, what is doubtful, and the first samples."""
    return "\n".join([*_facts(page), "", *_samples(page)])


def _facts(page: DataPage) -> Iterator[str]:
    facts = page.data.report
    documents, vocabulary = facts["documents"], facts["vocabulary"]
    rare = vocabulary["rare"]
    yield f"calibration data: {page.source}"
    yield (
        f"samples     {facts['num_windows']} of {facts['num_windows_available']} windows of "
        f"{facts['seq_len']} tokens, {facts['layout']}, chosen by {facts['strategy']}, seed "
        f"{facts['seed']}"
    )
    yield f"tokens      {facts['num_tokens']} of {facts['num_text_tokens']}"
    yield f"sha256      {facts['tokens_sha256']}"
    yield f"documents   {', '.join(_document_counts(documents))}"
    coverage = f"{vocabulary['distinct']} of {vocabulary['size']} ids"
    yield (
        f"vocabulary  {coverage} ({vocabulary['coverage']:.1%}), "
        f"{rare['ids_covered']} of the text's {rare['ids']} rare ids"
    )
    yield (
        f"rare tokens {rare['share']:.1%} of the samples, {rare['share_available']:.1%} of the text "
        f"(rare: {rare['definition']})"
    )
    yield f"scripts     {_shares(facts['scripts']) or 'no letters'}"
    yield f"characters  {_shares(facts['characters'])}"
    yield from _histogram(facts["document_tokens"])
    yield from (f"warning: {warning}" for warning in page.warnings)


def _document_counts(documents: dict[str, int]) -> Iterator[str]:
    yield f"{documents['read']} read, {documents['encoded']} in the pool"
    for name, count in documents.items():
        if count and name not in ("read", "encoded", "kept"):
            yield f"{count} {name.replace('_', ' ')}"


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:6])


def _histogram(lengths: dict[str, Any]) -> Iterator[str]:
    """Bars of the classes from the first to the last that has a document."""
    edges, counts = lengths["edges"], lengths["counts"]
    used = [index for index, count in enumerate(counts) if count]
    yield f"tokens of a document: median {lengths['median']:.0f}, longest {lengths['longest']}"
    for index in range(used[0], used[-1] + 1):
        bar = "#" * round(_BAR_WIDTH * counts[index] / max(counts))
        yield f"  {edges[index]:>7} to {edges[index + 1] - 1:<7} {counts[index]:>7} {bar}".rstrip()


def _samples(page: DataPage) -> Iterator[str]:
    for number, text in enumerate(page.samples, start=1):
        more = " ..." if len(text) > _SHOWN_CHARS else ""
        yield f"--- sample {number} of {page.data.report['num_windows']}"
        yield "".join(map(_visible, text[:_SHOWN_CHARS])) + more


def _visible(character: str) -> str:
    """Texts of strangers may hold what moves a terminal's cursor, or worse."""
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")
