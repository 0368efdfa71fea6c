"""Artifacts on disk: content keys, atomic commit, locks.

Layout under the root (`engines/.store`):

    <stage>/<key>/            one finished artifact: its files and manifest.json
    work/<key>.<pid>/         an unfinished one; never looked at by a reader
    unfinished/<stage>-<key>/ finished parts of an artifact that a killed run left, and action.json
    failed/<stage>-<key>/     what a failed run left: its log, and reports that explain the failure
    dropped/<stage>-<key>/    manifest, log and reports of an artifact that nothing needed any more
    locks/<key>.lock          held while a key is being made; <key>.use.lock while a run uses it

A directory under <stage>/ is complete by construction: manifest.json is written last, then the whole
directory is renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LOG = "stage.log"
ACTION = "action.json"
SCHEMA = 1
"""Of the store's manifests; one of another schema is a miss."""
_EXPLAINS = (MANIFEST, "*.log", "*report*.json", "*report*.html")
"""What stays of an artifact that is dropped: what it was, and how it came about."""
_TAG = b"trtpipe action 1\n"
_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, no NaN; distinct values differ.

    Raises:
        TypeError: anything that is not None, bool, int, float, str, list, tuple or dict with text keys.
        ValueError: NaN or infinity.
    """
    _check_plain(value)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):  # json would turn 1 and "1" into the same key
                raise TypeError(f"key {key!r} is not text")
            _check_plain(child)
    elif isinstance(value, list | tuple):
        for child in value:
            _check_plain(child)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(f"{type(value).__name__} has no canonical form")


@dataclass(frozen=True)
class Action:
    """Everything that decides the bytes of one artifact.

    Attributes:
        stage: name of the stage.
        version: raised by hand when the stage's output changes for the same input.
        config: the part of the config that the stage reads.
        inputs: role -> identity of the input (key of an artifact, digest of an external file).
        tools: distribution -> version, of the tools whose version may change the output.
        target_sm: compute capability times ten; None when the output does not depend on the GPU.
    """

    stage: str
    version: int
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    target_sm: int | None = None

    def fields(self) -> dict[str, Any]:
        """The action as plain data, the form that is hashed and stored."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @property
    def key(self) -> str:
        """sha256 (64 hexadecimal digits) over the tagged canonical JSON of `fields`."""
        return hashlib.sha256(_TAG + canonical_json(self.fields())).hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Artifact:
    """One finished artifact.

    Attributes:
        path: its directory; read only.
        key: identity.
        manifest: parsed manifest.json.
    """

    path: Path
    key: str
    manifest: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage reported about its output (sizes, perplexities ...)."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts

    @property
    def size_bytes(self) -> int:
        """Sum of the file sizes."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes as 64 hexadecimal digits, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(directory: Path) -> list[Path]:
    """All files below a directory, sorted, links to files included."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Relative name -> {bytes, mtime_ns, sha256} of every file below `directory`.

    The manifest and the log are left out.
    Of a symbolic link the target is noted instead of a hash: links lead to external files, whose content
    is part of the key already.
    """
    described: dict[str, dict[str, Any]] = {}
    for path in list_files(directory):
        name = path.relative_to(directory).as_posix()
        if name in (MANIFEST, LOG):
            continue
        identity = (
            {"link": str(path.readlink())} if path.is_symlink() else {"sha256": file_sha256(path)}
        )
        status = path.stat()
        described[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **identity}
    return described


def is_unchanged(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file still has the size and time that its manifest entry says; reads no content."""
    try:
        status = path.stat()
    except OSError:
        return False
    return bool(status.st_size == entry["bytes"] and status.st_mtime_ns == entry["mtime_ns"])


class Hold:
    """One run's claim on one artifact: while any is held, nobody drops the artifact."""

    def __init__(self, path: Path) -> None:
        """Waits while another process, which is the last holder, drops the artifact."""
        self._stream = path.open("a")
        fcntl.flock(self._stream, fcntl.LOCK_SH)

    def is_the_last(self) -> bool:
        """Whether no other run holds it; then none can until `release`. If not, this hold is gone."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Hold it no more."""
        self._stream.close()


