"""fetch: links for local weights, real downloads from a hub on loopback, clear errors without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import CheckpointError
from pipeline.progress import SilentProgress
from pipeline.stages import STAGES
from pipeline.stages.fetch import link_local
from pipeline.stages.stage import StageContext
from pipeline.weights import override_weights
from tests.hub import LocalHub, serve_hub

REVISION = "0123456789abcdef0123456789abcdef01234567"

_RUN_FETCH = """
import sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.progress import SilentProgress
from pipeline.stages import STAGES
from pipeline.stages.stage import StageContext

out = Path(sys.argv[2])
out.mkdir(exist_ok=True)
context = StageContext(load_config(Path(sys.argv[1])), {}, out, out / "log", SilentProgress())
try:
    print(STAGES["fetch"].run(context))
except PipelineError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def _hub_config(directory: Path, model_id: str = "someone/tiny", revision: str = REVISION) -> Path:
    path = directory / "hub.yaml"
    path.write_text(f"model: {{source: hub, id: {model_id}, revision: '{revision}'}}\n")
    return path


def _fetch(config: Path, out: Path, url: str, home: Path, offline: bool = False) -> tuple[int, str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN_FETCH, str(config), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_pinned_revision_is_downloaded_whole(tmp_path: Path, tiny_llama: Path) -> None:
    with serve_hub(LocalHub(tiny_llama, "someone/tiny", REVISION)) as hub:
        code, text = _fetch(_hub_config(tmp_path), tmp_path / "out", hub.url, tmp_path / "home")
    assert code == 0, text
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_a_broken_download_resumes(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text("{}")
    # The client writes in chunks of 10 MiB: a smaller file would have nothing to go on from.
    content = bytes(range(256)) * (24 << 12)
    (files / "model.safetensors").write_bytes(content)
    hub = LocalHub(files, "someone/tiny", REVISION, break_after=21_000_000)
    config, home, out = _hub_config(tmp_path), tmp_path / "home", tmp_path / "out"
    with serve_hub(hub):
        code, text = _fetch(config, out, hub.url, home)
        assert code == 4, text
        assert "the download broke off" in text
        assert "run again: it goes on where it stopped" in text
        assert not list(out.iterdir())
        code, text = _fetch(config, out, hub.url, home)
    assert code == 0, text
    assert hub.ranges == [f"bytes={20 << 20}-"]
    assert (out / "model.safetensors").read_bytes() == content


def test_after_a_download_no_network_is_needed(tmp_path: Path, tiny_llama: Path) -> None:
    config, home = _hub_config(tmp_path), tmp_path / "home"
    with serve_hub(LocalHub(tiny_llama, "someone/tiny", REVISION)) as hub:
        assert _fetch(config, tmp_path / "one", hub.url, home)[0] == 0
    code, text = _fetch(config, tmp_path / "two", hub.url, home, offline=True)
    assert code == 0, text
    assert (tmp_path / "two" / "model.safetensors").is_file()


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_fix_is_named(tmp_path: Path, offline: bool) -> None:
    code, text = _fetch(
        _hub_config(tmp_path), tmp_path / "out", "http://127.0.0.1:9", tmp_path / "home", offline
    )
    assert code == 4, text
    assert "someone/tiny at 0123456789ab: the Hub cannot be reached" in text
    assert "WEIGHTS=<dir>, or rehearse with WEIGHTS=synthetic" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("model_id", "revision", "expected"),
    [
        ("someone/else", REVISION, "the Hub has no such model"),
        ("someone/tiny", "f" * 40, "the Hub has no such revision"),
    ],
)
def test_what_the_hub_does_not_have(
    tmp_path: Path, tiny_llama: Path, model_id: str, revision: str, expected: str
) -> None:
    config = _hub_config(tmp_path, model_id, revision)
    with serve_hub(LocalHub(tiny_llama, "someone/tiny", REVISION)) as hub:
        code, text = _fetch(config, tmp_path / "out", hub.url, tmp_path / "home")
    assert code == 4, text
    assert expected in text


@pytest.mark.parametrize(
    ("refuse", "expected"),
    [
        (
            (401, "GatedRepo"),
            "someone/tiny at 0123456789ab: access to this model is restricted; fix: accept the "
            "licence at https://huggingface.co/someone/tiny, then `huggingface-cli login` or set "
            "HF_TOKEN; or point at a local copy: WEIGHTS=<dir>, or rehearse with WEIGHTS=synthetic",
        ),
        ((403, "GatedRepo"), "access to this model is restricted; fix: accept the licence at "),
        ((401, ""), "the Hub refuses it with status 401; fix: check that your token may read"),
        ((403, ""), "the Hub refuses it with status 403; fix: check that your token may read"),
    ],
)
def test_what_needs_a_licence_or_a_token(
    tmp_path: Path, tiny_llama: Path, refuse: tuple[int, str], expected: str
) -> None:
    with serve_hub(LocalHub(tiny_llama, "someone/tiny", REVISION, refuse=refuse)) as hub:
        code, text = _fetch(_hub_config(tmp_path), tmp_path / "out", hub.url, tmp_path / "home")
    assert code == 4, text
    assert expected in text
    assert "Traceback" not in text


def test_local_weights_are_linked_not_copied(tmp_path: Path, tiny_llama: Path) -> None:
    link_local(tiny_llama, tmp_path)
    assert (tmp_path / "model.safetensors").is_symlink()
    assert (tmp_path / "config.json").resolve() == (tiny_llama / "config.json").resolve()


@pytest.mark.parametrize(
    ("exists", "what"), [(False, "no such directory"), (True, "no config.json")]
)
def test_a_directory_without_a_checkpoint(tmp_path: Path, exists: bool, what: str) -> None:
    directory = tmp_path / "weights"
    if exists:
        directory.mkdir()
    with pytest.raises(CheckpointError, match=what):
        link_local(directory, tmp_path)


def test_synthetic_weights_come_with_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {source: demo}\n")
    loaded = override_weights(load_config(path), "synthetic")
    assert loaded.config.name == "x-synthetic"
    assert loaded.rehearsal
    out = tmp_path / "out"
    out.mkdir()
    facts = STAGES["fetch"].run(StageContext(loaded, {}, out, out / "log", SilentProgress()))
    assert facts["bytes"] > 13_000_000
    assert {"config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
