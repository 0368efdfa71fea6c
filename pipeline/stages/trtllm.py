"""The build stage of backend tensorrt_llm: one trtllm-build for all ranks."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.engine.backend import BuildFacts
from pipeline.engine.trtllm_build import EngineOrder, build_engines, checkpoint_subject
from pipeline.engine.trtllm_flags import build_arguments
from pipeline.engine.trtllm_version import version_problem
from pipeline.errors import Problem, ToolError
from pipeline.quant.backends import TENSORRT_LLM
from pipeline.stages.build_tools import trtllm_tool
from pipeline.stages.stage import StageContext
from pipeline.targets import TARGETS


def build_with_trtllm(context: StageContext) -> dict[str, Any]:
    """Build, check, add the tokenizer; facts as of the other backends.

    Raises:
        ToolError: the tool is gone, or of a version that cannot build.
        StageError, GateError: see `build_engines`.
    """
    from pipeline.runtime.tokenizer import save_tokenizer

    started = time.monotonic()
    loaded = context.loaded
    build, sm = loaded.config.build, TARGETS[loaded.config.target].sm
    where = loaded.where("build", "tensorrt_llm", "environment")
    tool = trtllm_tool(loaded)
    if tool is None:
        raise ToolError(Problem(where, "trtllm-build is gone", fix="run again"))
    version = tool.version()
    refused = version_problem(version, where)
    if refused is not None:
        raise ToolError(refused)
    subject = checkpoint_subject(build, sm, context.inputs["checkpoint"])
    cache = build.tensorrt_llm.timing_cache
    order = EngineOrder(
        checkpoint_dir=context.inputs["checkpoint"],
        arguments=build_arguments(subject),
        workers=build.tensorrt_llm.workers,
        timing_cache=loaded.resolve(cache, "build", "tensorrt_llm", "timing_cache")
        if cache
        else None,
        version=version,
    )
    context.progress.start(1, "builds")
    context.progress.say(f"trtllm-build {version}: {subject.world_size} rank(s)")
    build_engines(tool, order, context.out_dir, context.out_dir / "trtllm-build.log")
    context.progress.advance(f"{subject.world_size} rank(s)")
    save_tokenizer(context.inputs["source"], context.out_dir / "tokenizer")
    seconds = time.monotonic() - started
    ranks = [
        asdict(_facts(context, rank, version, sm, seconds)) for rank in range(subject.world_size)
    ]
    return {"engine_bytes": sum(rank["engine_bytes"] for rank in ranks), "ranks": ranks}


def _facts(context: StageContext, rank: int, version: str, sm: int, seconds: float) -> BuildFacts:
    """Of one rank; the seconds are those of all, because one program builds them.

    The memory is that of its largest process; of a container, that of the client alone.
    """
    checkpoint: Path = context.inputs["checkpoint"] / f"rank{rank}.safetensors"
    return BuildFacts(
        backend=TENSORRT_LLM,
        rank=rank,
        compiler=f"{TENSORRT_LLM} {version}",
        engine_bytes=(context.out_dir / f"rank{rank}.engine").stat().st_size,
        weight_bytes=checkpoint.stat().st_size,
        seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        sms=(sm,),
    )
