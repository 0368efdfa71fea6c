"""build: rank checkpoints -> one engine directory with every rank's network and engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.build_config import BYTE_NEUTRAL, TensorRtConfig
from pipeline.config import LoadedConfig
from pipeline.engine.rank_dirs import (
    finished_dir,
    finished_ranks,
    keep_logs,
    link_rank,
    new_open_dir,
)
from pipeline.engine.tensorrt_request import PlanOptions
from pipeline.errors import Problem, StageError
from pipeline.hardlink import link_or_copy
from pipeline.launch import RankJob, run_in_view
from pipeline.network.limits import BuildLimits
from pipeline.stages.build_tools import effective_backend, known_version, tool_problems
from pipeline.stages.launching import hostfile, launch_needs, launch_problems, max_memory_bytes
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.stages.trtllm import build_with_trtllm
from pipeline.targets import TARGETS
from pipeline.tensorrt_llm_config import WITHOUT_EFFECT_ON_BYTES, image_of

_OPTIONS = {"tensorrt": "tensorrt", "tensorrt_llm": "tensorrt_llm"}
"""Backend -> section of its own options."""
_NEUTRAL_OPTIONS = {*WITHOUT_EFFECT_ON_BYTES, "timing_cache", "environment"}
_TOKENIZER_TOOLS = ("transformers", "tokenizers")
_GRAPH_TOOLS = ("onnx", *_TOKENIZER_TOOLS)
_PROGRAM_BYTES = 512 << 20
"""Libraries and graphs, without weights: twice what was seen."""
_TIMES_WEIGHTS = 2.5
"""Weights that are held at the same time, in units of the rank's checkpoint file."""


