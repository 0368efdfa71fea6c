"""One rank to build: what a backend gets, and as JSON on its command line the worker process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.engine.tensorrt_request import PlanOptions
from pipeline.network.limits import BuildLimits


@dataclass(frozen=True)
class WorkerRequest:
    """One rank to build.

    Attributes:
        backend: a name of `pipeline.engine.RANK_BACKENDS`.
        checkpoint_dir: TensorRT-LLM checkpoint.
        engine_dir: existing directory without files of this rank.
        target: a name of pipeline.targets.
        plan_options: of backend tensorrt.
        cache_dir: where backend tensorrt keeps timing caches; None: nowhere.
        also_for: further ones that the same engine must run on.
        finished_dir: what engine_dir is renamed to once the rank is complete; None: it stays.
        progress_path: file that gets the progress, for RanksView; None: the log alone.
    """

    backend: str
    checkpoint_dir: Path
    engine_dir: Path
    rank: int
    target: str
    limits: BuildLimits
    plan_options: PlanOptions = field(default_factory=PlanOptions)
    cache_dir: Path | None = None
    also_for: tuple[str, ...] = ()
    finished_dir: Path | None = None
    progress_path: Path | None = None

    @property
    def log_path(self) -> Path:
        """Where a compiler's own log goes."""
        return self.engine_dir / f"rank{self.rank}.{self.backend}.log"

    def to_json(self) -> str:
        """The one argument of `python -m pipeline.engine.worker`."""
        return json.dumps(asdict(self), default=str)

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
            plan_options=PlanOptions(**fields["plan_options"]),
            cache_dir=_path(fields["cache_dir"]),
            also_for=tuple(fields["also_for"]),
            finished_dir=_path(fields["finished_dir"]),
            progress_path=_path(fields["progress_path"]),
        )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
