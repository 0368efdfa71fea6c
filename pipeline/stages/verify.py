"""verify: original model against engine on held-out text; a failed gate stops the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import LoadedConfig
from pipeline.errors import GateError, Problem, ToolError
from pipeline.launch import find_mpirun
from pipeline.stages.launching import hostfile
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.stages.texts import heldout_path, load_heldout, needed_to_read


class Verify(StageDefaults):
    """transformers (fp32) against ONNX Runtime running the engine's own network and weights.

    Both take a layer at a time; the ranks of an engine run together under mpirun.
    """

    name = "verify"
    version = 3

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Windows and gates; which text is an external file. A rehearsal has no gates."""
        subset = loaded.config.verify.model_dump(mode="json", exclude={"data"})
        return {**subset, "rehearsal": loaded.rehearsal}

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """The held-out text."""
        return {"heldout": [heldout_path(loaded)]}

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Both sides of the comparison."""
        return ("torch", "transformers", "onnxruntime", "tokenizers")

    def tool_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """No mpirun for several ranks, however they are built."""
        if loaded.config.mapping.world_size == 1 or loaded.config.build.launch == "mpirun":
            return ()  # then `build` says so
        try:
            find_mpirun()
        except ToolError as error:
            where = loaded.where("mapping")
            fix = "pip install 'trtpipe[mpi]', or another MPI: the ranks are verified together"
            return tuple(replace(problem, where=where, fix=fix) for problem in error.problems)
        return ()

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What reads the text, and lets several ranks work together."""
        mpi = ("mpi4py",) if loaded.config.mapping.world_size > 1 else ()
        return (*needed_to_read(heldout_path(loaded)), *mpi)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Compare, write the report, judge.

        Raises:
            GateError: a gate is not met; the report stays with the log of the failed stage.
        """
        from pipeline.verification import Gates, VerifyOptions, compare, write_report

        verify = context.loaded.config.verify
        options = VerifyOptions(
            num_windows=verify.num_windows,
            seq_len=verify.seq_len,
            gates=None if context.loaded.rehearsal else Gates(**verify.gates.model_dump()),
        )
        report = compare(
            context.inputs["source"],
            context.inputs["engine"],
            load_heldout(context.loaded),
            options,
            context.progress,
            context.out_dir,
            hostfile(context.loaded),
        )
        write_report(report, context.out_dir)
        failed = [verdict for verdict in report.verdicts if not verdict.passed]
        if failed:
            raise GateError(
                Problem(
                    context.loaded.where("verify", "gates", verdict.gate),
                    f"{verdict.measured:.6g} was measured{_note(verdict.note)}",
                    allowed=f"{verdict.comparison} {verdict.limit:.6g}",
                    fix=_fix(verdict.gate),
                )
                for verdict in failed
            )
        # A rehearsal may measure infinity, which is no JSON number.
        return {
            name: value if math.isfinite(value) else str(value)
            for name, value in report.headline().items()
        }


def _fix(gate: str) -> str:
    if gate == "finite":
        return "look at the report beside the log; check the weights of the side that is named"
    return (
        "look at the report beside the log; more calibration samples, a smaller group size or "
        "another format bring the engine closer"
    )


def _note(text: str) -> str:
    return f" ({text})" if text else ""
