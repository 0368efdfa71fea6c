"""What the YAML's `quantize` section asks for and nobody can do, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.config import LoadedConfig
from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, ModelShape
from pipeline.models.linears import decoder_linears
from pipeline.quant.backends import TENSORRT_LLM, kv_cache_refusal, lm_head_refusal, refusal
from pipeline.quant.choose import (
    MODELOPT_SEARCH,
    budget_bits,
    is_kept,
    split_groups,
    unused_patterns,
)
from pipeline.quant.formats import MIXABLE, MIXED, QuantFormat
from pipeline.quant.recipe import ALGORITHMS
from pipeline.quant.sensitivity.groups import budget_problems, candidates, format_groups
from pipeline.targets import TARGETS

_SHOWN = 3
DEVICES = Path("/dev")


def quantize_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """Fields that do not go together; of a source that is to be quantized."""
    yield from _algorithm_problems(loaded)
    yield from _budget_problems(loaded)
    yield from _idle_problems(loaded)
    yield from _device_problems(loaded)
    quantize = loaded.config.quantize
    if quantize.format == "fp16" and quantize.kv_cache != "fp16":
        what = f"{quantize.kv_cache}, but nothing is calibrated with quantize.format fp16"
        where = loaded.where("quantize", "kv_cache")
        yield Problem(where, what, "fp16", "choose another quantize.format")


def calibration_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    """Windows that are longer than the model's positions, where anything is calibrated."""
    quantize, limit = loaded.written.quantize, shape.max_position_embeddings
    if quantize.format != "fp16" and quantize.calibration.seq_len > limit:
        where = loaded.where("quantize", "calibration", "seq_len")
        what = f"{quantize.calibration.seq_len} is more than the model's max_position_embeddings"
        yield Problem(where, what, allowed=f"at most {limit}")


def keep_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    """`keep` patterns that name nothing, or a part of linears that become one."""
    keep, wanted = loaded.config.quantize.keep, loaded.config.quantize.format
    if wanted == "fp16":
        return
    where = loaded.where("quantize", "keep")
    # Of a mixed build, the check of the budget says it.
    if wanted != MIXED and all(is_kept(name, keep) for name in decoder_linears(shape)):
        yield Problem(where, "names every linear", fix="keep fewer, or set quantize.format: fp16")
    for pattern in unused_patterns(shape, keep):
        what = f"{pattern!r} names no linear of the decoder layers of {shape.architecture}"
        allowed = f"names such as {decoder_linears(shape)[0]}; * stands for anything"
        yield Problem(where, what, allowed)
    split = split_groups(shape, keep)
    for group, kept in list(split.items())[:_SHOWN]:
        what = f"keeps {', '.join(kept[:_SHOWN])} without the others of its group"
        others = ", ".join(name for name in group if name not in kept)
        fix = f"keep {others} too: TensorRT-LLM joins them to one linear"
        yield Problem(where, what, fix=fix)
    if len(split) > _SHOWN:
        yield Problem(where, f"and {len(split) - _SHOWN} groups more in the same way")


