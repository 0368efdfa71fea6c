"""Making artifacts visible: a directory is replaced in one step, and can be checked afterwards."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import GateError, Problem
from pipeline.hardlink import link_or_copy
from pipeline.store import (
    LOG,
    MANIFEST,
    canonical_json,
    describe_files,
    file_sha256,
    list_files,
    sync,
    sync_tree,
    write_json,
)

REPAIR = "run the build again: what was changed is made anew"
_UNPUBLISHED = (MANIFEST, "*.log", "rank*.facts.json")


def manifest_digest(document: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its `digest`: an edit shows, whatever it is."""
    content = {name: value for name, value in document.items() if name != "digest"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def damaged_files(directory: Path, manifest: Mapping[str, Any]) -> list[Problem]:
    """Every file that is missing, resized, changed, or not named in the manifest."""
    problems = []
    listed = manifest["files"]
    for name, entry in listed.items():
        path = directory / name
        if not path.is_file():
            problems.append(Problem(str(path), "is missing", fix=REPAIR))
        elif path.stat().st_size != entry["bytes"]:
            what = f"has {path.stat().st_size} bytes, {entry['bytes']} were published"
            what += _other_name(path, name, listed, None)
            problems.append(Problem(str(path), what, fix=REPAIR))
        elif "sha256" in entry and (found := file_sha256(path)) != entry["sha256"]:
            what = "was changed after publishing (sha256 differs)"
            what += _other_name(path, name, listed, found)
            problems.append(Problem(str(path), what, fix=REPAIR))
    for path in list_files(directory):
        name = path.relative_to(directory).as_posix()
        is_cache = "__pycache__" in path.parts  # Python writes it beside a repository's model.py
        if name not in listed and name not in (MANIFEST, LOG) and not is_cache:
            problems.append(Problem(str(path), "is not in the manifest", fix="move it away"))
    return problems


def _other_name(path: Path, name: str, listed: Mapping[str, Any], sha256: str | None) -> str:
    """Whose content a changed file has, if it is that of another published file."""
    size = path.stat().st_size
    like = [other for other, entry in listed.items() if other != name and entry["bytes"] == size]
    if not like:
        return ""
    found = sha256 or file_sha256(path)
    for other in like:
        if listed[other].get("sha256") == found:
            return f"; it holds what was published as {other}"
    return ""


def link_tree(source: Path, destination: Path) -> None:
    """Fill `destination` with an artifact's files as hard links (copies across file systems).

    Logs, a rank's build facts and the manifest stay in the store.
    """
    for path in list_files(source):
        name = path.relative_to(source)
        if any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in _UNPUBLISHED):
            continue
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, target)


def publish(fill: Callable[[Path], None], destination: Path, *, manifest: dict[str, Any]) -> None:
    """Replace `destination` by a new directory in one step.

    Readers see the old directory or the new one, never a mixture and never nothing.

    Args:
        fill: writes the content into the directory it is given.
        destination: the visible directory, made or replaced.
        manifest: written as manifest.json, with the file list and the digest of it all added; none of
            its keys is `files` or `digest`.

    Raises:
        GateError: `destination` exists and was not published by us, so it is not ours to replace.
    """
    if destination.exists() and not (destination / MANIFEST).is_file():
        raise GateError(
            Problem(
                str(destination),
                "exists, and has no manifest.json: it was not published by this program",
                fix="move it away",
            )
        )
    staging = destination.parent / f".{destination.name}.new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        fill(staging)
        document = {**manifest, "files": describe_files(staging)}
        write_json(staging / MANIFEST, {**document, "digest": manifest_digest(document)})
        sync_tree(staging)
        _swap(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(destination.parent)


def _swap(new: Path, visible: Path) -> None:
    """Put `new` in the place of `visible`; afterwards `new` holds the old content, if any."""
    if not visible.exists():
        new.rename(visible)
        return
    if _exchange(new, visible):
        return
    # A file system without RENAME_EXCHANGE: for an instant the name is absent, never half-written.
    old = visible.parent / f".{visible.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    visible.rename(old)
    new.rename(visible)
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """renameat2(RENAME_EXCHANGE); False where kernel, libc or file system lack it."""
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    result: int = renameat2(
        at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange
    )
    return result == 0
