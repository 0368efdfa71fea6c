"""Finding the tritonserver binary of the nvidia-pytriton wheel, and making it usable.

The wheel ships server, python backend and one backend stub per Python version in three places. The
python backend wants its stub next to its library, and takes the first `python3` on PATH as interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, ToolError

INSTALL = "pip install 'trtpipe[triton]'"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBPYTHON = f"libpython{PYTHON_VERSION}.so.1.0"


@dataclass(frozen=True)
class TritonFiles:
    """What a server start needs.

    Attributes:
        server: the executable.
        backend: directory with the python backend's library.
        stub: the stub executable of this Python version.
        libpython: shared library of this Python; None when the system's loader finds it by itself.
    """

    server: Path
    backend: Path
    stub: Path
    libpython: Path | None


def find_triton() -> TritonFiles:
    """Locate everything.

    Raises:
        ToolError: the wheel is missing, has no stub for this Python, numpy is too new for it, or this
            Python has no shared library; all that applies.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ToolError(
            Problem(
                "tritonserver", "nvidia-pytriton is not installed", fix=f"{INSTALL} (Linux only)"
            )
        )
    root = Path(spec.origin).parent / "tritonserver"
    files = TritonFiles(
        server=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / PYTHON_VERSION / "triton_python_backend_stub",
        libpython=_find_libpython(),
    )
    problems = _check_files(files) + _check_numpy() + _check_libpython(files.libpython)
    if problems:
        raise ToolError(problems)
    return files


def make_backend_directory(files: TritonFiles, directory: Path) -> None:
    """Fill `directory` with links so that it can be tritonserver's --backend-directory.

    Links, not copies: the stub finds its libraries relative to where it really lies.
    """
    backend = directory / "python"
    backend.mkdir(parents=True)
    for source in (
        files.backend / "libtriton_python.so",
        files.backend / "triton_python_backend_utils.py",
        files.stub,
    ):
        (backend / source.name).symlink_to(source)


def server_environment(files: TritonFiles, library_directory: Path) -> dict[str, str]:
    """The environment in which the stub is this very Python with its packages.

    `library_directory` gets a link to libpython, so that nothing else of its directory is put in front
    of the libraries that the server was built with.
    """
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    if files.libpython is not None:
        library_directory.mkdir(parents=True)
        (library_directory / LIBPYTHON).symlink_to(files.libpython)
        others = os.environ.get("LD_LIBRARY_PATH")
        paths = [str(library_directory), *([others] if others else [])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    return environment


def _find_libpython() -> Path | None:
    """The shared library of this interpreter, outside the loader's standard places too."""
    directories = [sysconfig.get_config_var(name) for name in ("LIBDIR", "LIBPL")]
    directories += [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    for directory in directories:
        if directory and (Path(directory) / LIBPYTHON).is_file():
            return Path(directory) / LIBPYTHON
    return None


def _check_files(files: TritonFiles) -> list[Problem]:
    problems = [
        Problem(str(path), "there is no such file", fix=f"{INSTALL} again")
        for path in (files.server, files.backend / "libtriton_python.so")
        if not path.is_file()
    ]
    if not files.stub.is_file():
        shipped = sorted(path.name for path in files.stub.parent.parent.glob("*"))
        problems.append(
            Problem(
                where="tritonserver",
                what=f"its python backend has no stub for Python {PYTHON_VERSION}",
                allowed=", ".join(shipped) or "none",
                fix="use one of these Python versions",
            )
        )
    return problems


def _check_numpy() -> list[Problem]:
    import numpy

    if int(numpy.__version__.split(".")[0]) < 2:
        return []
    return [
        Problem(
            where="tritonserver",
            what=f"numpy {numpy.__version__} kills its python backend",
            allowed="numpy below 2",
            fix="pip install 'numpy<2'",
        )
    ]


def _check_libpython(libpython: Path | None) -> list[Problem]:
    if libpython is not None or _loader_finds(LIBPYTHON):
        return []
    return [
        Problem(
            where="tritonserver",
            what=f"its python backend needs {LIBPYTHON}, and this Python has none",
            fix=f"apt-get install libpython{PYTHON_VERSION}, or a Python built with --enable-shared",
        )
    ]


def _loader_finds(library: str) -> bool:
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
