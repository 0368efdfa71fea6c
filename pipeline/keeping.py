"""`run.keep: needed`: an artifact goes as soon as no step that is still to be made reads it.

A run holds every artifact of its plan until it has no more use for it, and then drops it if no other run
holds it; so whoever is the last to need an artifact removes it, and nobody's input vanishes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from pipeline.config import LoadedConfig
from pipeline.forecast.sizes_text import exact_text
from pipeline.plan import Step, look_up, published_stages
from pipeline.store import MANIFEST, Action, Artifact, Hold
from pipeline.workspace import Workspace


class Keeper:
    """The artifacts that one run holds; a context manager, because it holds them until its end.

    Args:
        say: takes a line for each artifact that is dropped.
    """

    def __init__(
        self, loaded: LoadedConfig, workspace: Workspace, say: Callable[[str], None]
    ) -> None:
        self._loaded = loaded
        self._workspace = workspace
        self._store = workspace.store
        self._say = say
        self._holds: dict[str, Hold] = {}

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for hold in self._holds.values():
            hold.release()
        self._holds.clear()

    def hold(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Hold the artifacts of these steps, then look what there is: it stays until it is let go."""
        for step in steps:
            assert step.action is not None
            if step.action.key not in self._holds:
                self._holds[step.action.key] = self._store.hold(step.action)
        return look_up(self._loaded, steps, self._store)

    def let_go(self, made: Sequence[Step], coming: Sequence[Step]) -> None:
        """Drop what none of the steps to come needs, unless it is published, or only links."""
        if self._loaded.config.run.keep == "all":
            return
        read = {name for step in coming if step.status == "to do" for name in step.inputs.values()}
        final = published_stages(step.stage.name for step in (*made, *coming))
        for step in made:
            if step.stage.name not in read and step.stage.name not in final:
                self._drop(step)

    def _drop(self, step: Step) -> None:
        action = step.action
        assert action is not None
        hold = self._holds.pop(action.key, None)
        if hold is None:  # let go before
            return
        artifact = self._store.lookup(action)
        is_ours = artifact is not None and _has_bytes(artifact)
        if artifact is not None and is_ours and action.key not in self._promised():
            self._drop_if_free(hold, action, artifact.size_bytes)
        hold.release()

    def _drop_if_free(self, hold: Hold, action: Action, size_bytes: int) -> None:
        if not hold.is_the_last():
            return
        with self._store.lock_if_free(action.key) as is_held:
            if is_held:
                self._store.drop(action)
                freed = exact_text(size_bytes)
                self._say(f"{action.stage}: dropped, {freed} freed (run.keep: needed)")

    def _promised(self) -> set[str]:
        """Keys of what builds published under other names shall keep."""
        own = self._loaded.config.name
        return {
            key
            for path in self._workspace.engines_dir.glob(f"*/{MANIFEST}")
            if path.parent.name != own
            for key in _kept_keys(path)
        }


def _kept_keys(path: Path) -> Iterator[str]:
    """Of the build that a manifest describes: what is published, and with keep: all everything."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
        keys: dict[str, str] = manifest["keys"]
        keep = manifest["config"].get("run", {}).get("keep", "all")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # being replaced, or not ours: it promises nothing
    published = published_stages(keys)
    yield from (key for stage, key in keys.items() if keep == "all" or stage in published)


def _has_bytes(artifact: Artifact) -> bool:
    """Whether it has files of its own; links to a checkpoint elsewhere take no room."""
    return any("link" not in entry for entry in artifact.manifest["files"].values())
