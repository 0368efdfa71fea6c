"""One rank for TensorRT's builder, as JSON on a command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pipeline.network.limits import BuildLimits


@dataclass(frozen=True)
class PlanOptions:
    """Of the YAML's `build.tensorrt`; pipeline.build_config says what they mean."""

    profiles: str = "context_and_generation"
    strip_plan: bool = False
    refit: bool = False
    optimization_level: int = 3


@dataclass(frozen=True)
class TensorRtRequest:
    """What a machine with the GPU gets beside the network.

    Attributes:
        rank: whose network.
        target: a name of pipeline.targets.
    """

    rank: int
    target: str
    limits: BuildLimits
    options: PlanOptions

    def to_json(self) -> str:
        """The argument of pipeline.engine.tensorrt_worker."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TensorRtRequest:
        """The inverse of to_json."""
        fields = json.loads(text)
        return cls(
            rank=fields["rank"],
            target=fields["target"],
            limits=BuildLimits(**fields["limits"]),
            options=PlanOptions(**fields["options"]),
        )
