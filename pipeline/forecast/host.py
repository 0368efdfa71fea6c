"""What each stage takes on the machine that runs it: anonymous memory, bytes on disk, time.

Memory follows the code: quantize and verify hold one decoder layer, convert a few blocks, a TensorRT
build almost two engines. The constants are what benchmarks/plan_against_reality.py saw. Page cache
is not counted: the system takes it back.

Shapes: N output features, K input features of a linear; H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from pipeline.checkpoint.layout import TargetTensor, layer_targets, planned_sizes
from pipeline.forecast.activations import CODE_BYTES_PER_LAYER
from pipeline.forecast.rates import Seconds, added, band
from pipeline.forecast.subject import Subject
from pipeline.forecast.weights import checkpoint_bytes, engine_weights, table_bytes
from pipeline.models import ModelShape
from pipeline.parallel import Mapping
from pipeline.quant.formats import FORMATS
from pipeline.stages.build import admitted_bytes

MB: Final = 1_000_000
_FLOAT32, _FLOAT16 = 4, 2


@dataclass(frozen=True)
class Text:
    """How much text a stage reads."""

    num_windows: int
    seq_len: int
    batch_size: int = 1

    @property
    def num_tokens(self) -> int:
        """All windows."""
        return self.num_windows * self.seq_len


@dataclass(frozen=True)
class Work:
    """What the stages do, beside the subject.

    Attributes:
        source: where weights come from: "local", "hub" or "synthetic".
        source_bytes: of the original's tensors.
        calibration, heldout: texts.
        launch: how ranks are started.
        max_memory_bytes: that ranks may take at the same time; None: what is free.
        compiles: whether the build makes TensorRT plans here.
    """

    source: str
    source_bytes: int
    calibration: Text
    heldout: Text
    launch: str = "sequential"
    max_memory_bytes: int | None = None
    compiles: bool = True


@dataclass(frozen=True)
class StageForecast:
    """One stage.

    Attributes:
        ram_per_process: peak of anonymous memory of one process, in bytes.
        num_processes: that run at the same time.
        disk_written: bytes of its artifact, links not counted.
        disk_beside: bytes that it needs on the disk while it runs, beside its artifact.
        seconds: from, to.
        rank_ram: of a stage with one process for each rank: of each.
    """

    stage: str
    ram_per_process: int
    num_processes: int
    disk_written: int
    seconds: Seconds
    disk_beside: int = 0
    rank_ram: tuple[int, ...] = ()

    @property
    def ram_peak(self) -> int:
        """Of all processes together."""
        return self.ram_per_process * self.num_processes


def stage_forecast(
    stage: str, subject: Subject, work: Work, cores: int, free_memory: int
) -> StageForecast:
    """One stage by its name.

    Args:
        cores, free_memory: of the machine.
    """
    functions = {
        "fetch": _fetch,
        "quantize": _quantize,
        "convert": _convert,
        "build": _build,
        "verify": _verify,
        "serve": _serve,
        "kit": _kit,
    }
    return functions[stage](subject, work, cores, free_memory)


def layer_weights(shape: ModelShape) -> int:
    """Elements of one decoder layer, all experts included."""
    return sum(math.prod(t.spec(Mapping()).shape) for t in _layer_targets(shape))


def _layer_targets(shape: ModelShape) -> list[TargetTensor]:
    return layer_targets(shape, FORMATS["fp16"], 0, 0)


def _embedding_bytes(shape: ModelShape, element: int) -> int:
    return shape.vocab_size * shape.hidden_size * element


_PYTHON = 32 * MB
"""A stage's process that computes nothing."""
_TORCH = 490 * MB
"""torch, transformers and ModelOpt, loaded."""


