"""manifest.json of something published, read back as a typed model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.config import Config
from pipeline.errors import GateError, Problem, StageError
from pipeline.identity import Identity, Sha256
from pipeline.names import MODEL_NAME
from pipeline.store import MANIFEST

SCHEMA = 3
"""Of published manifests; raised when their form changes."""


class FileEntry(BaseModel):
    """One published file."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Manifest(BaseModel):
    """The part of a manifest that commands use; an engine and its repository have the same one.

    Attributes:
        schema_number: SCHEMA.
        digest: of the rest of the document (pipeline.publish.manifest_digest): shows an edit that was
            not meant; it is no signature.
        identity: what it is and what it needs.
        name: of the build.
        rehearsal: made with synthetic weights.
        config: as it was when this was built.
        keys: stage -> key of its artifact.
        facts: stage -> what it reported.
        files: name relative to the directory -> size and hash.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    schema_number: Annotated[Literal[3], Field(alias="schema")]
    digest: Sha256
    identity: Identity
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
            problem = no_server(self.config)
            raise StageError(replace(problem, where=self.name))
        return str(self.facts["serve"]["model_name"])


def no_server(config: Config) -> Problem:
    """Why a build ends without a model repository; its place is left to the caller."""
    if config.mapping.world_size > 1:
        what = f"has {config.mapping.world_size} ranks; a server runs one, on the CPU"
        return Problem("", what, "mapping: {tp: 1, pp: 1}", "serve a variant with that mapping")
    if config.build.backend == "none":
        what = "was built without a server: it ends with its checkpoint"
    else:
        what = f"was built without a server: backend {config.build.backend} ends with an engine or a kit"
    return Problem("", what, fix="build.backend: onnxruntime or tensorrt_rtx, and run it again")


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

    @property
    def path(self) -> Path:
        """Its manifest.json."""
        return self.directory / MANIFEST


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
    _refuse_other_schema(path, content)
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


def _refuse_other_schema(path: Path, content: bytes) -> None:
    """One problem instead of one for every field that the other schema has not."""
    try:
        document = json.loads(content)
    except ValueError:
        return  # the caller says where it is broken
    found = document.get("schema") if isinstance(document, dict) else None
    if isinstance(found, int) and found != SCHEMA:
        age = "an older" if found < SCHEMA else "a newer"
        what = f"was published by {age} version of this program (schema {found})"
        raise GateError(Problem(str(path), what, f"schema {SCHEMA}", "run the build again"))
