"""A killed quantization continues at the layer that was open, and only for the very same inputs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import load_config
from pipeline.errors import StageError
from pipeline.quant.layers.commits import MEASURED, OUTPUTS, FinishedLayers
from pipeline.run import run
from pipeline.stages import STAGES
from pipeline.store import Action, Store, replace_json
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder
from tests.tiny import write_tiny_llama
from tests.tiny_text import write_tiny_tokenizer
from tests.unit.test_layerwise import (
    CountingTools,
    Notes,
    contents,
    quantize,
    random_windows,
    write_source,
)

NUM_LAYERS = 4
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_hidden_layers=3)


def interrupted(source: Path, tmp_path: Path, stop_before: int, **options: Any) -> Path:
    """A work directory with the layers before `stop_before`."""
    work_dir = tmp_path / "work"
    tools = CountingTools(stop_before)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "killed", work_dir=work_dir, tools=tools.tools(), **options)
    assert tools.packed == list(range(stop_before))
    return work_dir


@pytest.mark.parametrize("inputs", ["original", "quantized"])
def test_finished_layers_are_not_made_again(source: Path, tmp_path: Path, inputs: str) -> None:
    whole = quantize(source, tmp_path / "whole", inputs=inputs)
    work_dir = interrupted(source, tmp_path, 2, inputs=inputs)
    tools, notes = CountingTools(), Notes()
    again = quantize(
        source,
        tmp_path / "again",
        inputs=inputs,
        work_dir=work_dir,
        tools=tools.tools(),
        progress=notes,
    )
    assert tools.packed == [2]
    assert "2 of 3 layers are finished; continuing" in notes.said
    assert contents(again) == contents(whole)


def test_only_the_last_layer_s_hidden_states_are_kept(source: Path, tmp_path: Path) -> None:
    work_dir = interrupted(source, tmp_path, 2)
    kept = sorted(path.relative_to(work_dir).as_posix() for path in work_dir.rglob("*.hidden"))
    # The open layer had its outputs before it was killed; they are not looked at again.
    assert kept == ["layer-00001/outputs.hidden", "open/outputs.hidden"]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"inputs": "quantized"}, 'options.inputs was "original", is "quantized"'),
        ({"group_size": 128}, "options.group_size was 64, is 128"),
        ({"windows": random_windows(seed=5)}, "tokens_sha256 was "),
    ],
)
def test_other_inputs_start_anew_and_say_what_changed(
    source: Path, tmp_path: Path, changed: dict[str, Any], field: str
) -> None:
    work_dir = interrupted(source, tmp_path, 1)
    tools, notes = CountingTools(), Notes()
    calls = {"work_dir": work_dir, "tools": tools.tools(), "progress": notes}
    out = quantize(source, tmp_path / "out", **calls, **changed)
    assert any(f"earlier run are not used: {field}" in text for text in notes.said)
    assert tools.packed == [0, 1, 2]
    if "inputs" in changed:
        assert contents(out) == contents(quantize(source, tmp_path / "fresh", **changed))


def test_changed_weights_under_the_same_names_are_noticed(tmp_path: Path) -> None:
    directory = write_source(tmp_path / "source", num_hidden_layers=3)
    work_dir = interrupted(directory, tmp_path, 2)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    tools, notes = CountingTools(), Notes()
    calls = {"work_dir": work_dir, "tools": tools.tools(), "progress": notes}
    quantize(directory, tmp_path / "out", **calls)
    assert (
        "finished layers of an earlier run are not used: weights of layer 1 are not those it was "
        "made of" in notes.said
    )
    assert tools.packed == [0, 1, 2]


@pytest.mark.parametrize("packed_is_left", [True, False])
def test_killed_while_old_layers_were_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_is_left: bool
) -> None:
    """What is left is used by nobody, whichever settings come next."""
    whole = quantize(source, tmp_path / "whole")
    work_dir = interrupted(source, tmp_path, 2)

    def killed(directory: Path, **_: Any) -> None:
        if directory.name.startswith("layer-"):
            if not packed_is_left:
                (directory / "packed.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.quant.layers.commits.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "other", group_size=128, work_dir=work_dir)
    assert (work_dir / "layer-00001" / "record.json").is_file()
    tools = CountingTools()
    again = quantize(source, tmp_path / "again", work_dir=work_dir, tools=tools.tools())
    assert tools.packed == [0, 1, 2]
    assert contents(again) == contents(whole)


def test_a_last_layer_without_its_outputs_is_not_trusted(source: Path, tmp_path: Path) -> None:
    work_dir = interrupted(source, tmp_path, 2)
    (work_dir / "layer-00001" / "outputs.hidden").unlink()
    tools = CountingTools()
    quantize(source, tmp_path / "out", work_dir=work_dir, tools=tools.tools())
    assert tools.packed == [0, 1, 2]


# Real processes from here on: `trtpipe run`, and its stage killed with SIGKILL.


def write_config(root: Path) -> Path:
    weights = root / "weights"
    weights.mkdir()
    write_tiny_llama(weights, num_hidden_layers=NUM_LAYERS)
    write_tiny_tokenizer(weights)
    return write_build(root, fmt="int4_awq", backend="none")


def unfinished(root: Path) -> Path | None:
    found = list((root / "engines" / ".store" / "unfinished").glob("quantize-*/"))
    assert len(found) <= 1
    return found[0] if found else None


def finished_layers(root: Path) -> list[str]:
    directory = unfinished(root)
    return sorted(path.name for path in directory.glob("layers/layer-*")) if directory else []


def stage_processes() -> list[int]:
    """Stage workers below this process."""
    found, workers = [os.getpid()], []
    for process in found:
        for tasks in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, read_if_alive(tasks).split())
        if b"pipeline.stages.worker" in read_if_alive(Path(f"/proc/{process}/cmdline")):
            workers.append(process)
    return workers


def read_if_alive(path: Path) -> bytes:
    """A file of /proc; empty when the process has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def start(config: Path, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "run", str(config)]
    return subprocess.Popen(command, cwd=root, text=True, stderr=subprocess.PIPE)


