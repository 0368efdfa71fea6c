"""Text of the demo model: the Python standard library, split by files and never by lines.

Which files exist and what they hold depends on the interpreter, so `Corpus.sha256` and the Python
version belong into the card of every model trained on it.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, ToolError

SEPARATOR = "<|endoftext|>"
"""A line holding only this separates two documents of a text file."""

# Tests repeat themselves; encodings and pydoc_data are tables; the others are frozen or generated.
EXCLUDED_DIRS = frozenset(
    {
        "__pycache__",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
# Generated when the interpreter was built: it holds paths of the build machine.
EXCLUDED_PREFIXES = ("_sysconfigdata", "test_")

HELDOUT_BYTES = 150_000
CALIBRATION_BYTES = 230_000
# Committed files come from many sources of ordinary size, so that one odd module cannot dominate.
COMMITTED_FILE_BYTES = range(2_000, 24_000)
SPLIT_SEED = 0


@dataclass(frozen=True)
class Document:
    """One source file; `name` is its path below the library folder, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Three disjoint sets of whole files."""

    train: tuple[Document, ...]
    calibration: tuple[Document, ...]
    heldout: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Hex digest over names and texts: training, then calibration, then held-out files."""
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.heldout):
            for document in split:
                for part in (document.name, document.text):
                    data = part.encode()
                    digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def read_library(library_dir: Path | None = None) -> list[Document]:
    """Every usable source file below `library_dir`, by default this interpreter's own library.

    Raises:
        ToolError: no source file is there (some distributions ship only byte code).
    """
    root = Path(sysconfig.get_path("stdlib")) if library_dir is None else library_dir
    documents = []
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(inner.parts) or inner.name.startswith(EXCLUDED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few old sources declare another encoding; none is worth the trouble
        if text.strip() and SEPARATOR not in text:
            documents.append(Document(inner.as_posix(), text))
    if not documents:
        raise ToolError(
            Problem(str(root), "holds no Python source file", fix="use a full CPython install")
        )
    return documents


def split_documents(documents: Iterable[Document], seed: int = SPLIT_SEED) -> Corpus:
    """Shuffle by `seed`; the first suitable files are held out, the next calibrate, the rest train.

    Suitable for the two committed sets: of ordinary size and without a copyright line of its own,
    so that the licence of CPython alone covers what is redistributed.
    """
    shuffled = sorted(documents, key=lambda document: document.name)
    random.Random(seed).shuffle(shuffled)
    train: list[Document] = []
    calibration: list[Document] = []
    heldout: list[Document] = []
    room = [(heldout, HELDOUT_BYTES), (calibration, CALIBRATION_BYTES)]
    for document in shuffled:
        if room and _may_be_committed(document):
            chosen, limit = room[0]
            chosen.append(document)
            if sum(len(each.text.encode()) for each in chosen) >= limit:
                room.pop(0)
        else:
            train.append(document)
    return Corpus(tuple(train), tuple(calibration), tuple(heldout))


def _may_be_committed(document: Document) -> bool:
    if len(document.text.encode()) not in COMMITTED_FILE_BYTES:
        return False
    lowered = document.text.lower()
    return "copyright" not in lowered and "license" not in lowered


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """Write texts (no names) in UTF-8 with a `SEPARATOR` line between two documents."""
    texts = [document.text.rstrip("\n") + "\n" for document in documents]
    path.write_text(f"{SEPARATOR}\n".join(texts), encoding="utf-8", newline="\n")


def read_documents(path: Path) -> list[str]:
    """Texts of a file written by `write_documents`, cut as the rest of the pipeline cuts them.

    So every document but the last is without its final newline, which belongs to the separator.
    """
    return path.read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n")
