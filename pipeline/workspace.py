"""Where results go: engines/, triton_repo/ and the store, below the current directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.external import DigestCache
from pipeline.store import Store


@dataclass(frozen=True)
class Workspace:
    """Directories of one working copy.

    Attributes:
        root: the directory that holds engines/ and triton_repo/.
    """

    root: Path

    @property
    def engines_dir(self) -> Path:
        """Published engines."""
        return self.root / "engines"

    @property
    def repositories_dir(self) -> Path:
        """Published Triton model repositories."""
        return self.root / "triton_repo"

    @property
    def store(self) -> Store:
        """The artifact store."""
        return Store(self.engines_dir / ".store")

    def digests(self) -> DigestCache:
        """Remembered digests of external files."""
        return DigestCache(self.engines_dir / ".store" / "digests.json")