def kill_stage_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> str:
    """SIGKILL to the running stage as soon as `ready`; returns what the run said."""
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    for worker in stage_processes():
        os.kill(worker, signal.SIGKILL)
    return process.communicate(timeout=DEADLINE_S)[1]


def quantized_bytes(root: Path) -> dict[str, bytes]:
    (artifact,) = (root / "engines" / ".store" / "quantize").iterdir()
    return {name: data for name, data in contents(artifact).items() if not name.endswith(".log")}


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "manifest.json"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of a run that nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    run(load_config(write_config(root)), Workspace(root), Recorder())
    assert unfinished(root) is None
    return without_times(quantized_bytes(root))


@pytest.mark.slow
def test_a_killed_stage_continues(tmp_path: Path, reference: dict[str, bytes]) -> None:
    config = write_config(tmp_path)
    said = kill_stage_when(start(config, tmp_path), lambda: len(finished_layers(tmp_path)) == 2)
    assert "was killed by signal 9" in said
    done = finished_layers(tmp_path)
    directory = unfinished(tmp_path)
    assert directory is not None
    before = {name: (directory / "layers" / name).stat().st_mtime_ns for name in done}
    view = Recorder()
    run(load_config(config), Workspace(tmp_path), view)
    assert without_times(quantized_bytes(tmp_path)) == reference
    assert before
    assert unfinished(tmp_path) is None
    log = next((tmp_path / "engines" / ".store" / "quantize").glob("*/stage.log")).read_text()
    assert f"{len(done)} of {NUM_LAYERS} layers are finished; continuing" in log


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    config = write_config(tmp_path)
    choose = random.Random(os.getpid())
    kept: list[int] = []
    for _ in range(4):
        process = start(config, tmp_path)
        moment = time.monotonic() + choose.uniform(3.0, 12.0)

        def is_time(process: subprocess.Popen[str] = process, moment: float = moment) -> bool:
            return time.monotonic() > moment or process.poll() is not None

        if process.poll() is None:
            while not is_time():
                time.sleep(0.01)
        for worker in stage_processes():
            os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
        kept.append(len(finished_layers(tmp_path)))
        if process.returncode == 0:
            break
    run(load_config(config), Workspace(tmp_path), Recorder())
    assert without_times(quantized_bytes(tmp_path)) == reference


def test_the_store_keeps_unfinished_work_by_action_until_it_is_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = (Action("quantize", 1, {"group_size": size}) for size in (64, 128))
    path = store.open_unfinished(one)
    (path / "part").write_text("finished")
    assert (store.open_unfinished(one) / "part").read_text() == "finished"
    store.open_unfinished(other)
    assert [fields for _, fields in store.unfinished("quantize")] == sorted(
        (one.fields(), other.fields()),
        key=lambda fields: Action(**fields).key,
    )
    assert store.unfinished("build") == []
    work_dir = store.new_work_dir(one)
    store.commit(one, work_dir, {})
    assert not path.exists()
    assert len(store.unfinished("quantize")) == 1


