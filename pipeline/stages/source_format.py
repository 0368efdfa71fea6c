"""What a local source says of its own quantization: then the quantize stage has nothing to do."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.checkpoint.source import PLAIN_METHOD, Declared, read_declared
from pipeline.config import LoadedConfig
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES
from pipeline.quant.formats import BUILDABLE
from pipeline.quant.preflight import formats_from_plain
from pipeline.stages.fetch import local_directory

# Format of the YAML for weights of each method, whether or not they have zero points.
_USUAL_FORMAT = {"awq": "int4_awq", "gptq": "int4_gptq"}
_MAKERS = {"modelopt": "ModelOpt", "awq": "AutoAWQ", "gptq": "GPTQ"}


def quantized_source(loaded: LoadedConfig) -> Declared | None:
    """How the weights of a local directory are quantized; None if they are plain, or not here yet.

    Reads config files only. A config that cannot be read or is not supported is None as well: `plan`
    lists what is wrong with it.
    """
    directory = local_directory(loaded)
    if directory is None:
        return None
    requantize = loaded.config.quantize.asymmetric == "requantize"
    try:
        declared = read_declared(directory, requantize=requantize)
    except CheckpointError:
        return None
    return None if declared.method == PLAIN_METHOD else declared


def format_problems(
    loaded: LoadedConfig, declared: Declared | None, architecture: str
) -> Iterator[Problem]:
    """Whether `quantize` in the YAML fits the source: the same format, or one that can be made.

    A source whose format its own architecture does not have is left to `open_checkpoint`.
    """
    quantize = loaded.config.quantize
    where = loaded.where("quantize", "format")
    if declared is None:
        yield from _plain_problems(where, quantize.format, architecture)
        return
    if declared.format.name not in BUILDABLE and not loaded.converts_only:
        what = f"the source is {declared.format.name}, which is converted but not built"
        fix = "give a checkpoint in one of these formats, or stop there: build.backend: none"
        yield Problem(where, what, ", ".join(BUILDABLE), fix)
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