class Store:
    """Artifacts by key under one root directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def artifact_dir(self, action: Action) -> Path:
        """Where the artifact of an action lies, or would."""
        return self.root / action.stage / action.key

    def lookup(self, action: Action) -> Artifact | None:
        """The artifact of an action, or None when it has not been made.

        Sizes and modification times are compared with the manifest, so a file that was changed or
        removed behind our back is a miss, not a surprise later.
        """
        path = self.artifact_dir(action)
        manifest = _read_manifest(path)
        if manifest is None:
            return None
        for name, entry in manifest["files"].items():
            if not is_unchanged(path / name, entry):
                return None
        return Artifact(path, action.key, manifest)

    def actions_of(self, stage: str) -> list[dict[str, Any]]:
        """Manifests of one stage, newest first: what `explain` compares with."""
        kept, dropped = (self.root / stage).glob("*/"), self.root.glob(f"dropped/{stage}-*/")
        found = map(_read_manifest, (*kept, *dropped))
        manifests = [manifest for manifest in found if manifest is not None]
        return sorted(manifests, key=lambda manifest: str(manifest["created"]), reverse=True)

    @contextlib.contextmanager
    def lock(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of `name` across processes; the kernel releases it when the holder dies.

        Args:
            name: usually an action's key.
            on_wait: called once if another process holds it.
        """
        with self._lock_path(name).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def lock_if_free(self, name: str) -> Iterator[bool]:
        """Hold the lock of `name` unless another holds it; whether it is held."""
        with self._lock_path(name).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def hold(self, action: Action) -> Hold:
        """Claim an action's artifact, made or not, so that no other run drops it meanwhile."""
        return Hold(self._lock_path(f"{action.key}.use"))

    def dropped(self, action: Action) -> Artifact | None:
        """What is left of an artifact that was dropped: its manifest and reports; None if it was not."""
        path = self._dropped_dir(action)
        manifest = _read_manifest(path)
        return None if manifest is None else Artifact(path, action.key, manifest)

    def drop(self, action: Action) -> None:
        """Remove an artifact but for what explains it.

        Call while holding the lock of its key and the last `Hold`. Takes no room on the disk; a process
        that is killed on the way has dropped it, and `remove_dead_work` removes the rest.
        """
        path = self._dropped_dir(action)
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        self.artifact_dir(action).rename(path)
        _keep_what_explains(path)

    def _dropped_dir(self, action: Action) -> Path:
        return self.root / "dropped" / f"{action.stage}-{action.key}"

    def _lock_path(self, name: str) -> Path:
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def work_dir(self, action: Action) -> Path:
        """Where an artifact is made before it is committed."""
        return self.root / "work" / f"{action.key}.{os.getpid()}"

    def new_work_dir(self, action: Action) -> Path:
        """An empty directory to make an artifact in; call while holding the lock of its key."""
        for left_over in (self.root / "work").glob(f"{action.key}.*"):
            # Of a run that was killed. Its own name, because what it started may still be dying.
            shutil.rmtree(left_over, ignore_errors=True)
        path = self.work_dir(action)
        path.mkdir(parents=True)
        return path

    def remove_dead_work(self) -> None:
        """Remove what killed runs left of artifacts that they were making, or were about to drop."""
        for path in (self.root / "dropped").glob("*/"):
            _keep_what_explains(path)
        for path in (self.root / "work").glob("*.*"):
            key, _, pid = path.name.rpartition(".")
            if not pid.isdecimal() or _is_alive(int(pid)):
                continue
            with self.lock_if_free(key) as is_held:  # a living run may be in another container
                if is_held:
                    shutil.rmtree(path, ignore_errors=True)

    def commit(self, action: Action, work_dir: Path, facts: dict[str, Any]) -> Artifact:
        """Turn a finished work directory into the artifact of `action`, atomically."""
        manifest = {
            "schema": SCHEMA,
            "action": action.fields(),
            "key": action.key,
            "facts": facts,
            "files": describe_files(work_dir),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_json(work_dir / MANIFEST, manifest)
        sync_tree(work_dir)
        _make_read_only(work_dir)
        final = self.artifact_dir(action)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # damaged, or `lookup` would have found it
            shutil.rmtree(final)
        work_dir.rename(final)
        sync(final.parent)
        shutil.rmtree(self._failed_dir(action), ignore_errors=True)  # it explains nothing any more
        shutil.rmtree(self._dropped_dir(action), ignore_errors=True)
        self.remove_unfinished(action)
        return Artifact(final, action.key, manifest)

    def unfinished_dir(self, action: Action) -> Path:
        """Where finished parts of an action's artifact outlive a killed run; may not exist."""
        return self.root / "unfinished" / f"{action.stage}-{action.key}"

    def open_unfinished(self, action: Action) -> Path:
        """The directory in which finished parts of an action's artifact outlive a killed run.

        Call while holding the lock of the action's key. `commit` removes it.
        """
        path = self.unfinished_dir(action)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / ACTION, action.fields())
        return path

    def remove_unfinished(self, action: Action) -> None:
        """Remove that directory, if it is there; call while holding the lock of the action's key."""
        shutil.rmtree(self.unfinished_dir(action), ignore_errors=True)

    def remove_useless(self, stage: str, is_useless: Callable[[Path], bool]) -> None:
        """Remove such directories of one stage that no run works in."""
        for path in (self.root / "unfinished").glob(f"{stage}-*/"):
            with self.lock_if_free(path.name.removeprefix(f"{stage}-")) as is_held:
                if is_held and is_useless(path):
                    shutil.rmtree(path, ignore_errors=True)

    def unfinished(self, stage: str) -> list[tuple[Path, dict[str, Any]]]:
        """Such directories of one stage that no run works in, each with the fields of its action."""
        found = []
        for path in sorted((self.root / "unfinished").glob(f"{stage}-*/")):
            with self.lock_if_free(path.name.removeprefix(f"{stage}-")) as is_held:
                if not is_held:
                    continue
            try:
                fields = json.loads((path / ACTION).read_text("utf-8"))
            except (OSError, ValueError):  # being made or removed by another run
                continue
            found.append((path, fields))
        return found

    def _failed_dir(self, action: Action) -> Path:
        return self.root / "failed" / f"{action.stage}-{action.key[:16]}"

    def keep_failure(self, action: Action, patterns: tuple[str, ...]) -> Path:
        """Remove an action's work directory, if any; keep its top-level files that match."""
        work_dir = self.work_dir(action)
        kept = self._failed_dir(action)
        try:
            _move([path for pattern in patterns for path in work_dir.glob(pattern)], kept)
        finally:  # also when the disk is full
            shutil.rmtree(work_dir, ignore_errors=True)
        return kept


