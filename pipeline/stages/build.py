"""build: rank checkpoints -> one engine directory with every rank's network and engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config import LoadedConfig
from pipeline.launch import RankJob, run_ranks
from pipeline.network.limits import BuildLimits
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.targets import TARGETS

_GRAPH_TOOLS = ("onnx", "transformers", "tokenizers")


class Build(StageDefaults):
    """Exports the ONNX networks and, for a TensorRT backend, compiles and checks them, rank by rank."""

    name = "build"
    version = 2

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Backend and limits; how ranks are launched does not change their bytes."""
        return loaded.config.build.model_dump(mode="json", exclude={"launch"})

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Libraries that write graph and tokenizer, and the compiler."""
        if loaded.config.build.backend == "tensorrt_rtx":
            return (*_GRAPH_TOOLS, "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
        return _GRAPH_TOOLS

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What runs the network once, and starts several ranks."""
        mpi = ("mpi4py",) if loaded.config.build.launch == "mpirun" else ()
        return ("onnxruntime", *mpi)

    def target_sm(self, loaded: LoadedConfig) -> int | None:
        """The CPU network does not depend on the GPU."""
        if loaded.config.build.backend == "onnxruntime":
            return None
        return TARGETS[loaded.config.target].sm

    def run(self, context: StageContext) -> dict[str, Any]:
        """One worker process per rank: TensorRT-RTX keeps one logger per process."""
        from pipeline.engine import WorkerRequest, error_path, write_engine_config
        from pipeline.runtime.tokenizer import save_tokenizer

        config = context.loaded.config
        limits = build_limits(context.loaded)
        world_size = config.mapping.tp * config.mapping.pp
        context.progress.start(world_size, "ranks")
        jobs = []
        for rank in range(world_size):
            request = WorkerRequest(
                backend=config.build.backend,
                checkpoint_dir=context.inputs["checkpoint"],
                engine_dir=context.out_dir,
                rank=rank,
                target=config.target,
                limits=limits,
            )
            jobs.append(
                RankJob(
                    rank=rank,
                    module="pipeline.engine.worker",
                    argument=request.to_json(),
                    log_path=str(context.out_dir / f"rank{rank}.log"),
                    error_path=str(error_path(context.out_dir, rank)),
                )
            )
        context.progress.say(f"exporting, compiling and checking {world_size} rank(s)")
        run_ranks(
            jobs, config.build.launch, context.out_dir / "jobs.json", context.progress.advance
        )
        write_engine_config(context.inputs["checkpoint"], context.out_dir, limits)
        tokenizer_dir = context.out_dir / "tokenizer"
        tokenizer_dir.mkdir()
        save_tokenizer(context.inputs["source"], tokenizer_dir)
        return _facts(context, world_size)


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
