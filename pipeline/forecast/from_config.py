"""From a YAML and a model's shape to what is forecast."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pipeline.config import HubSource, LoadedConfig, SyntheticSource
from pipeline.forecast.advice import Advice, advice
from pipeline.forecast.changes import Change, nearest_changes
from pipeline.forecast.device import RankMemory, fullest, rank_memories
from pipeline.forecast.disk import StepBytes, disk_forecast
from pipeline.forecast.host import Text, Work, stage_forecast
from pipeline.forecast.judgement import HostForecast
from pipeline.forecast.machine import Machine
from pipeline.forecast.subject import Subject
from pipeline.forecast.weights import checkpoint_bytes, plain_bytes
from pipeline.models import ModelShape
from pipeline.quant.backends import ONNXRUNTIME, TENSORRT_LLM
from pipeline.quant.choose import MAX_BUDGET, budget_bits
from pipeline.quant.formats import KvCache, QuantFormat
from pipeline.stages.build import build_limits
from pipeline.stages.build_tools import kit_reason
from pipeline.targets import TARGETS
from pipeline.tensorrt_llm_config import UPSTREAM_MAX_NUM_TOKENS


@dataclass(frozen=True)
class Forecast:
    """Sizes of a build, in bytes.

    Attributes:
        source_bytes: tensors of the original checkpoint; None before it is fetched.
        rank_bytes: TensorRT-LLM checkpoint file of each rank.
        ranks: memory of the target GPU, of each rank.
        changes: the nearest builds that fit, where this one does not.
        advice: remarks, each with its source.
    """

    subject: Subject
    source_bytes: int | None
    rank_bytes: tuple[int, ...]
    ranks: tuple[RankMemory, ...]
    changes: tuple[Change, ...]
    advice: tuple[Advice, ...]

    @property
    def exact(self) -> bool:
        """Whether sizes of weights are; otherwise formats are still to be chosen, and they follow from
        the budget."""
        return self.subject.budget_bits is None

    @property
    def kv_cache(self) -> KvCache:
        """What the cache holds."""
        return self.subject.format.kv_cache

    @property
    def fullest(self) -> RankMemory:
        """The rank that has least left."""
        return fullest(self.ranks)

    @property
    def free_bytes(self) -> int:
        """Target memory that is left on the fullest rank; negative: missing."""
        return self.fullest.left


def subject_of(loaded: LoadedConfig, shape: ModelShape, fmt: QuantFormat, chosen: bool) -> Subject:
    """Args:
    shape: padded, if the YAML asks for that.
    chosen: whether the formats of all linears are known.
    """
    config, bits = loaded.config, None
    if not chosen:
        bits = budget_bits(config.quantize.budget or "") or MAX_BUDGET
    is_llm = config.build.backend == TENSORRT_LLM
    most_tokens = config.build.tensorrt_llm.max_num_tokens or min(
        UPSTREAM_MAX_NUM_TOKENS, config.build.max_batch_size * config.build.max_seq_len
    )
    return Subject(
        shape=shape,
        format=fmt,
        tp=config.mapping.tp,
        pp=config.mapping.pp,
        moe_ep=config.mapping.moe_ep,
        limits=build_limits(loaded),
        backend=config.build.backend,
        target=TARGETS[config.target],
        budget_bits=bits,
        group_size=config.quantize.group_size,
        max_num_tokens=most_tokens if is_llm else None,
    )


def forecast(subject: Subject, source_bytes: int | None, *, quantized: bool) -> Forecast:
    """Of a shape that can be cut.

    Args:
        quantized: the source is, so its format is not ours to choose.
    """
    ranks = rank_memories(subject)
    changes: tuple[Change, ...] = ()
    if fullest(ranks).verdict != "fits":
        changes = nearest_changes(subject, formats=not quantized)
    return Forecast(
        subject=subject,
        source_bytes=source_bytes,
        rank_bytes=checkpoint_bytes(subject),
        ranks=ranks,
        changes=changes,
        advice=advice(subject),
    )


def host_forecast(
    loaded: LoadedConfig,
    found: Forecast,
    steps: tuple[tuple[str, tuple[str, ...]], ...],
    published: Collection[str],
    machine: Machine,
) -> HostForecast:
    """What the steps that are still to be made take.

    Args:
        steps: (name, names of the steps that it reads), in order.
        published: names of steps whose artifacts stay.
    """
    work = _work(loaded, found)
    stages = tuple(
        stage_forecast(name, found.subject, work, machine.cores, machine.free_memory_bytes)
        for name, _ in steps
    )
    walk = [
        StepBytes(name, reads, stage.disk_written, stage.disk_beside)
        for (name, reads), stage in zip(steps, stages, strict=True)
    ]
    keep_all = loaded.config.run.keep == "all"
    return HostForecast(stages, disk_forecast(walk, published, keep_all=keep_all), machine)


def _work(loaded: LoadedConfig, found: Forecast) -> Work:
    config = loaded.config
    calibration, verify, build = config.quantize.calibration, config.verify, config.build
    source = {HubSource: "hub", SyntheticSource: "synthetic"}.get(type(config.model), "local")
    memory_gb = build.max_memory_gb
    return Work(
        source=source,
        source_bytes=found.source_bytes or plain_bytes(found.subject.shape),
        calibration=Text(calibration.num_samples, calibration.seq_len, calibration.batch_size),
        heldout=Text(verify.num_windows, verify.seq_len),
        launch=build.launch,
        max_memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
        compiles=build.backend != ONNXRUNTIME and kit_reason(loaded) is None,
    )