class Build(StageDefaults):
    """Exports the ONNX networks and, for a TensorRT backend, compiles and checks them, rank by rank."""

    name = "build"
    resumable = True
    version = 3

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Backend, its own options, and limits; how ranks are launched does not change their bytes."""
        return build_subset(loaded)

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Libraries that write graph and tokenizer, and the compiler."""
        backend = effective_backend(loaded)
        if backend == "tensorrt_rtx":
            return (*_GRAPH_TOOLS, "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
        if backend == "tensorrt_llm":
            return _TOKENIZER_TOOLS
        return (*_GRAPH_TOOLS, "tensorrt") if backend == "tensorrt" else _GRAPH_TOOLS

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What runs the network once, and starts several ranks."""
        return ("onnxruntime", *launch_needs(loaded)) if loaded.has_network else ()

    def target_sm(self, loaded: LoadedConfig) -> int | None:
        """The CPU network does not depend on the GPU."""
        if effective_backend(loaded) == "onnxruntime":
            return None
        return TARGETS[loaded.config.target].sm

    def config_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """A file of hosts that mpirun could not read; a GPU or a compiler that cannot be used."""
        return (*launch_problems(loaded)[0], *tool_problems(loaded))

    def tool_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """No mpirun."""
        return launch_problems(loaded)[1]

    def finished_parts(self, work_dir: Path) -> str:
        """Ranks that were built and checked to the end."""
        ranks = finished_ranks(work_dir)
        return f"ranks built: {', '.join(map(str, ranks))}" if ranks else ""

    def run(self, context: StageContext) -> dict[str, Any]:
        """One worker process per rank: TensorRT-RTX keeps one logger per process."""
        from pipeline.engine import write_engine_config
        from pipeline.runtime.tokenizer import save_tokenizer

        config = context.loaded.config
        if config.build.backend == "tensorrt_llm":
            return build_with_trtllm(context)
        world_size = config.mapping.world_size
        ranks_dir = context.work_dir
        assert ranks_dir is not None
        context.progress.start(world_size, "ranks")
        finished = finished_ranks(ranks_dir)
        if finished:
            context.progress.say(f"{len(finished)} of {world_size} ranks are finished; continuing")
        for rank in finished:
            context.progress.advance(f"rank {rank} is finished")
        _build_ranks(context, [rank for rank in range(world_size) if rank not in finished])
        for rank in range(world_size):
            link_rank(ranks_dir, rank, context.out_dir)
        write_engine_config(
            context.inputs["checkpoint"], context.out_dir, build_limits(context.loaded)
        )
        tokenizer_dir = context.out_dir / "tokenizer"
        tokenizer_dir.mkdir()
        save_tokenizer(context.inputs["source"], tokenizer_dir)
        return _facts(context, world_size)


def _build_ranks(context: StageContext, ranks: Sequence[int]) -> None:
    """Build what is missing; each rank is kept from the moment when it is complete."""
    build, ranks_dir = context.loaded.config.build, context.work_dir
    assert ranks_dir is not None
    if not ranks:
        return
    with tempfile.TemporaryDirectory(prefix=".ranks-", dir=context.out_dir) as scratch:
        jobs = [_rank_job(context, rank, Path(scratch)) for rank in ranks]
        try:
            run_in_view(
                jobs,
                build.launch,
                Path(scratch) / "jobs.json",
                context.progress,
                hostfile=hostfile(context.loaded),
                max_memory_bytes=max_memory_bytes(context.loaded),
            )
        finally:
            keep_logs(ranks_dir, context.out_dir)
    for rank in ranks:
        if rank not in finished_ranks(ranks_dir):
            where = str(finished_dir(ranks_dir, rank))
            what = f"rank {rank} has ended well, and its files are not here"
            raise StageError(Problem(where, what, fix="the store must be shared by all hosts"))


def _rank_job(context: StageContext, rank: int, scratch: Path) -> RankJob:
    """The job that builds one rank in a directory of its own."""
    from pipeline.engine import WorkerRequest, error_path

    config, checkpoint_dir, ranks_dir = (
        context.loaded.config,
        context.inputs["checkpoint"],
        context.work_dir,
    )
    assert ranks_dir is not None
    open_dir = new_open_dir(ranks_dir, rank)
    log_path = context.out_dir / f"rank{rank}.log"
    log_path.touch()
    link_or_copy(log_path, open_dir / log_path.name)  # a rank that is kept keeps its log
    request = WorkerRequest(
        backend=effective_backend(context.loaded),
        checkpoint_dir=checkpoint_dir,
        engine_dir=open_dir,
        rank=rank,
        target=config.target,
        limits=build_limits(context.loaded),
        also_for=config.build.also_for,
        plan_options=plan_options(config.build.tensorrt),
        cache_dir=_cache_dir(context),
        finished_dir=finished_dir(ranks_dir, rank),
        progress_path=scratch / f"{rank}.progress",
    )
    return RankJob(
        rank=rank,
        module="pipeline.engine.worker",
        argument=request.to_json(),
        log_path=str(log_path),
        error_path=str(error_path(open_dir, rank)),
        own_process=True,
        memory_bytes=admitted_bytes((checkpoint_dir / f"rank{rank}.safetensors").stat().st_size),
        progress_path=str(request.progress_path),
        inputs=(str(checkpoint_dir), str(open_dir)),
    )


def admitted_bytes(checkpoint_bytes: int) -> int:
    """Host memory that is set aside for one rank when several are built at the same time.

    Rather too much than too little; `forecast.host` says what is really expected.

    Args:
        checkpoint_bytes: of the rank's file.
    """
    return _PROGRAM_BYTES + int(_TIMES_WEIGHTS * checkpoint_bytes)


def build_subset(loaded: LoadedConfig) -> dict[str, Any]:
    """What of the section decides an engine's bytes: options of other backends do not."""
    build, backend = loaded.config.build, effective_backend(loaded)
    subset = build.model_dump(mode="json", exclude={*BYTE_NEUTRAL, *_OPTIONS.values()})
    subset["backend"] = backend
    if backend != "tensorrt_rtx":
        del subset["also_for"]
    section = _OPTIONS.get(backend)
    if section is not None:
        options = getattr(build, section).model_dump(mode="json", exclude=_NEUTRAL_OPTIONS)
        subset[section] = options
    if backend == "tensorrt_llm":
        # Where a version is installed does not matter; which one it is does.
        subset[backend]["image"] = image_of(build.tensorrt_llm.environment)
        subset[backend]["version"] = known_version(loaded)
    return subset


def plan_options(options: TensorRtConfig) -> PlanOptions:
    """What backend tensorrt's builder gets of the YAML."""
    return PlanOptions(**options.model_dump(exclude={"timing_cache"}))


def _cache_dir(context: StageContext) -> Path | None:
    """Beside the artifacts: every build of a GPU and compiler may use it, whatever its key."""
    if not context.loaded.config.build.tensorrt.timing_cache:
        return None
    return context.out_dir.parent.parent / "timing"


def build_limits(loaded: LoadedConfig) -> BuildLimits:
    """Sizes that the engine is built for."""
    build = loaded.config.build
    return BuildLimits(build.max_batch_size, build.max_seq_len, build.max_input_len)


def _facts(context: StageContext, world_size: int) -> dict[str, Any]:
    """Totals for people, and what each rank's worker measured."""
    from pipeline.engine import BuildFacts, facts_path

    ranks = [
        BuildFacts.from_json(facts_path(context.out_dir, rank).read_text("utf-8"))
        for rank in range(world_size)
    ]
    return {
        "engine_bytes": sum(rank.engine_bytes for rank in ranks),
        "peak_rss_bytes": max(rank.peak_rss_bytes for rank in ranks),
        "ranks": [asdict(rank) for rank in ranks],
    }
