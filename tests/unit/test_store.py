"""The store: nothing half-written is ever visible, nothing damaged is ever a hit."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import GateError
from pipeline.hardlink import link_or_copy
from pipeline.publish import damaged_files, link_tree, publish
from pipeline.store import LOG, MANIFEST, Action, Store, canonical_json

ACTION = Action("convert", 1, {"mapping": {"tp": 1}}, {"source": "abc"}, {"numpy": "1"}, 89)


def _make(store: Store, action: Action = ACTION, text: str = "content") -> Path:
    work_dir = store.new_work_dir(action)
    (work_dir / "data").mkdir()
    (work_dir / "data" / "file.txt").write_text(text)
    return store.commit(action, work_dir, {"bytes": 7}).path


def test_the_key_is_fixed_for_ever() -> None:
    # Computed once with `printf 'trtpipe action 1\n{...}' | sha256sum`; a change orphans every store.
    expected = "0fa4b91d47a5fb458aac814197ce6a31778f03e2954cb878183e6d8b6392e607"
    assert ACTION.key == expected


@pytest.mark.parametrize(
    "other",
    [
        Action("build", 1, {"mapping": {"tp": 1}}, {"source": "abc"}, {"numpy": "1"}, 89),
        Action("convert", 2, {"mapping": {"tp": 1}}, {"source": "abc"}, {"numpy": "1"}, 89),
        Action("convert", 1, {"mapping": {"tp": "1"}}, {"source": "abc"}, {"numpy": "1"}, 89),
        Action("convert", 1, {"mapping": {"tp": 1}}, {"source": "abd"}, {"numpy": "1"}, 89),
        Action("convert", 1, {"mapping": {"tp": 1}}, {"source": "abc"}, {"numpy": "2"}, 89),
        Action("convert", 1, {"mapping": {"tp": 1}}, {"source": "abc"}, {"numpy": "1"}, None),
    ],
)
def test_every_field_is_in_the_key(other: Action) -> None:
    assert other.key != ACTION.key


def test_commit_then_lookup(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.lookup(ACTION) is None
    path = _make(store)
    artifact = store.lookup(ACTION)
    assert artifact is not None
    assert artifact.path == path
    assert artifact.facts == {"bytes": 7}
    assert artifact.size_bytes == len("content")
    assert damaged_files(path, artifact.manifest) == []
    assert not list((tmp_path / "work").iterdir())


def test_a_work_directory_is_never_an_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    work_dir = store.new_work_dir(ACTION)
    (work_dir / "file").write_text("half")
    assert store.lookup(ACTION) is None
    assert not store.artifact_dir(ACTION).exists()
    assert list(store.new_work_dir(ACTION).iterdir()) == []  # the next run starts clean


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_artifact_is_a_miss_and_is_replaced(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    path = _make(store)
    file = path / "data" / "file.txt"
    file.chmod(0o644)
    if damage == "truncate":
        file.write_text("cont")
    elif damage == "remove":
        file.unlink()
    else:
        (path / MANIFEST).chmod(0o644)
        (path / MANIFEST).write_text("{")
    assert store.lookup(ACTION) is None
    _make(store)
    assert store.lookup(ACTION) is not None


def test_damaged_files_names_every_one(tmp_path: Path) -> None:
    path = _make(Store(tmp_path))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["gone"] = {"bytes": 1, "sha256": "0" * 64}
    (path / "data" / "file.txt").chmod(0o644)
    (path / "data" / "file.txt").write_text("CONTENT")  # same size
    (path / "extra").write_text("")
    texts = [str(problem) for problem in damaged_files(path, manifest)]
    assert len(texts) == 3
    assert any("file.txt: was changed after publishing" in text for text in texts)
    assert any("gone: is missing" in text for text in texts)
    assert any("extra: is not in the manifest" in text for text in texts)


def test_a_failure_keeps_its_log_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    work_dir = store.new_work_dir(ACTION)
    (work_dir / LOG).write_text("why")
    (work_dir / "report.json").write_text("{}")
    (work_dir / "weights").write_text("half")
    kept = store.keep_failure(ACTION, ("*.log", "report.*"))
    assert sorted(path.name for path in kept.iterdir()) == ["report.json", LOG]
    assert not work_dir.exists()
    assert store.lookup(ACTION) is None


def test_publish_replaces_in_one_step(tmp_path: Path) -> None:
    destination = tmp_path / "engine"

    def fill(text: str, path: Path) -> None:
        (path / "file").write_text(text)

    publish(lambda path: fill("one", path), destination, manifest={"name": "x"})
    publish(lambda path: fill("two", path), destination, manifest={"name": "x"})
    assert (destination / "file").read_text() == "two"
    assert json.loads((destination / MANIFEST).read_text())["files"]["file"]["bytes"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_publish_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    destination = tmp_path / "engine"
    publish(lambda path: (path / "file").touch(), destination, manifest={})

    def fill(path: Path) -> None:
        (path / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(fill, destination, manifest={})
    assert sorted(path.name for path in destination.iterdir()) == ["file", MANIFEST]
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_publish_does_not_replace_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.tex").touch()
    with pytest.raises(GateError, match="was not published by this program; fix: move it away"):
        publish(lambda path: None, tmp_path / "engine", manifest={})
    assert (tmp_path / "engine" / "thesis.tex").exists()


def test_link_tree_shares_the_bytes(tmp_path: Path) -> None:
    path = _make(Store(tmp_path))
    link_tree(path, tmp_path / "out")
    assert (tmp_path / "out" / "data" / "file.txt").stat().st_ino == (
        path / "data" / "file.txt"
    ).stat().st_ino
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_link_does_not_write_through_what_is_there(tmp_path: Path) -> None:
    for name in ("source", "other"):
        (tmp_path / name).write_text(name)
    link_or_copy(tmp_path / "other", tmp_path / "target")
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "other").read_text() == "other"


def _hold(root: Path, started: Path) -> None:
    with Store(root).lock("key", lambda: None):
        started.touch()
        time.sleep(1.0)


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    started = tmp_path / "started"
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, started))
    holder.start()
    while not started.exists():
        time.sleep(0.01)
    waited: list[bool] = []
    with Store(tmp_path).lock("key", lambda: waited.append(True)):
        pass
    assert waited == [True]
    holder.join()
    waited.clear()
    with Store(tmp_path).lock("key", lambda: waited.append(True)):
        pass
    assert waited == []


def test_work_of_dead_processes_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "work").mkdir()
    left, locked, alive, foreign = (
        tmp_path / "work" / name
        for name in (f"a.{dead.pid}", f"b.{dead.pid}", f"c.{os.getpid()}", "d.backup")
    )
    for path in (left, locked, alive, foreign):
        path.mkdir()
        (path / "half").touch()
    with store.lock("b", lambda: None):
        store.remove_dead_work()
    assert not left.exists()
    assert sorted((tmp_path / "work").iterdir()) == sorted([locked, alive, foreign])
    store.remove_dead_work()
    assert not locked.exists()


@pytest.mark.parametrize("value", [{1: 2}, {"x": object()}, {"x": {3}}, Path("x"), b"x"])
def test_values_without_a_canonical_form_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
