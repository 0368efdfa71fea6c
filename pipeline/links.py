"""Symbolic links that lead in a circle: found before something trips over them, and named.

`Path.resolve` raises RuntimeError on them up to Python 3.12 and nothing later on; `resolved` is the same
everywhere.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pipeline.errors import Problem


def resolved(path: Path) -> Path:
    """The absolute path that `path` leads to; up to the link, where one leads in a circle."""
    return Path(os.path.realpath(path))


def circle_problem(path: Path) -> Problem | None:
    """The problem of a path that leads in a circle, naming the link; None for any other path."""
    for part in (*reversed(path.parents), path):
        if _leads_in_a_circle(part):  # a link: what is above it has been found good
            what = f"a symbolic link that leads in a circle (to {part.readlink()})"
            return Problem(str(part), what, fix="remove it, or let it lead to what is meant")
    return None


def _leads_in_a_circle(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    except ValueError:  # no name of a file at all, which is for whoever opens it to say
        return False
    return False
