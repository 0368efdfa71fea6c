"""Progress of ranks in one line, ranks that take turns, and directories of ranks."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.console import _PlainProgress
from pipeline.engine.rank_dirs import (
    finish_rank,
    finished_dir,
    finished_ranks,
    keep_logs,
    link_rank,
    new_open_dir,
    remove_bulk,
)
from pipeline.launch import ProgressFiles, RankProgress, RanksView
from pipeline.launch.memory_queue import MemoryQueue
from pipeline.launch.progress import Event
from pipeline.progress import SilentProgress


class Told(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def advance(self, note: str = "") -> None:
        self.lines.append(f"advance {note}")

    def say(self, text: str) -> None:
        self.lines.append(f"say {text}")

    def status(self, text: str) -> None:
        self.lines.append(f"status {text}")


def test_ranks_share_one_line(tmp_path: Path) -> None:
    told = Told()
    paths = [tmp_path / "0", tmp_path / "1"]
    view = RanksView(["rank 4", "rank 5"], told)
    files = ProgressFiles(paths, view.on_event)
    files.finish()  # nobody has begun
    first, second = (RankProgress(path) for path in paths)
    first.start(3, "layers")
    first.advance("layer 0")
    second.status("waits for 2.0 GB of memory")
    files.finish()
    view.show()
    view.show()
    first.say("compiling for SM89")
    files.finish()
    view.show()
    view.done(0)
    view.show()
    first.advance("layer 1")  # written before its end, read after it
    files.finish()
    view.show()
    assert told.lines == [
        "status rank 4: 1 of 3 layers; rank 5: waits for 2.0 GB of memory",
        "say rank 4: compiling for SM89",
        "status rank 4: compiling for SM89; rank 5: waits for 2.0 GB of memory",
        "advance rank 4 is finished",
        "status rank 5: waits for 2.0 GB of memory",
    ]


def test_a_line_that_is_on_its_way_is_read_when_it_is_there(tmp_path: Path) -> None:
    path, events = tmp_path / "0", list[Event]()
    files = ProgressFiles([path], lambda index, event: events.append(event))
    path.write_text('{"event": "adv')
    files.finish()
    assert events == []
    with path.open("a") as stream:
        stream.write('ance"}\n{"event": "cut off by a full d\n{"event": "say", "text": "x"}\n')
    files.finish()
    assert events == [{"event": "advance"}, {"event": "say", "text": "x"}]


def test_the_first_rank_decides_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.launch.memory_queue.free_memory_bytes", lambda: 10)
    assert MemoryQueue(tmp_path / "state", [0, 1], None).bound() == 10
    monkeypatch.setattr("pipeline.launch.memory_queue.free_memory_bytes", lambda: 3)
    assert MemoryQueue(tmp_path / "state", [0, 1], None).bound() == 10


def test_ranks_start_in_order_and_only_when_they_fit(tmp_path: Path) -> None:
    path, ranks, sizes = tmp_path / "state", [2, 3, 5], {2: 6, 3: 6, 5: 1}
    began: list[int] = []
    said: dict[int, list[str]] = {rank: [] for rank in ranks}
    leave = {rank: threading.Event() for rank in ranks}
    entered = {rank: threading.Event() for rank in ranks}

    def work(rank: int) -> None:
        with MemoryQueue(path, ranks, 10).turn(rank, sizes[rank], said[rank].append):
            began.append(rank)
            entered[rank].set()
            assert leave[rank].wait(30)

    threads = {rank: threading.Thread(target=work, args=(rank,)) for rank in ranks}
    threads[5].start()  # small enough, but not its turn
    threads[2].start()
    assert entered[2].wait(30)
    threads[3].start()
    assert not entered[3].wait(0.5)
    assert not entered[5].is_set()
    assert said == {2: [], 3: ["waits for 0.0 GB of memory"], 5: []}
    leave[2].set()
    assert entered[3].wait(30)
    assert entered[5].wait(30)  # 6 + 1 fit
    for event in leave.values():
        event.set()
    for thread in threads.values():
        thread.join()
    assert began == [2, 3, 5]
    assert json.loads(path.read_text())["running"] == {}


def test_one_that_never_fits_runs_alone(tmp_path: Path) -> None:
    queue = MemoryQueue(tmp_path / "state", [0], 10)
    with queue.turn(0, 1000, lambda text: None):
        assert json.loads((tmp_path / "state").read_text())["running"] == {"0": 1000}


def test_a_rank_appears_in_one_step_and_only_while_it_is_whole(tmp_path: Path) -> None:
    ranks_dir, out_dir = tmp_path / "ranks", tmp_path / "out"
    out_dir.mkdir()
    open_dir = new_open_dir(ranks_dir, 1)
    (open_dir / "rank1.engine").write_bytes(b"plan")
    (open_dir / "rank1.log").write_text("be")
    assert finished_ranks(ranks_dir) == []
    finish_rank(open_dir, finished_dir(ranks_dir, 1))
    assert finished_ranks(ranks_dir) == [1]
    log = finished_dir(ranks_dir, 1) / "rank1.log"
    log.write_text("begun, ended")  # the log goes on after the rename
    assert finished_ranks(ranks_dir) == [1]
    link_rank(ranks_dir, 1, out_dir)
    assert {path.name for path in out_dir.iterdir()} == {"rank1.engine", "rank1.log"}
    (finished_dir(ranks_dir, 1) / "rank1.engine").unlink()
    (finished_dir(ranks_dir, 1) / "rank1.engine").write_bytes(b"pla")
    assert finished_ranks(ranks_dir) == []
    again = new_open_dir(ranks_dir, 1)
    (again / "rank1.engine").write_bytes(b"plan")
    finish_rank(again, finished_dir(ranks_dir, 1))
    assert finished_ranks(ranks_dir) == [1]


def test_an_open_rank_leaves_its_logs_alone(tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    open_dir = new_open_dir(tmp_path, 10)
    (open_dir / "rank10.weights").write_bytes(b"half")
    (open_dir / "rank10.tensorrt_rtx.log").write_text("compiler")
    remove_bulk(open_dir)
    assert [path.name for path in open_dir.iterdir()] == ["rank10.tensorrt_rtx.log"]
    keep_logs(tmp_path, out_dir)
    assert (out_dir / "rank10.tensorrt_rtx.log").read_text() == "compiler"
    other = new_open_dir(tmp_path, 1)
    assert open_dir.is_dir(), "rank 1 is not rank 10"
    assert new_open_dir(tmp_path, 10) == open_dir
    assert list(open_dir.iterdir()) == []
    assert other.is_dir()


def test_a_line_of_a_log_keeps_time_and_note_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.console._PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr("pipeline.console.time.monotonic", iter(range(0, 100, 2)).__next__)
    log = io.StringIO()
    progress = _PlainProgress(Console(file=log), "verify")
    progress.start(2, "ranks")
    progress.status("rank 0: 1 of 9 steps")
    progress.advance()
    progress.advance("rank 1 is finished")
    assert log.getvalue().splitlines() == [
        "verify    0/2 ranks; rank 0: 1 of 9 steps",
        "verify    1/2 ranks, 4.0 s left",
        "verify    2/2 ranks, 0.0 s left; rank 1 is finished",
    ]