def _move(files: list[Path], directory: Path) -> None:
    """Put files in place of what the directory held; without files it stays as it is."""
    if files:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    for path in files:
        path.rename(directory / path.name)


def _keep_what_explains(directory: Path) -> None:
    """Remove all other files and directories."""
    for path in sorted(directory.rglob("*"), reverse=True):  # what a directory holds comes first
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # something in it stays
                path.rmdir()
        elif not any(fnmatch.fnmatch(path.name, pattern) for pattern in _EXPLAINS):
            path.unlink(missing_ok=True)  # two may tidy up at once


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process id of ours
        return True
    return True


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
    return manifest if is_ours else None


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, one key a line, sorted, with a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def replace_json(path: Path, value: Any) -> None:
    """`write_json` of which a killed process leaves the old file or the new one, and nothing between."""
    fresh = path.with_name(f"{path.name}.new")
    write_json(fresh, value)
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush one file, or the entries of one directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush files and directories to disk before the rename that makes them visible."""
    directories = {directory}
    for path in list_files(directory):
        directories.add(path.parent)
        if not path.is_symlink():
            sync(path)
    for path in directories:
        sync(path)


def _make_read_only(directory: Path) -> None:
    """Published files are hard links to these: an edit there must not reach the store."""
    for path in list_files(directory):
        if not path.is_symlink():
            path.chmod(0o444 | (path.stat().st_mode & 0o111))  # a kit's script stays executable
