"""What a source says of its own quantization: then the quantize stage has nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.source import PLAIN_METHOD, Declared, declared_in, read_declared
from pipeline.config import HubSource, LoadedConfig, SyntheticSource
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES
from pipeline.quant.preflight import formats_from_plain

# Format of the YAML for weights of each method, whether or not they have zero points.
_USUAL_FORMAT = {"awq": "int4_awq", "gptq": "int4_gptq"}
_MAKERS = {"modelopt": "ModelOpt", "awq": "AutoAWQ", "gptq": "GPTQ"}


@dataclass(frozen=True)
class SourceFormat:
    """How the weights of a source are stored, as far as that can be known now.

    Attributes:
        declared: how they are quantized; None: they are plain, or it is not known yet.
        from_files: the files said so, not `model.shape`.
        problems: why `model.shape` of a model that is not here yet cannot be understood. What is wrong
            with files is left to whoever opens them.
    """

    declared: Declared | None = None
    from_files: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the quantize stage has nothing to do."""
        return self.declared is not None

    def raise_problems(self) -> None:
        """Raise CheckpointError if there are any."""
        if self.problems:
            raise CheckpointError(self.problems)


def source_format(loaded: LoadedConfig, source_dir: Path | None) -> SourceFormat:
    """Reads config files only: of the files where they are here, else the YAML's `model.shape`.

    Args:
        source_dir: where the source can be read; None before a download.
    """
    model = loaded.config.model
    if isinstance(model, SyntheticSource):
        return SourceFormat()
    requantize = loaded.config.quantize.asymmetric == "requantize"
    if source_dir is not None:
        try:
            declared = read_declared(source_dir, requantize=requantize)
        except CheckpointError:
            return SourceFormat()
    elif isinstance(model, HubSource) and model.shape is not None:
        try:
            declared = declared_in(model.shape, requantize=requantize)
        except CheckpointError as error:
            return SourceFormat(problems=error.problems)
    else:
        return SourceFormat()
    quantized = None if declared.method == PLAIN_METHOD else declared
    return SourceFormat(quantized, from_files=source_dir is not None)


def format_problems(
    loaded: LoadedConfig, source: SourceFormat, architecture: str
) -> Iterator[Problem]:
    """Whether `quantize` in the YAML fits the source: the same format, or one that can be made.

    A source whose format its own architecture does not have is left to `open_checkpoint`.
    """
    if source.from_files:
        yield from _shape_problems(loaded, source.declared)
    quantize, declared = loaded.config.quantize, source.declared
    where = loaded.where("quantize", "format")
    if declared is None:
        yield from _plain_problems(where, quantize.format, architecture)
        return
    formats = sorted({declared.format.name, _USUAL_FORMAT.get(declared.method, "")} - {""})
    if quantize.format not in formats:
        what = f"{quantize.format}, but {_MAKERS[declared.method]} has quantized the source already"
        fix = "say what the source is, and it is not quantized again; or give the original weights"
        yield Problem(where, what, " or ".join(formats), fix)
    if declared.format.group_size not in (None, quantize.group_size):
        what = f"{quantize.group_size}, but the source has groups of {declared.format.group_size}"
        where = loaded.where("quantize", "group_size")
        yield Problem(where, what, str(declared.format.group_size))
    yield from _unused_problems(loaded, declared)


def _unused_problems(loaded: LoadedConfig, declared: Declared) -> Iterator[Problem]:
    """What the YAML asks of a quantize stage that will not run."""
    quantize, maker = loaded.config.quantize, _MAKERS[declared.method]
    for name in ("algorithm", "keep", "budget"):
        if getattr(quantize, name):
            what = f"nothing is quantized here: {maker} has done it already"
            yield Problem(loaded.where("quantize", name), what, fix="remove it")
    if quantize.lm_head != "fp16":
        what = f"{quantize.lm_head}, but {maker} has quantized the source already"
        yield Problem(loaded.where("quantize", "lm_head"), what, "fp16", "remove it")
    if quantize.kv_cache not in ("fp16", declared.format.kv_cache):
        what = (
            f"{quantize.kv_cache}, but {maker} has quantized the source already, without its scales"
        )
        yield Problem(loaded.where("quantize", "kv_cache"), what, declared.format.kv_cache)


def _plain_problems(where: str, wanted: str, architecture: str) -> Iterator[Problem]:
    """Of a source that is not quantized: what can be made of it here."""
    allowed = formats_from_plain(architecture)
    if wanted in allowed:
        return
    if wanted in ARCHITECTURES[architecture].formats:
        what = f"{wanted} cannot be made here, and the source is not quantized"
        fix = f"give a checkpoint that is {wanted} already"
    else:
        what = f"{architecture} has no {wanted} here"
        fix = f"set it to {' or '.join(allowed)}"
    yield Problem(where, what, ", ".join(allowed), fix)


def _shape_problems(loaded: LoadedConfig, declared: Declared | None) -> Iterator[Problem]:
    """Whether downloaded weights are quantized as the YAML's `model.shape` says.

    Args:
        declared: of the files; None: plain.
    """
    model = loaded.config.model
    if not isinstance(model, HubSource) or model.shape is None:
        return
    expected = source_format(loaded, None)
    if expected.problems or _described(expected.declared) == _described(declared):
        return
    yield Problem(
        loaded.where("model", "shape", "quantization_config"),
        f"{_described(expected.declared)}, but the weights of {model.id} are {_described(declared)}",
        fix="copy the fields of the model's own config.json",
    )


def _described(declared: Declared | None) -> str:
    if declared is None:
        return "plain"
    size = declared.format.group_size
    groups = f" with groups of {size}" if size is not None else ""
    return f"{declared.format.name} by {_MAKERS[declared.method]}{groups}"
