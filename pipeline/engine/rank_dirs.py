"""Directories of ranks: one is open while its rank is built, and renamed when the rank is complete.

rank2.open.4711/   what process 4711's build has made so far; nobody else looks at it
rank2/             a complete rank: its files, and parts.json with their sizes
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from pipeline.hardlink import link_or_copy
from pipeline.store import list_files, sync, sync_tree, write_json

_PARTS = "parts.json"


def new_open_dir(ranks_dir: Path, rank: int) -> Path:
    """An empty directory to build a rank in. Removes what earlier builds of it left open."""
    for left_over in ranks_dir.glob(f"rank{rank}.open.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    # A name of its own: what an earlier run started may still be dying.
    path = ranks_dir / f"rank{rank}.open.{os.getpid()}"
    path.mkdir(parents=True)
    return path


def finished_dir(ranks_dir: Path, rank: int) -> Path:
    """Where a complete rank lies, or would."""
    return ranks_dir / f"rank{rank}"


def finish_rank(open_dir: Path, finished: Path) -> None:
    """Make a rank that was built completely a finished one, in one step."""
    sizes = {
        path.relative_to(open_dir).as_posix(): path.stat().st_size
        for path in list_files(open_dir)
        if path.suffix != ".log"  # still being written
    }
    write_json(open_dir / _PARTS, sizes)
    sync_tree(open_dir)
    if finished.exists():  # damaged: `finished_ranks` did not name it
        shutil.rmtree(finished)
    open_dir.rename(finished)
    sync(finished.parent)


def finished_ranks(ranks_dir: Path) -> list[int]:
    """Ranks that are complete, each file still of the size that it was finished with."""
    names = (path.name.removeprefix("rank") for path in ranks_dir.glob("rank*"))
    ranks = sorted(int(name) for name in names if name.isdecimal())
    return [rank for rank in ranks if _is_complete(finished_dir(ranks_dir, rank))]


def link_rank(ranks_dir: Path, rank: int, out_dir: Path) -> None:
    """Give a finished rank's files a second name in `out_dir`."""
    source = finished_dir(ranks_dir, rank)
    for path in list_files(source):
        target = out_dir / path.relative_to(source)
        if path.name != _PARTS and not target.exists():  # a log that this run has written
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, target)


def keep_logs(ranks_dir: Path, out_dir: Path) -> None:
    """Link the logs of open ranks to where a failed stage's evidence is looked for."""
    for path in sorted(ranks_dir.glob("rank*.open.*/*.log")):
        if not (out_dir / path.name).exists():
            link_or_copy(path, out_dir / path.name)


def remove_bulk(open_dir: Path) -> None:
    """Remove everything but logs: a rank that failed is of no use, and its disk may be full."""
    for path in list_files(open_dir):
        if path.suffix != ".log":
            path.unlink()


def _is_complete(directory: Path) -> bool:
    try:
        sizes = json.loads((directory / _PARTS).read_text("utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
