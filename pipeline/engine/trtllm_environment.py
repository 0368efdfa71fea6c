"""Where trtllm-build is installed: on PATH, in a virtual environment, or in a container image."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem, ToolError
from pipeline.tensorrt_llm_config import Environment, ImageEnvironment, VenvEnvironment

PROGRAM = "trtllm-build"
CONTAINER_FLAGS = ("--gpus", "all", "--shm-size", "1g", "--ulimit", "memlock=-1")
"""What TensorRT-LLM's documentation asks of a container."""
_VERSION_CODE = "import importlib.metadata as m; print(m.version('tensorrt_llm'))"
_PROBE_S = 60


@dataclass(frozen=True)
class HostTool:
    """trtllm-build on this host.

    Attributes:
        program: the executable.
        python: the interpreter that it runs under.
    """

    program: Path
    python: Path

    def version(self) -> str:
        """Version of tensorrt_llm, from its metadata: importing it takes a GPU and many seconds.

        Raises:
            ToolError: the interpreter has no tensorrt_llm, or does not run.
        """
        return _output([str(self.python), "-c", _VERSION_CODE], "version of tensorrt_llm")

    def command(self, directories: Sequence[Path], run_dir: Path) -> list[str]:
        """The beginning of a command line."""
        return [str(self.program)]


@dataclass(frozen=True)
class ImageTool:
    """trtllm-build in an image.

    Attributes:
        program: docker or podman.
        image: name with tag or digest.
    """

    program: Path
    image: str

    @property
    def tag(self) -> str:
        """What follows the name; often the version."""
        return self.image.rpartition(":")[2]

    def version(self) -> str:
        """See HostTool; starts a container."""
        command = [*self._run([]), "python3", "-c", _VERSION_CODE]
        return _output(command, f"version of tensorrt_llm in {self.image}")

    def command(self, directories: Sequence[Path], run_dir: Path) -> list[str]:
        """The same paths inside as outside, so that one command line serves both."""
        mounts = [text for path in directories for text in ("--volume", f"{path}:{path}")]
        return [*self._run([*mounts, "--workdir", str(run_dir)]), PROGRAM]

    def _run(self, options: list[str]) -> list[str]:
        user = ["--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp"]
        command = [str(self.program), "run", "--rm", "--init", *CONTAINER_FLAGS, *user]
        return [*command, *options, self.image]


Tool = HostTool | ImageTool


def find_tool(environment: Environment, resolve: Callable[[str], Path]) -> Tool | None:
    """What the YAML means; None where this machine does not have it.

    Args:
        resolve: makes a path of the YAML absolute.
    """
    if isinstance(environment, ImageEnvironment):
        program = shutil.which(environment.program)
        return None if program is None else ImageTool(Path(program), environment.image)
    if isinstance(environment, VenvEnvironment):
        programs = resolve(environment.venv) / "bin"
        program = shutil.which(PROGRAM, path=str(programs))
        return None if program is None else HostTool(Path(program), programs / "python")
    program = shutil.which(PROGRAM)
    return None if program is None else HostTool(Path(program), _interpreter(Path(program)))


def described(environment: Environment) -> str:
    """Where it was looked for, in words."""
    if isinstance(environment, ImageEnvironment):
        return f"{environment.program} is not installed here"
    if isinstance(environment, VenvEnvironment):
        return f"{environment.venv} has no {PROGRAM}"
    return f"{PROGRAM} is not installed here"


def missing_flags(help_text: str, arguments: Sequence[str]) -> list[str]:
    """Flags of a command line that the tool's --help does not name."""
    known = set(help_text.replace(",", " ").replace("[", " ").replace("]", " ").split())
    return [flag for flag in arguments if flag.startswith("--") and flag not in known]


def _interpreter(program: Path) -> Path:
    """By the first line of the script, as pip writes it; else the python beside it."""
    with program.open("rb") as file:
        first = file.readline(4096)
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    if words and "python" in words[0]:
        return Path(words[0])
    return Path(shutil.which("python3") or program.parent / "python3")


def _output(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(Problem(command[0], f"{what}: {error}")) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolError(Problem(command[0], f"{what}: {said}", fix="install tensorrt_llm there"))
    return done.stdout.strip()
