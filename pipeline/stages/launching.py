"""What the stages that start ranks take from the section `build`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import LoadedConfig
from pipeline.errors import Problem, ToolError
from pipeline.launch import find_mpirun, hostfile_problem


def hostfile(loaded: LoadedConfig) -> Path | None:
    """The file of hosts, absolute."""
    path = loaded.config.build.hostfile
    return None if path is None else loaded.resolve(path, "build", "hostfile")


def max_memory_bytes(loaded: LoadedConfig) -> int | None:
    """What ranks may take at the same time on one host; None: what is free."""
    limit = loaded.config.build.max_memory_gb
    return None if limit is None else int(limit * 1e9)


def launch_needs(loaded: LoadedConfig) -> tuple[str, ...]:
    """Distributions that start ranks."""
    return ("mpi4py",) if loaded.config.build.launch == "mpirun" else ()


def launch_problems(loaded: LoadedConfig) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """What keeps ranks from being started: problems of the YAML, and missing programs."""
    if loaded.config.build.launch != "mpirun":
        return (), ()
    kind = None
    missing: tuple[Problem, ...] = ()
    try:
        kind = find_mpirun().kind
    except ToolError as error:
        where = loaded.where("build", "launch")
        missing = tuple(replace(problem, where=where) for problem in error.problems)
    hosts, ranks = hostfile(loaded), loaded.config.mapping.world_size
    wrong = None if hosts is None else hostfile_problem(hosts, kind, ranks)
    if wrong is None:
        return (), missing
    where = loaded.where("build", "hostfile")
    return (replace(wrong, where=where, what=f"{wrong.where}: {wrong.what}"),), missing
