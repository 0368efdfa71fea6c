"""Paths that lead nowhere: found before something trips over them, and named.

Links in a circle: `Path.resolve` raises RuntimeError on them up to Python 3.12 and nothing later on;
`resolved` is the same everywhere. Names that no file can have: `Path.is_file` raises OSError on them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pipeline.errors import Problem

_LONGEST_NAME_BYTES = 255
_LONGEST_PATH_BYTES = 4095


def possible_path(text: str, *, home: bool = True) -> Path:
    """What somebody wrote, as a path.

    Args:
        home: `~` and `~user` at its start are home directories.

    Raises:
        ValueError: no file can have this path; the text says why.
    """
    shown = text if len(text) <= 40 else f"{text[:20]}...{text[-15:]}"
    if "\0" in text:
        raise ValueError(f"{shown!r} holds a null character")
    try:
        path = Path(text).expanduser() if home else Path(text)
        sizes = [len(os.fsencode(part)) for part in (str(path), *path.parts)]
    except RuntimeError:
        raise ValueError(f"{shown!r}: there is no such user") from None
    except UnicodeEncodeError:
        raise ValueError(f"{shown!r} is not text that can name a file") from None
    if max(sizes[1:], default=0) > _LONGEST_NAME_BYTES:
        what = f"has a name of {max(sizes[1:])} bytes; files have at most {_LONGEST_NAME_BYTES}"
        raise ValueError(f"{shown!r} {what}")
    if sizes[0] > _LONGEST_PATH_BYTES:
        raise ValueError(f"{shown!r} is longer than {_LONGEST_PATH_BYTES} bytes")
    return path


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
