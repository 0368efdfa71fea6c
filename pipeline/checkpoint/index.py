"""The index of a sharded checkpoint: which file holds which tensor. Same for safetensors and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import CheckpointError, Problem


def weight_files(
    directory: Path, single_name: str, index_name: str, suffixes: tuple[str, ...]
) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory, and what its index says about them (None without an index).

    Raises:
        CheckpointError: both a single file and an index, or neither; see `read_index`.
    """
    single, index = directory / single_name, directory / index_name
    if single.exists() and index.exists():
        what = f"both {single_name} and {index_name}: which one is meant is not clear"
        raise CheckpointError(Problem(str(directory), what, fix="remove the one that is stale"))
    if single.exists():
        return [single], None
    if index.exists():
        weight_map = read_index(index, suffixes)
        return [directory / name for name in dict.fromkeys(weight_map.values())], weight_map
    raise CheckpointError(Problem(str(directory), f"neither {single_name} nor {index_name}"))


def read_index(path: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The weight_map: tensor name -> file name, each file a plain name in the index's own directory.

    Args:
        suffixes: how the names of weight files may end.

    Raises:
        CheckpointError: not an index, or every entry that leads elsewhere or nowhere.
    """
    try:
        weight_map = parse_object(path.read_bytes()).get("weight_map")
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem(str(path), "no weight_map", '{"weight_map": {tensor: file}}'))
    problems = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file, suffixes):
            what = f"{name} is said to be in {file!r}"
            problems.append(Problem(str(path), what, f"a {suffixes[0]} file name without a path"))
        elif not (path.parent / file).is_file():
            what = f"{name} is said to be in {file}, which is {why_no_file(path.parent / file)}"
            problems.append(Problem(str(path), what))
    if problems:
        raise CheckpointError(problems)
    return weight_map


def why_no_file(path: Path) -> str:
    """Why a file that is needed is not one."""
    if path.is_symlink():
        return "a symbolic link that leads nowhere or in a circle"
    return "missing" if not path.exists() else "not a file"


def _is_plain_name(file: str, suffixes: tuple[str, ...]) -> bool:
    """Whether it names a file of the same directory: an index must not read elsewhere."""
    return (
        PurePath(file).name == file
        and file.endswith(suffixes)
        and file.isprintable()
        and len(file.encode()) <= 255
    )


def check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> list[Problem]:
    """Every contradiction between an index and the tensors that its files hold."""
    problems = []
    for name, file in weight_map.items():
        if name not in tensors:
            problems.append(Problem(str(index), f"{name} is said to be in {file}, which lacks it"))
        elif tensors[name].file.name != file:
            what = f"{name} is said to be in {file}, but is in {tensors[name].file.name}"
            problems.append(Problem(str(index), what))
    problems += [
        Problem(str(tensors[name].file), f"{name} is not in {index.name}")
        for name in tensors
        if name not in weight_map
    ]
    return problems
