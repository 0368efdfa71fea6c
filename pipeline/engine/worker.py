"""Entry of the process that builds one rank: `python -m pipeline.engine.worker REQUEST_JSON`.

Leaves rank{r}.facts.json beside the engine and prints the same JSON as its last lines. When it
fails, the problems are the last lines, rank{r}.error.json has them as data, and the exit code is that
of their kind.
"""

from __future__ import annotations

import json
import os
import sys

from pipeline.engine import BACKENDS, WorkerRequest, error_path, facts_path
from pipeline.errors import PipelineError, error_to_json
from pipeline.orphans import die_with_parent


class _LogProgress:
    """Progress as plain lines."""

    def start(self, total: int, unit: str) -> None:
        print(f"{total} {unit}", flush=True)

    def advance(self, note: str = "") -> None:
        print(f"  {note}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


def main(argument: str) -> int:
    """Build one rank; the exit code is that of the first thing that went wrong, or 0."""
    die_with_parent(os.getppid())
    request = WorkerRequest.from_json(argument)
    try:
        facts = BACKENDS[request.backend].build_rank(request, _LogProgress())
    except PipelineError as error:
        print(error, file=sys.stderr, flush=True)
        path = error_path(request.engine_dir, request.rank)
        path.write_text(json.dumps(error_to_json(error)), encoding="utf-8")
        return int(error.exit_code)
    text = facts.to_json()
    facts_path(request.engine_dir, request.rank).write_text(text, encoding="utf-8")
    print(text, end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