def lm_head_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    """A head that is rounded where nothing else is, that is no tensor of its own, or cannot run."""
    config = loaded.config
    wanted, where = config.quantize.lm_head, loaded.where("quantize", "lm_head")
    if wanted == "fp16":
        return
    if config.quantize.format == "fp16":
        what = f"{wanted}, but nothing is quantized with quantize.format fp16"
        yield Problem(where, what, "fp16", "choose another quantize.format")
    if ARCHITECTURES[shape.architecture].shares_head:
        what = f"{wanted}, but {shape.architecture} always shares its head with the embedding"
        yield Problem(where, what, "fp16")
    num_rows = -(-shape.vocab_size // config.mapping.tp)
    if num_rows % 2 and config.build.backend.startswith("tensorrt"):
        what = (
            f"{wanted}, but lm_head has {num_rows} rows on a rank: TensorRT fuses no product with "
        )
        yield Problem(where, f"{what}an odd number", "fp16")
    backend = TENSORRT_LLM if loaded.converts_only else config.build.backend
    refused = lm_head_refusal(wanted, backend, TARGETS[config.target].sm)
    if refused is not None and not loaded.converts_only:
        yield Problem(where, f"{wanted}: {refused.reason} ({refused.source})", "fp16")


def kv_cache_problems(loaded: LoadedConfig, fmt: QuantFormat) -> Iterator[Problem]:
    """A quantized KV cache for an engine that keeps its own in fp16."""
    config = loaded.config
    refused = kv_cache_refusal(fmt.kv_cache, config.build.backend, TARGETS[config.target].sm)
    if refused is not None and not loaded.converts_only:
        where = loaded.where("quantize", "kv_cache")
        fix = "build.backend: tensorrt_llm, or none to end with the checkpoint and its scales"
        yield Problem(where, f"{fmt.kv_cache}: {refused.reason}", "fp16", fix)


def formats_to_mix(loaded: LoadedConfig) -> tuple[str, ...]:
    """The formats that a mixed build may choose from: what its backend runs on its target."""
    backend = TENSORRT_LLM if loaded.converts_only else loaded.config.build.backend
    return candidates(backend, TARGETS[loaded.config.target].sm)


def mix_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    """A budget that no choice of formats for this model can meet; stages that would differ."""
    quantize, pp = loaded.config.quantize, loaded.config.mapping.pp
    bits = budget_bits(quantize.budget or "")
    if quantize.format == MIXED and pp > 1:
        what = (
            f"{pp}, but format mixed chooses for each layer by itself; TensorRT-LLM counts layers "
            "from the first of a stage, and takes the formats at a place to be those of every stage"
        )
        fix = "pp: 1 with a larger tp, or one format for all layers"
        yield Problem(loaded.where("mapping", "pp"), what, "1", fix)
    if quantize.format != MIXED or bits is None or list(_budget_problems(loaded)):
        return
    formats = formats_to_mix(loaded)
    if not formats:
        return  # the backend compiles nothing for the target, which is another problem
    groups = format_groups(shape, quantize.keep)
    for problem in budget_problems(groups, formats, quantize.group_size, bits):
        yield replace(problem, where=loaded.where(*problem.where.split(".")))


def tensorrt_llm_notes(loaded: LoadedConfig, fmt: QuantFormat) -> Iterator[str]:
    """What TensorRT-LLM could not do on the target with a checkpoint that is the end of the build."""
    if not loaded.converts_only:
        return
    target = TARGETS[loaded.config.target]
    on = f"on {target.name} (SM{target.sm})"
    for part in fmt.parts:
        refused = refusal(part.name, TENSORRT_LLM, target.sm)
        if refused is not None:
            yield f"TensorRT-LLM does not run {part.name} {on}: {refused.reason} ({refused.source})"
    refused = kv_cache_refusal(fmt.kv_cache, TENSORRT_LLM, target.sm)
    if refused is not None:
        yield f"TensorRT-LLM does not run this KV cache {on}: {refused.reason} ({refused.source})"


def _device_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.quantize.device == "cuda" and not has_nvidia_device(DEVICES):
        where, what = loaded.where("quantize", "device"), "cuda, but this machine has no NVIDIA GPU"
        fix = "plan where the GPU is, or set quantize.device: cpu"
        yield Problem(where, what, "cpu", fix)


def has_nvidia_device(directory: Path) -> bool:
    """Whether the driver shows a GPU there; asked without torch."""
    return any(next(directory.glob(name), None) for name in ("nvidia[0-9]*", "dxg"))


def _algorithm_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    quantize = loaded.config.quantize
    name, algorithm = quantize.format, quantize.algorithm
    formats = MIXABLE if name == MIXED else (name,)
    known = list(dict.fromkeys(one for fmt in formats for one in ALGORITHMS.get(fmt, ())))
    if algorithm is not None and algorithm not in known:
        where = loaded.where("quantize", "algorithm")
        makes = " or ".join(fmt for fmt, names in ALGORITHMS.items() if algorithm in names)
        what = f"{algorithm} does not make {name}" if known else f"{name} is not rounded"
        fix = f"remove it, or set quantize.format to {makes}"
        yield Problem(where, what, ", ".join(known), fix)
    if quantize.search == "modelopt" and known and name not in (*MODELOPT_SEARCH, MIXED):
        where = loaded.where("quantize", "search")
        what = f"ModelOpt has no {name}"
        yield Problem(where, what, "gram", f"ModelOpt makes {', '.join(MODELOPT_SEARCH)}")


def _idle_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """Fields that the YAML sets and that would change nothing."""
    quantize = loaded.config.quantize
    if quantize.format != MIXED and quantize.sensitivity != "layer":
        what = f"{quantize.sensitivity}, but every linear becomes {quantize.format}"
        fix = "set quantize.format: mixed, or remove it"
        yield Problem(loaded.where("quantize", "sensitivity"), what, fix=fix)
    calibration = quantize.calibration
    if calibration.layout == "packed" and calibration.padding != "right":
        where = loaded.where("quantize", "calibration", "padding")
        what = f"{calibration.padding}, but packed windows have no padding"
        yield Problem(where, what, fix="set layout: padded, or remove it")


def _budget_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    quantize = loaded.config.quantize
    where = loaded.where("quantize", "budget")
    if quantize.budget is None:
        if quantize.format == MIXED:
            what = "format mixed needs a budget to choose formats by"
            yield Problem(where, what, fix='add `budget: "4.5 bits"`')
        return
    if quantize.format != MIXED:
        what = f"{quantize.budget!r}, but every linear becomes {quantize.format}"
        yield Problem(where, what, fix="set quantize.format: mixed, or remove the budget")
        return
    if budget_bits(quantize.budget) is None:
        yield Problem(where, f"{quantize.budget!r} is no budget", '"<number> bits": "4.5 bits"')
