"""A file of a dataset from a Hub on loopback, and everything that a Hub can refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build_config import write_build
from tests.hub import LocalHub, serve_hub
from tests.tiny_text import made_up_texts

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILE = "data/train.jsonl"

_DOWNLOAD = """
import sys
from pipeline.calibration_config import HubFile
from pipeline.errors import PipelineError
from pipeline.quant.data import TextFile, load_documents
from pipeline.quant.data.hub import download_dataset_file

try:
    path = download_dataset_file(HubFile(hub=sys.argv[1], revision=sys.argv[2], file=sys.argv[3]))
    print([document.text for document in load_documents(TextFile(path))])
except PipelineError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def _environment(url: str, home: Path, *, offline: bool) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }


def _download(
    url: str,
    home: Path,
    hub: str = "someone/texts",
    revision: str = REVISION,
    file: str = FILE,
    *,
    offline: bool = False,
) -> tuple[int, str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", _DOWNLOAD, hub, revision, file],
        env=_environment(url, home, offline=offline),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def dataset(tmp_path: Path) -> LocalHub:
    path = tmp_path / "dataset" / FILE
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return LocalHub(tmp_path / "dataset", "someone/texts", REVISION, kind="dataset")


def test_a_file_is_downloaded_once_and_then_found_offline(
    tmp_path: Path, dataset: LocalHub
) -> None:
    with serve_hub(dataset) as hub:
        assert _download(hub.url, tmp_path / "home") == (0, "['one', 'two']\n")
    assert _download(hub.url, tmp_path / "home", offline=True) == (0, "['one', 'two']\n")


def test_a_look_at_the_data_of_the_hub(tmp_path: Path, dataset: LocalHub) -> None:
    texts = (json.dumps({"text": text}) for text in made_up_texts(40))
    (dataset.directory / FILE).write_text("\n".join(texts))
    config = write_build(
        tmp_path,
        quantize={
            "format": "int4_awq",
            "calibration": {
                "data": {"hub": dataset.model_id, "revision": REVISION, "file": FILE},
                "num_samples": 4,
                "seq_len": 32,
            },
        },
    )
    with serve_hub(dataset) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "data", str(config)],
            env=_environment(hub.url, tmp_path / "home", offline=False),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert done.stdout.startswith(
        "calibration data: data/train.jsonl of someone/texts at 0123456789ab\nsamples     4 of "
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            {"hub": "someone/else"},
            "dataset someone/else at 0123456789ab: the Hub has no such dataset",
        ),
        (
            {"revision": "f" * 40},
            "at ffffffffffff: the Hub has no such revision; fix: copy the commit",
        ),
        ({"file": "data/test.jsonl"}, "has no file 'data/test.jsonl' at this revision; fix: copy"),
    ],
)
def test_what_the_hub_does_not_have(
    tmp_path: Path, dataset: LocalHub, wanted: dict[str, str], expected: str
) -> None:
    with serve_hub(dataset) as hub:
        code, text = _download(hub.url, tmp_path / "home", **wanted)
    assert code == 4
    assert expected in text


@pytest.mark.parametrize(
    ("refuse", "expected"),
    [
        ((403, "GatedRepo"), "access to this dataset is restricted; fix: accept its conditions"),
        ((401, ""), "the Hub refuses data/train.jsonl with status 401; fix: check that your token"),
        ((403, ""), "the Hub refuses data/train.jsonl with status 403; fix: check that your token"),
        (
            (404, "RepoNotFound"),
            "the Hub has no such dataset; fix: check owner/name; for a private",
        ),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, dataset: LocalHub, refuse: tuple[int, str], expected: str
) -> None:
    dataset.refuse = refuse
    with serve_hub(dataset) as hub:
        code, text = _download(hub.url, tmp_path / "home")
    assert code == 4
    assert expected in text


# The client tries five times to reach a Hub, and waits 23 s between.
@pytest.mark.parametrize("offline", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_a_network_the_fix_is_named(tmp_path: Path, offline: bool) -> None:
    code, text = _download("http://127.0.0.1:9", tmp_path / "home", offline=offline)
    assert code == 4
    assert "the Hub cannot be reached and data/train.jsonl is not in the local cache (" in text
    assert "fix: go online and run again, or download the file and give its path as `data:`" in text
