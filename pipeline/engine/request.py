"""One rank to build: what a backend gets, and as JSON on its command line the worker process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.network.limits import BuildLimits


@dataclass(frozen=True)
class WorkerRequest:
    """One rank to build.

    Attributes:
        backend: a name of `pipeline.engine.BACKENDS`.
        checkpoint_dir: TensorRT-LLM checkpoint.
        engine_dir: existing directory without files of this rank.
        target: a name of pipeline.targets.
    """

    backend: str
    checkpoint_dir: Path
    engine_dir: Path
    rank: int
    target: str
    limits: BuildLimits

    @property
    def log_path(self) -> Path:
        """Where a compiler's own log goes."""
        return self.engine_dir / f"rank{self.rank}.{self.backend}.log"

    def to_json(self) -> str:
        """The one argument of `python -m pipeline.engine.worker`."""
        fields = asdict(self)
        fields |= {
            "checkpoint_dir": str(self.checkpoint_dir),
            "engine_dir": str(self.engine_dir),
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> WorkerRequest:
        """The inverse of to_json."""
        fields = json.loads(text)
        return cls(
            backend=fields["backend"],
            checkpoint_dir=Path(fields["checkpoint_dir"]),
            engine_dir=Path(fields["engine_dir"]),
            rank=fields["rank"],
            target=fields["target"],
            limits=BuildLimits(**fields["limits"]),
        )
