"""PyTorch's own files (`pytorch_model.bin`, `.pth`): read lazily, and never executed.

torch.load with weights_only builds tensors and nothing else, and refuses a pickle that asks for
anything more; with mmap no weight is read before it is asked for.
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import NUMPY_DTYPES, num_bytes
from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.index import check_index, weight_files
from pipeline.checkpoint.mapped_file import MappedFile
from pipeline.checkpoint.tensor_reader import RowReader, contiguous
from pipeline.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

SINGLE_FILE: Final = "pytorch_model.bin"
INDEX_FILE: Final = "pytorch_model.bin.index.json"
SUFFIXES: Final = (".bin", ".pth", ".pt")

# torch's name of a dtype without "torch." -> safetensors' name.
_DTYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def holds_pickles(path: Path) -> bool:
    """Whether the weights are PyTorch files: there are some, and no safetensors beside them."""
    if path.is_file():
        return path.suffix in SUFFIXES
    has_pickles = any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    return has_pickles and not any(path.glob("*.safetensors"))


class PickledReader(RowReader):
    """A TensorReader over PyTorch files.

    Attributes:
        tensors: every tensor by name; `offset` is its place in the order of the file's tensors.
    """

    def __init__(self, path: Path) -> None:
        """Opens a directory in Hugging Face layout, or one file.

        Raises:
            CheckpointError: nothing there, not a PyTorch file, one that wants to execute code, or an
                index that contradicts the files.
        """
        files, weight_map = (
            ([path], None)
            if path.is_file()
            else weight_files(path, SINGLE_FILE, INDEX_FILE, SUFFIXES)
        )
        tensors: dict[str, TensorInfo] = {}
        self._values: dict[tuple[Path, int], torch.Tensor] = {}
        self._mapped: dict[Path, MappedFile] = {}
        problems: list[Problem] = []
        for file in files:
            loaded = _load(file)
            if isinstance(loaded, Problem):
                problems.append(loaded)
                continue
            self._mapped[file] = MappedFile(file)
            for position, (name, value) in enumerate(loaded.items()):
                info = _info(name, value, file, position)
                if isinstance(info, Problem):
                    problems.append(info)
                elif name in tensors:
                    what = f"also in {tensors[name].file.name}: a tensor must be in one file only"
                    problems.append(Problem(f"{file}: {name}", what))
                else:
                    tensors[name] = info
                    self._values[file, position] = value
        if weight_map is not None and not problems:
            problems = check_index(path / INDEX_FILE, weight_map, tensors)
        if problems:
            raise CheckpointError(problems)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of dimension 0, copied out of the mapped file."""
        import torch

        info = self.tensors[name]
        value = self._values[info.file, info.offset]
        rows = value.reshape(1) if not value.dim() else value[start:stop]
        dtype = NUMPY_DTYPES[info.dtype]
        # numpy has no bfloat16 and no float8 of its own, so bytes go through an integer type.
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        view = rows.contiguous().view(integers[value.element_size()])
        copied: npt.NDArray[Any] = np.array(view.numpy())
        if rows.is_contiguous():
            self._mapped[info.file].forget(rows.data_ptr(), copied.nbytes)
        return contiguous(copied).view(dtype)


def _load(path: Path) -> dict[str, torch.Tensor] | Problem:
    """The state dict of one file, mapped; or why it is not one."""
    import torch

    try:
        size = path.stat().st_size
        if size == 0:
            return Problem(str(path), "0 bytes: an empty file", fix="copy or download it again")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        return _refused_pickle(path, error)
    except OSError as error:
        if error.errno == errno.EINVAL:  # the archive's own directory leads beyond its end
            return _not_loadable(path, str(error))
        return Problem(str(path), f"cannot be read: {error.strerror}")
    # torch's unpickler is a foreign parser fed with bytes that nobody vouches for. It checks few of
    # them, so a damaged pickle ends in whatever they happen to break: IndexError, AssertionError, ...
    except Exception as error:  # noqa: BLE001
        return _not_loadable(path, str(error) or type(error).__name__)
    if not isinstance(loaded, dict):
        return Problem(str(path), f"holds a {type(loaded).__name__}", "a mapping of name to tensor")
    return loaded


def _refused_pickle(path: Path, error: pickle.UnpicklingError) -> Problem:
    """torch's text names the global that the file wanted; its advice (to trust it) is left out."""
    text = str(error)
    _, found, rest = text.partition("Unsupported global: GLOBAL ")
    if not found:
        _, found, rest = text.partition("Trying to load unsupported GLOBAL ")
    wanted = rest.split()[0] if found else "something other than tensors"
    return Problem(
        str(path),
        f"the pickle wants to execute code ({wanted}); nothing of it was executed",
        "tensors only",
        "take the model from a source that you trust, as safetensors",
    )


def _not_loadable(path: Path, reason: str) -> Problem:
    if "mmap can only be used" in reason:
        return Problem(
            str(path),
            "no zip archive: another kind of file, or one of PyTorch before 1.6, which cannot be read "
            "piece by piece",
            "what torch.save writes",
            "load it with weights_only=True and save it as safetensors",
        )
    first_line = next(iter(reason.splitlines()), "")
    what = f"not a PyTorch file, or truncated ({first_line})"
    return Problem(str(path), what, fix="copy or download it again")


def _info(name: object, value: Any, path: Path, position: int) -> TensorInfo | Problem:
    if not isinstance(name, str) or not name.isprintable():
        return Problem(str(path), f"{name!a} is not a tensor name", "printable text")
    where = f"{path}: {name}"
    if type(value).__name__ not in ("Tensor", "Parameter"):
        return Problem(where, f"is a {type(value).__name__}", "a tensor")
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or str(value.layout) != "torch.strided":
        return Problem(where, f"{value.dtype}, {value.layout}", f"dense, {', '.join(_DTYPES)}")
    shape = tuple(value.shape)
    return TensorInfo(name, dtype, shape, num_bytes(dtype, shape), path, position)
