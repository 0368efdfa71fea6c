"""Entry of the process that builds one rank: `python -m pipeline.engine.worker REQUEST_JSON`.

Leaves rank{r}.facts.json beside the engine, renames the engine's directory if it was asked to, and
prints the same JSON as its last lines. When it fails, the problems are the last lines,
rank{r}.error.json has them as data, and the exit code is that of their kind.
"""

from __future__ import annotations

import json
import os
import sys

from pipeline.disk import disk_error
from pipeline.engine import RANK_BACKENDS, BuildFacts, WorkerRequest, error_path, facts_path
from pipeline.engine.rank_dirs import finish_rank, remove_bulk
from pipeline.errors import PipelineError, error_to_json
from pipeline.launch import RankProgress
from pipeline.orphans import die_with_parent


def main(argument: str) -> int:
    """Build one rank; the exit code is that of the first thing that went wrong, or 0."""
    die_with_parent(os.getppid())
    request = WorkerRequest.from_json(argument)
    try:
        facts = _build(request)
    except PipelineError as error:
        return _fail(request, error)
    except OSError as error:
        known = disk_error(error)
        if known is None:
            raise
        return _fail(request, known)
    print(facts.to_json(), end="", flush=True)
    return 0


def _build(request: WorkerRequest) -> BuildFacts:
    facts = RANK_BACKENDS[request.backend].build_rank(request, RankProgress(request.progress_path))
    facts_path(request.engine_dir, request.rank).write_text(facts.to_json(), encoding="utf-8")
    if request.finished_dir is not None:
        finish_rank(request.engine_dir, request.finished_dir)
    return facts


def _fail(request: WorkerRequest, error: PipelineError) -> int:
    if request.finished_dir is not None:
        remove_bulk(request.engine_dir)  # first: the disk may be full
    path = error_path(request.engine_dir, request.rank)
    path.write_text(json.dumps(error_to_json(error)), encoding="utf-8")
    print(error, file=sys.stderr, flush=True)
    return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
