"""What the disk refuses, in words: directories that cannot be written, no space left."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from pipeline.errors import Problem, StageError

_WRITABLE = "make it writable, or run in another directory"
_FREE = "free some space there, or run in another directory"
_FULL = {errno.ENOSPC: _FREE, errno.EDQUOT: _FREE}
"""Nothing but the disk causes these, so they are known even where no file is named."""
_FIXES = {**_FULL, errno.EROFS: _WRITABLE, errno.EACCES: "give this user access to it"}


def write_problem(directory: Path) -> Problem | None:
    """Why files cannot be made in a directory, which may not exist yet. Leaves no trace."""
    try:
        with tempfile.TemporaryFile(dir=nearest_directory(directory)):
            return None
    except OSError as error:
        return Problem(str(directory), os.strerror(error.errno or 0), fix=_WRITABLE)


def nearest_directory(directory: Path) -> Path:
    """The directory, or what it would be made in. A link that leads nowhere is not passed over."""
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory


def not_written(path: Path, error: OSError) -> Problem:
    """A file whose writing the system refused, for a writer that knows its name."""
    fix = _FIXES.get(error.errno or 0, "look at that disk")
    return Problem(str(path), f"cannot be written: {error.strerror or error}", fix=fix)


def disk_error(error: OSError) -> StageError | None:
    """A user's error for what only the disk can cause; None for anything that may be our bug."""
    fixes = _FULL if error.filename is None else _FIXES
    if error.errno not in fixes:
        return None
    where = "writing a file" if error.filename is None else os.fsdecode(error.filename)
    return StageError(Problem(where, os.strerror(error.errno), fix=fixes[error.errno]))
