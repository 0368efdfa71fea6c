"""manifest.json of something published, read back as a typed model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.config import Config
from pipeline.errors import GateError, Problem, StageError
from pipeline.names import MODEL_NAME
from pipeline.store import MANIFEST


class FileEntry(BaseModel):
    """One published file."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The part of a manifest that commands use; an engine and its repository have the same one.

    Attributes:
        name: of the build.
        rehearsal: made with synthetic weights.
        config: as it was when this was built.
        keys: stage -> key of its artifact.
        facts: stage -> what it reported.
        files: name relative to the directory -> size and hash.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    rehearsal: bool
    config: Config
    keys: dict[str, str]
    facts: dict[str, dict[str, Any]]
    files: dict[str, FileEntry]

    @field_validator("facts")
    @classmethod
    def _model_is_named(cls, facts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if "serve" not in facts:  # a build that ends with its checkpoint
            return facts
        name = facts["serve"].get("model_name")
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            raise ValueError(f"serve.model_name is {name!r}")
        return facts

    @property
    def model_name(self) -> str:
        """Name of the model in Triton.

        Raises:
            StageError: the build ended before there was one.
        """
        if "serve" not in self.facts:
            what = "was built without a server: it ends with its checkpoint"
            raise StageError(Problem(self.name, what, fix="set build.backend, and run it again"))
        return str(self.facts["serve"]["model_name"])


@dataclass(frozen=True)
class Published:
    """A published directory.

    Attributes:
        directory: below engines/ or triton_repo/, or a copy of such a one.
        manifest: what commands use of its manifest.json.
        document: all of it, as plain data.
    """

    directory: Path
    manifest: Manifest
    document: dict[str, Any]


def read_published(directory: Path) -> Published:
    """Read and check the manifest of a published directory; its other files are not looked at.

    Raises:
        StageError: nothing is published there.
        GateError: the manifest is not one of ours; with every problem of it.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "is a file" if directory.is_file() else f"has no {MANIFEST}"
        fix = "make engine MODEL=<name>, or `trtpipe run CONFIG`"
        raise StageError(
            Problem(str(directory), f"is not published: it {found}", fix=fix)
        ) from error
    except OSError as error:
        raise GateError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise GateError(
            Problem(
                where=str(path),
                what=f"{'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']}",
                fix="run the build again; see `trtpipe plan`",
            )
            for detail in error.errors(include_url=False)
        ) from None
    return Published(directory, manifest, json.loads(content))
