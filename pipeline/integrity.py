"""`verify` of a published directory: is it what its manifest says, and can it run on this machine?

Reads files and package metadata only: no compiler, runtime or model library is imported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.mapping_sizes import mapping_of
from pipeline.checkpoint.strict_json import parse_object
from pipeline.engine.rtx_plan import PlanHeader, chunk_sha256, read_header
from pipeline.errors import CheckpointError, GateError, Problem
from pipeline.identity import Identity, rank_files
from pipeline.manifest import Published
from pipeline.nvidia_host import NvidiaHost
from pipeline.publish import REPAIR, damaged_files, manifest_digest

_CONFIG = "config.json"
_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_cu12_libs", "tensorrt_rtx"),
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    "tensorrt_llm": ("tensorrt_llm",),
}
_WORDS = {
    "tensorrt_rtx": "TensorRT-RTX",
    "tensorrt": "TensorRT",
    "tensorrt_llm": "TensorRT-LLM",
    "onnxruntime": "ONNX Runtime",
}


def check_published(published: Published) -> list[Problem]:
    """Everything in which a published directory, or a copy of one, differs from its manifest.

    Every file is hashed. Of an engine or checkpoint also: the ranks against the mapping, config.json and
    the header of every TensorRT-RTX plan against the manifest's identity.
    """
    directory, document = published.directory, published.document
    problems = []
    if manifest_digest(document) != document["digest"]:
        what = "was edited after publishing (its digest differs)"
        problems.append(Problem(str(published.path), what, fix=REPAIR))
    damaged = damaged_files(directory, document)
    problems += damaged
    identity = published.manifest.identity
    if (
        _CONFIG in document["files"]
    ):  # a repository has its engine further down, and fewer files of it
        problems += _rank_problems(published, identity)
        problems += _config_problems(directory / _CONFIG, identity)
        if identity.backend == "tensorrt_rtx":
            changed = {problem.where for problem in damaged}
            problems += _plan_problems(published, identity, changed)
    return problems


def _rank_problems(published: Published, identity: Identity) -> Iterator[Problem]:
    """The set of ranks, and of each rank's kinds of file, must be whole."""
    where = str(published.path)
    expected = set(range(identity.mapping.world_size))
    stated = {rank.rank: rank.files for rank in identity.ranks}
    mapping = f"tp {identity.mapping.tp}, pp {identity.mapping.pp}"
    if identity.mapping.tp * identity.mapping.pp != identity.mapping.world_size:
        what = f"identity.mapping: {mapping} with world_size {identity.mapping.world_size}"
        yield Problem(where, what, "world_size = tp x pp", REPAIR)
    if set(stated) != expected or len(stated) != len(identity.ranks):
        what = f"identity.ranks has {_numbers(rank.rank for rank in identity.ranks)}; {mapping}"
        yield Problem(where, what, _numbers(expected), REPAIR)
    if stated != rank_files(published.document["files"]):
        what = "identity.ranks does not name the rank files that `files` lists"
        yield Problem(where, what, fix=REPAIR)
    kinds = {rank: {name.partition(".")[2] for name in files} for rank, files in stated.items()}
    for rank, own in kinds.items():
        for kind in sorted(set().union(*kinds.values()) - own):
            what = f"rank {rank} has no rank{rank}.{kind}"
            yield Problem(where, what, fix=REPAIR)


def _config_problems(path: Path, identity: Identity) -> Iterator[Problem]:
    """config.json, which runtimes read, must speak of the same engine."""
    try:
        config = parse_object(path.read_bytes())
    except FileNotFoundError:
        return  # said already: it is in the manifest
    except (OSError, ValueError) as error:
        yield Problem(str(path), f"cannot be read: {error}", fix=REPAIR)
        return
    pretrained = config.get("pretrained_config", config)
    try:
        sizes = mapping_of(pretrained if isinstance(pretrained, dict) else {})
    except CheckpointError as error:
        yield from error.problems
        return
    for name, stated in identity.mapping.model_dump(include={"tp", "pp", "moe_ep"}).items():
        if sizes.get(name, 1) != stated:
            what = f"mapping says {name} {sizes.get(name, 1)}"
            yield Problem(str(path), what, f"{stated}, as in manifest.json", REPAIR)
    built = config.get("build_config", {})
    limits = {} if identity.limits is None else identity.limits.model_dump()
    for name in limits.keys() & built.keys() if isinstance(built, dict) else ():
        if built[name] != limits[name]:
            what = f"build_config.{name} is {built[name]}"
            yield Problem(str(path), what, f"{limits[name]}, as in manifest.json", REPAIR)


def _plan_problems(
    published: Published, identity: Identity, changed: set[str]
) -> Iterator[Problem]:
    """Headers of TensorRT-RTX plans, and whether the weights of a changed one are as published."""
    for rank in identity.ranks:
        path = published.directory / f"rank{rank.rank}.engine"
        entry = published.document["files"].get(path.name)
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            continue  # said already
        try:
            header = read_header(path)
        except GateError as error:
            yield from error.problems
            continue
        yield from _header_problems(path, header, identity)
        if str(path) in changed and rank.weights_sha256 is not None:
            same = chunk_sha256(path, header.weights) == rank.weights_sha256
            what = (
                "its weights are those that were published; other bytes of it differ"
                if same
                else "its weights are not those that were published"
            )
            yield Problem(str(path), what, fix=REPAIR)


