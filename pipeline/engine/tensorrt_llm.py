"""Backend `tensorrt_llm`: trtllm-build of TensorRT-LLM 1.2 builds all ranks from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import Problem
from pipeline.network.limits import BuildLimits
from pipeline.quant.backends import TENSORRT_LLM, formats_for, refusal
from pipeline.quant.formats import MIXABLE
from pipeline.targets import TARGETS, Target

_ORIN_SM = 87


class TensorRtLlmBackend:
    """What TensorRT-LLM can build; `pipeline.engine.trtllm_build` drives it."""

    name = TENSORRT_LLM

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """None, or what TensorRT-LLM refuses there and what works."""
        able = [known.name for known in TARGETS.values() if _runs(known.sm, formats)]
        if target.sm == _ORIN_SM:
            what = (
                f"TensorRT-LLM 1.2 has no build for {target.name} (its Jetson branch ends at 0.12)"
            )
            return Problem("target", what, ", ".join(able), "build.backend: tensorrt")
        for name in formats:
            refused = refusal(name, self.name, target.sm)
            if refused is None:
                continue
            what = f"{name} for {target.name} (SM{target.sm}): {refused.reason} ({refused.source})"
            others = formats_for(self.name, target.sm, MIXABLE)
            fix = f"quantize.format {', '.join(others)}" if others else "build.backend: tensorrt"
            return Problem("target", what, allowed=", ".join(able), fix=fix)
        return None

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """Never by the limits alone; flags are checked by `pipeline.engine.trtllm_flags`."""
        return None

    def head_size_problem(self, head_size: int) -> Problem | None:
        """None is known of."""
        return None


def _runs(sm: int, formats: Sequence[str]) -> bool:
    return sm != _ORIN_SM and all(refusal(name, TENSORRT_LLM, sm) is None for name in formats)