def _fetch(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    written = work.source_bytes if work.source != "local" else 0
    rate = {"hub": "download", "synthetic": "synthesize"}.get(work.source, "hash")
    amount = written if written else work.source_bytes
    seconds = added(band("start", 1, cores), band(rate, amount, cores))
    ram = _PYTHON + (6 * MB * cores if written else 2 * MB)
    return StageForecast("fetch", ram, 1, written, seconds)


def _quantize(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    """One layer: its weights, their rounded copy, the second moments of its inputs, activations."""
    shape, text = subject.shape, work.calibration
    layer = layer_weights(shape)
    hidden = text.num_tokens * shape.hidden_size * _FLOAT16
    in_memory = 2 * hidden if 2 * hidden <= free_memory // 4 else 0
    used_rows = min(shape.vocab_size, text.num_tokens) * shape.hidden_size * _FLOAT16
    ram = (
        _TORCH
        + int(layer * _FLOAT16 * LAYER_COPIES)
        + _moments(shape, text)
        + _pass_bytes(shape, text)
        + in_memory
        + used_rows
    )
    written = sum(planned_sizes(shape, subject.format, [Mapping()]))
    if subject.budget_bits is not None:
        written = checkpoint_bytes(_whole(subject))[0]
    operations = 2 * 2 * layer * shape.num_layers * text.num_tokens
    seconds = added(
        band("start", 1, cores),
        band("quantize weights", layer * shape.num_layers, cores),
        band("multiply", operations, cores),
        band("hash", written, cores),
    )
    return StageForecast("quantize", ram, 1, written, seconds, disk_beside=2 * hidden)


LAYER_COPIES: Final = 2.2
"""Of a layer's float16 weights: the weights, their rounded values, and what is packed."""


def _whole(subject: Subject) -> Subject:
    return replace(subject, tp=1, pp=1, moe_ep=1)


def _moments(shape: ModelShape, text: Text) -> int:
    """Of every distinct input of a layer: G [K, K] float32, or the tokens while they are few."""
    ffn = shape.padded_intermediate_size or shape.intermediate_size
    sizes = [shape.hidden_size, shape.num_heads * shape.head_size, shape.hidden_size]
    sizes += [ffn] * max(1, shape.num_experts)
    tokens = text.num_tokens
    if shape.num_experts:
        tokens = tokens * shape.experts_per_token // shape.num_experts

    def one(features: int) -> int:
        if tokens > features // 2:
            return features * features * _FLOAT32
        return tokens * features * (_FLOAT16 + _FLOAT32)

    return sum(map(one, sizes))


def _pass_bytes(shape: ModelShape, text: Text) -> int:
    """Activations of one batch in a layer, in float32."""
    windows = min(text.batch_size, text.num_windows)
    tokens = windows * text.seq_len
    ffn = shape.padded_intermediate_size or shape.intermediate_size
    scores = windows * shape.num_heads * text.seq_len**2
    return _FLOAT32 * (tokens * (4 * shape.hidden_size + 3 * ffn) + scores)


def _convert(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    written = sum(checkpoint_bytes(subject))
    read = work.source_bytes if subject.format.name == "fp16" else written
    processes = max(1, min(subject.world_size, cores, 1 + read // 2**30))
    seconds = added(
        band("start", 1, cores),
        band("convert", max(read, written), cores),
        band("hash", written, cores),
    )
    ram = _PYTHON + 6 * MB
    extra = 1 if processes > 1 else 0
    return StageForecast("convert", ram, processes + extra, written, seconds)


def engine_bytes(subject: Subject, mapping: Mapping) -> int:
    """What a rank's TensorRT plan weighs: weights and about 1 MB of code a layer."""
    layers = -(-subject.shape.num_layers // subject.pp)
    return engine_weights(subject, mapping).total + layers * CODE_BYTES_PER_LAYER


def exported_bytes(subject: Subject, mapping: Mapping) -> int:
    """The weights file of a rank: rotary tables are there twice, as float16 and float32."""
    tables = table_bytes(subject.shape, subject.limits.max_seq_len)
    return engine_weights(subject, mapping).total + 2 * tables


def _build(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    ranks = subject.ranks
    rank_ram = tuple(_rank_ram(subject, work, mapping) for mapping in ranks)
    at_once = 1
    if work.launch == "mpirun":
        room = work.max_memory_bytes or free_memory
        admitted = max(map(admitted_bytes, checkpoint_bytes(subject)))
        at_once = max(1, min(len(ranks), room // admitted))
    exported = sum(exported_bytes(subject, mapping) for mapping in ranks)
    plans = sum(engine_bytes(subject, mapping) for mapping in ranks) if work.compiles else 0
    written = exported + plans
    seconds = added(
        band("start", 2 * len(ranks), cores),
        band("export", exported, cores),
        band("compile", plans, cores),
        band("hash", written, cores),
    )
    return StageForecast("build", max(rank_ram), at_once, written, seconds, rank_ram=rank_ram)


_GRAPH = 245 * MB
"""A rank's process with onnx and ONNX Runtime loaded, and the stage that started it."""
_COMPILER = 280 * MB
"""The same with TensorRT-RTX."""
COMPILED_COPIES: Final = 1.8
"""Of the weights of decoder layers, that TensorRT-RTX holds while compiling; of the others one."""
COMPILED_LAYER: Final = 10 * MB
"""Of the graph, for each layer."""


def _rank_ram(subject: Subject, work: Work, mapping: Mapping) -> int:
    if work.compiles:
        return _COMPILER + _compiled_bytes(subject, mapping)
    weights = engine_weights(subject, mapping)
    if subject.world_size > 1:  # segments of the network are loaded one after the other
        return _GRAPH + 2 * weights.total // max(1, subject.shape.num_layers)
    # Loaded once as a whole: codes in the kernels' order, and what is float16 as float32.
    return _GRAPH + weights.codes + weights.scales + 2 * (weights.plain - weights.embeddings)


def _compiled_bytes(subject: Subject, mapping: Mapping) -> int:
    shape, weights = subject.shape, engine_weights(subject, mapping)
    table = _embedding_bytes(shape, _FLOAT16) // subject.tp
    is_first, is_last = mapping.pp_rank == 0, mapping.pp_rank == subject.pp - 1
    outside = min(weights.plain, table * (is_first + is_last))
    inside = weights.total - outside
    layers = -(-shape.num_layers // subject.pp)
    return outside + int(COMPILED_COPIES * inside) + layers * COMPILED_LAYER


HEAD_COPIES: Final = 2.5
"""Of lm_head in float32: the original's, the network's, and what one of them was read from."""
RANK_BYTES: Final = 120 * MB
"""A rank's process with ONNX Runtime loaded, beside the one that compares."""
GROUP_BYTES: Final = 1 << 29
"""Most hidden states that a rank takes through its segments together: engine.sharded.GROUP_BYTES."""


def _verify(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    """One layer of the original in float32, one segment of the network, lm_head; hidden states of all
    windows lie on the disk, and each rank has those of a group, before and behind a segment."""
    shape, text = subject.shape, work.heldout
    layer = layer_weights(shape)
    hidden = text.num_tokens * shape.hidden_size * _FLOAT32
    ram = (
        _TORCH
        + layer * _FLOAT32
        + int(HEAD_COPIES * _embedding_bytes(shape, _FLOAT32))
        + 2 * min(hidden, GROUP_BYTES) * subject.world_size
        + (subject.world_size * RANK_BYTES if subject.world_size > 1 else 0)
        + 2 * min(64 * 2**20, text.seq_len * shape.vocab_size * _FLOAT32)
    )
    operations = 2 * 2 * layer * shape.num_layers * text.num_tokens
    seconds = added(
        band("start", 2, cores),
        band("multiply", operations, cores),
        band("hash", work.source_bytes, cores),
    )
    return StageForecast("verify", ram, 1, 2 * MB, seconds, disk_beside=2 * hidden)


def _serve(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    linked = sum(exported_bytes(subject, mapping) for mapping in subject.ranks)
    seconds = added(band("start", 1, cores), band("hash", linked, cores))
    return StageForecast("serve", _PYTHON + 8 * MB, 1, MB, seconds)


def _kit(subject: Subject, work: Work, cores: int, free_memory: int) -> StageForecast:
    """Checkpoint or networks are linked into it; the tokenizer is saved by transformers."""
    linked = sum(checkpoint_bytes(subject))
    seconds = added(band("start", 1, cores), band("hash", linked, cores))
    return StageForecast("kit", _GRAPH - 50 * MB, 1, MB, seconds)