def _header_problems(path: Path, header: PlanHeader, identity: Identity) -> Iterator[Problem]:
    if header.version != identity.version:
        what = f"its header says TensorRT-RTX {header.version}"
        yield Problem(str(path), what, f"{identity.version}, as in manifest.json", REPAIR)
    if header.sms != identity.sms:
        what = f"its header says {_sms(header.sms) or 'no known GPU'}"
        yield Problem(str(path), what, f"{_sms(identity.sms)}, as in manifest.json", REPAIR)


def _numbers(ranks: Iterable[int]) -> str:
    return f"ranks {', '.join(map(str, sorted(ranks)))}"


def _sms(sms: Iterable[int]) -> str:
    return ", ".join(f"SM{sm}" for sm in sms)


@dataclass(frozen=True)
class Here:
    """What this machine offers to an engine.

    Attributes:
        driver: version of the NVIDIA driver; None without one.
        gpus: name and compute capability times ten of each GPU.
        runtime: installed version of what runs the engine; None without one.
        can_run: nothing is missing.
        lines: what is missing, each with what would help.
    """

    driver: str | None
    gpus: tuple[tuple[str, int], ...]
    runtime: str | None
    can_run: bool
    lines: tuple[str, ...]


def offered_here(
    identity: Identity, host: NvidiaHost, installed: Mapping[str, str] | None = None
) -> Here:
    """Whether the engine could run on this machine; being elsewhere is no fault of the engine.

    Args:
        host: the driver and GPUs here.
        installed: distribution -> version; None: `runtime_versions` of this environment.
    """
    versions = runtime_versions() if installed is None else installed
    compiler = identity.compiler or ""
    runtime = next((versions[name] for name in _distributions(compiler) if name in versions), None)
    lines = [*_gpu_lines(identity, host), *_runtime_lines(identity, runtime)]
    return Here(
        driver=host.driver,
        gpus=tuple((gpu.name, gpu.sm) for gpu in host.gpus),
        runtime=runtime,
        can_run=not lines,
        lines=tuple(lines),
    )


def _distributions(compiler: str) -> tuple[str, ...]:
    return _DISTRIBUTIONS.get(compiler, (compiler,))


def runtime_versions() -> dict[str, str]:
    """Distribution -> installed version, of everything that can run engines; nothing is imported."""
    names = ("onnxruntime", *(name for names in _DISTRIBUTIONS.values() for name in names))
    found = {name: _version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_lines(identity: Identity, host: NvidiaHost) -> Iterator[str]:
    if not identity.sms:
        return
    if host.driver is None:
        cpu = "; the CPU network can" if _has_cpu_network(identity) else ""
        yield f"no NVIDIA driver here: the engine cannot run on this machine{cpu}"
        return
    need = identity.driver
    if need is not None and _parts(host.driver) < _parts(need.minimum):
        yield (
            f"the NVIDIA driver here is {host.driver}: the engine needs {need.minimum} or newer "
            f"({need.source})"
        )
    if host.failure:
        yield host.failure
        return
    able = [gpu for gpu in host.gpus if gpu.sm in identity.sms]
    count = identity.mapping.world_size
    if len(able) < count:
        listed = ", ".join(f"{gpu.name} (SM{gpu.sm})" for gpu in host.gpus) or "none"
        wanted = "a GPU" if count == 1 else f"{count} GPUs, one a rank,"
        yield (
            f"GPUs here: {listed}; the engine needs {wanted} of {_sms(identity.sms)}: run it there, "
            "or build it with another `target`"
        )


def _has_cpu_network(identity: Identity) -> bool:
    return identity.mapping.world_size == 1 and "rank0.onnx" in identity.ranks[0].files


def _runtime_lines(identity: Identity, runtime: str | None) -> Iterator[str]:
    if identity.compiler is None:
        return
    word = _WORDS.get(identity.compiler, identity.compiler)
    if runtime is None:
        yield f"{word} is not installed here: the engine needs {word} {identity.version}"
    elif identity.sms and runtime != identity.version:
        yield (
            f"{word} {runtime} is installed here: the engine runs with {identity.version} only; "
            "install that, or build the engine again"
        )


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def identity_lines(identity: Identity) -> list[str]:
    """What an engine is and needs, for people."""
    mapping = identity.mapping
    ranks = "1 rank" if mapping.world_size == 1 else f"{mapping.world_size} ranks"
    cut = f"{ranks} (tp {mapping.tp}, pp {mapping.pp}"
    cut += f", moe_ep {mapping.moe_ep})" if mapping.moe_ep > 1 else ")"
    if identity.compiler is None:
        return [f"checkpoint {identity.checkpoint_key[:12]}, {cut}"]
    built = f"{_WORDS.get(identity.compiler, identity.compiler)} {identity.version}"
    if identity.sms:
        driver = "unknown" if identity.driver is None else f"{identity.driver.minimum} or newer"
        built += f" for {_sms(identity.sms)}, NVIDIA driver {driver}"
    lines = [f"{built}; {cut}; checkpoint {identity.checkpoint_key[:12]}"]
    weights = [rank for rank in identity.ranks if rank.weights_sha256 is not None]
    return lines + [f"rank {rank.rank} weights {str(rank.weights_sha256)[:12]}" for rank in weights]


def here_json(here: Here) -> dict[str, Any]:
    """Plain data of a Here."""
    gpus = [{"name": name, "sm": sm} for name, sm in here.gpus]
    return {
        "driver": here.driver,
        "gpus": gpus,
        "runtime": here.runtime,
        "can_run": here.can_run,
        "lines": list(here.lines),
    }