@pytest.mark.slow
def test_work_of_other_settings_is_named_and_left_alone(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    store = Workspace(tmp_path).store
    from pipeline.plan import make_plan

    loaded = load_config(config)
    view = Recorder()
    step = next(
        step
        for step in make_plan(loaded, store, Workspace(tmp_path).digests()).steps
        if step.stage.name == "quantize"
    )
    if step.action is None:  # the key needs the weights' digests
        run(loaded, Workspace(tmp_path), view)
        step = next(
            step
            for step in make_plan(loaded, store, Workspace(tmp_path).digests()).steps
            if step.stage.name == "quantize"
        )
    assert step.action is not None
    left = store.open_unfinished(step.action)
    write_finished_layers(left / "layers", 2)
    other_model = Action("quantize", 2, inputs={"source": "of another model"})
    write_finished_layers(store.open_unfinished(other_model) / "layers", 1)
    nothing_finished = store.open_unfinished(Action("quantize", 1))
    text = config.read_text().replace("group_size: 64", "group_size: 128")
    config.write_text(text)
    run(load_config(config), Workspace(tmp_path), view)
    assert [line for line in view.lines if "unfinished" in line] == [
        "quantize: unfinished work with other group_size is not used (layers quantized: 2); "
        f"`rm -r {left}` removes it"
    ]
    assert [path for path, _ in store.unfinished("quantize")] == sorted(
        [left, store.unfinished_dir(other_model)]
    )
    assert not nothing_finished.exists()


def write_finished_layers(directory: Path, count: int) -> None:
    finished = FinishedLayers(directory)
    finished.resume({"of": "a test"}, lambda layer: "")
    for layer in range(count):
        (finished.open_layer() / OUTPUTS).touch()
        finished.commit(layer, {})


def test_work_without_a_finished_layer_is_nothing_to_keep(tmp_path: Path) -> None:
    stage = STAGES["quantize"]
    FinishedLayers(tmp_path / "layers").resume({"of": "a test"}, lambda layer: "")
    (tmp_path / "layers" / "embedded.hidden").touch()
    assert stage.finished_parts(tmp_path) == ""
    write_finished_layers(tmp_path / "layers-sensitivity", 3)
    (tmp_path / "layers-sensitivity" / MEASURED).touch()
    assert stage.finished_parts(tmp_path) == "layers measured: 3, divergences measured"
    write_finished_layers(tmp_path / "layers", 1)
    assert stage.finished_parts(tmp_path).startswith("layers quantized: 1, layers measured: 3")


def test_a_stage_that_fails_before_its_first_layer_leaves_no_directory(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    path = tmp_path / "weights" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 200_000
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"layer 0, mlp\.up_proj"):
        run(load_config(config), Workspace(tmp_path), Recorder())
    assert list((tmp_path / "engines" / ".store" / "failed").glob("quantize-*"))
    assert unfinished(tmp_path) is None


def test_work_of_a_run_that_is_under_way_is_neither_named_nor_removed(tmp_path: Path) -> None:
    store, action = Store(tmp_path), Action("quantize", 1)
    path = store.open_unfinished(action)
    with store.lock(action.key, lambda: None):
        store.remove_useless("quantize", lambda _: True)
        assert store.unfinished("quantize") == []
        assert path.exists()
    store.remove_useless("quantize", lambda _: False)
    assert [found for found, _ in store.unfinished("quantize")] == [path]
    store.remove_useless("quantize", lambda _: True)
    assert not path.exists()


@pytest.mark.parametrize("inputs", ["original", "quantized"])
def test_a_failed_stage_keeps_its_finished_layers(tmp_path: Path, inputs: str) -> None:
    """Layer 2 overflows; the two before it are kept for the next run."""
    directory = write_source(tmp_path / "overflowing", num_hidden_layers=3)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"] *= 200_000
    save_file(tensors, path, metadata={"format": "pt"})
    work_dir = tmp_path / "work"
    where = r"^layer 2, mlp\.up_proj, calibration sample 0: values that are not finite: up to "
    with pytest.raises(StageError, match=where):
        quantize(directory, tmp_path / "out", work_dir=work_dir, inputs=inputs)
    records = sorted(path.parent.name for path in work_dir.glob("*/record.json"))
    assert records == ["layer-00000", "layer-00001"]
    record = json.loads((work_dir / "layer-00001" / "record.json").read_text())
    assert len(record["linears"]) == 7
    assert torch.isfinite(
        load_file(work_dir / "layer-00001" / "packed.safetensors")[
            "model.layers.1.mlp.up_proj.weight_scale"
        ]
    ).all()


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    replace_json(path, {"loss": 1})
    real = Path.write_text

    def torn(self: Path, text: str, *args: Any) -> int:
        real(self, text[: len(text) // 2], *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        replace_json(path, {"loss": 2})
    assert json.loads(path.read_text()) == {"loss": 1}
