"""YAML to plain Python with the file and line of every key, refusing what YAML lets pass silently.

Refused: duplicate keys, keys that are not text, more than one document, tags and anchors that build
objects. Numbers such as `1e-3` are numbers (YAML 1.2), which PyYAML by itself reads as text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Location:
    """File and 1-based line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Document:
    """Plain data of one file and where each key stands.

    Attributes:
        data: dicts, lists and scalars.
        locations: key path -> location; the empty path is the document itself.
        digests: file -> sha256 of its bytes.
    """

    data: dict[str, Any]
    locations: dict[KeyPath, Location] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads exponents without a dot as floats, and refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """An alias may point at what contains it, and its line is not where the value stands."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not allowed", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: Path) -> Document:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: file missing or unreadable, not UTF-8, YAML syntax, or anything refused above;
            each with file and line.
    """
    shown = str(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(_missing_file(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(shown, f"byte {error.start} is not valid UTF-8")) from None
    except OSError as error:
        raise ConfigError(Problem(shown, f"cannot be read: {error.strerror}")) from None
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(Problem(f"{shown}:1", "is not a mapping", "`key: value` lines"))
        reader = _Reader(loader, shown)
        data = reader.plain(node, ())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax(shown, error)) from None
    except yaml.reader.ReaderError as error:
        what = f"is not text: {error.reason} at position {error.position}"
        raise ConfigError(Problem(shown, what)) from None
    finally:
        if loader is not None:
            loader.dispose()
    if reader.problems:
        raise ConfigError(reader.problems)
    digests = {str(path.absolute()): hashlib.sha256(content).hexdigest()}
    return Document(data, reader.locations, digests)


def _missing_file(path: Path) -> Problem:
    known = sorted(p.stem for p in path.parent.glob("[!.]*.yaml"))
    return Problem(
        str(path),
        "no such file",
        allowed=", ".join(known) if known else "",
        fix=f"write {path}" + (" or choose one of those in that directory" if known else ""),
    )


def _syntax(shown: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{shown}:{mark.line + 1}" if mark else shown
    return Problem(where, f"YAML syntax: {error.problem or error.context}")


class _Reader:
    """Turns a node tree into plain data, collecting locations and problems."""

    def __init__(self, loader: _Loader, shown: str) -> None:
        self.loader = loader
        self.shown = shown
        self.locations: dict[KeyPath, Location] = {}
        self.problems: list[Problem] = []

    def plain(self, node: yaml.Node, path: KeyPath) -> Any:
        """Data under `node`, recorded under `path`."""
        self.locations.setdefault(path, self._location(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*path, i)) for i, child in enumerate(node.value)]
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self._refuse(node, f"unknown tag {node.tag}", "plain values")
            return None
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # an impossible date, for example
            self._refuse(node, f"unreadable value {node.value!r}: {error}", "")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key is None:
                continue
            key_path = (*path, key)
            if key in data:
                first = self.locations[key_path]
                self._refuse(
                    key_node, f"duplicate key `{key}`, first on line {first.line}", "each key once"
                )
                continue
            self.locations[key_path] = self._location(key_node)
            data[key] = self.plain(value_node, key_path)
        return data

    def _key(self, node: yaml.Node) -> str | None:
        try:
            key: Hashable = self.loader.construct_object(node)
        except ValueError:
            key = node.value
        else:
            if isinstance(key, str) and key != "<<":
                return key
        self._refuse(node, f"key {key!r} is not text", "text keys; no merge keys, use extends:")
        return None

    def _location(self, node: yaml.Node) -> Location:
        return Location(self.shown, node.start_mark.line + 1)

    def _refuse(self, node: yaml.Node, what: str, allowed: str) -> None:
        self.problems.append(Problem(str(self._location(node)), what, allowed))
