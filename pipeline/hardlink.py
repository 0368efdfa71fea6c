"""The same bytes under a second name, without taking space a second time where that is possible."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to what `source` leads to; a copy across file systems.

    Raises:
        OSError: `target` exists, or cannot be written.
    """
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise  # a copy would write through the link, into whatever shares it
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
