"""Runs trtllm-build on a checkpoint, and takes its directory only when every rank is in it.

trtllm-build writes config.json as soon as rank 0 is done, so a plausible directory may lack ranks.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.build_config import BuildConfig
from pipeline.checkpoint.trtllm_config import QUANT_FILE
from pipeline.dead_process import death_problem
from pipeline.engine.engine_config import CONFIG_FILE
from pipeline.engine.trtllm_environment import Tool, missing_flags
from pipeline.engine.trtllm_flags import BuildSubject
from pipeline.engine.trtllm_version import PINNED
from pipeline.errors import CheckpointError, GateError, Problem, StageError, ToolError
from pipeline.orphans import end_with_parent
from pipeline.quant.formats import FORMATS, KV_CACHE_ALGOS, MIXED

TIMING_CACHE = "model.cache"
_HELP_S = 600
_MAPPING_SIZES = ("world_size", "tp_size", "pp_size")


@dataclass(frozen=True)
class EngineOrder:
    """What is to be built.

    Attributes:
        checkpoint_dir: TensorRT-LLM checkpoint.
        arguments: flags (`pipeline.engine.trtllm_flags.build_arguments`).
        workers: ranks built at the same time.
        timing_cache: one to start from, or None.
        version: of the tool, as it was probed.
    """

    checkpoint_dir: Path
    arguments: Sequence[str]
    workers: int
    timing_cache: Path | None
    version: str


def build_engines(tool: Tool, order: EngineOrder, out_dir: Path, log_path: Path) -> None:
    """Build every rank aside, check, then put the files into `out_dir`.

    Args:
        out_dir: existing directory; gets config.json, rank{r}.engine and what else the tool writes.
        log_path: gets the tool's output.

    Raises:
        ToolError: the tool does not know one of the flags.
        StageError: it failed.
        GateError: it ended without an error, and files are missing or belong to another build.
    """
    aside = out_dir / "unfinished"
    aside.mkdir()
    checkpoint_dir = order.checkpoint_dir.resolve()
    directories = [checkpoint_dir, aside.resolve()]
    if order.timing_cache is not None:
        directories.append(order.timing_cache.resolve())
    prefix = tool.command(directories, aside.resolve())
    command = [*prefix, *_full_arguments(order, checkpoint_dir, aside.resolve())]
    _check_flags(prefix, command[len(prefix) :])
    with log_path.open("ab") as log:
        log.write(f"{' '.join(command)}\n".encode())
        log.flush()
        # The timing cache lands in the current directory.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=aside,
            preexec_fn=end_with_parent,  # a container's client passes SIGTERM on
            check=False,
        )
    if done.returncode:
        raise StageError(death_problem("trtllm-build", done.returncode, log_path))
    check_engines(aside, read_config(checkpoint_dir), order.version)
    for path in sorted(aside.iterdir()):
        path.rename(out_dir / path.name)
    aside.rmdir()


def _full_arguments(order: EngineOrder, checkpoint_dir: Path, aside: Path) -> list[str]:
    places = ["--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(aside)]
    places += ["--output_timing_cache", str(aside / TIMING_CACHE)]
    if order.timing_cache is not None:
        places += ["--input_timing_cache", str(order.timing_cache.resolve())]
    return [*places, "--workers", str(order.workers), *order.arguments]


def _check_flags(prefix: Sequence[str], arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            [*prefix, "--help"], capture_output=True, text=True, timeout=_HELP_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        what = f"trtllm-build --help gave no answer within {_HELP_S} s"
        raise ToolError(Problem(prefix[0], what)) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        what = f"trtllm-build --help ended with code {done.returncode}: {said}"
        raise ToolError(Problem(prefix[0], what, fix="see that it starts by hand"))
    unknown = missing_flags(done.stdout, arguments)
    if unknown:
        what = f"trtllm-build does not know {', '.join(unknown)}"
        raise ToolError(Problem(prefix[0], what, fix=f"use TensorRT-LLM {PINNED}"))


def check_engines(engine_dir: Path, checkpoint: Mapping[str, Any], version: str) -> None:
    """Check that every rank is there, none too many, and config.json is of this build.

    Raises:
        GateError: everything that is not so.
    """
    problems = []
    world_size = int(checkpoint["mapping"]["world_size"])
    expected = {f"rank{rank}.engine" for rank in range(world_size)}
    found = {path.name for path in engine_dir.glob("rank*.engine") if path.stat().st_size}
    if expected - found:
        names = ", ".join(sorted(expected - found))
        problems.append(Problem(str(engine_dir), f"{names} missing or empty", fix="build again"))
    if found - expected:
        names = ", ".join(sorted(found - expected))
        problems.append(Problem(str(engine_dir), f"{names} of another build", fix="build again"))
    problems += _config_problems(engine_dir / CONFIG_FILE, checkpoint, version)
    if problems:
        raise GateError(problems)


def _config_problems(path: Path, checkpoint: Mapping[str, Any], version: str) -> list[Problem]:
    try:
        config = json.loads(path.read_text("utf-8"))
        built, mapping = config["version"], config["pretrained_config"]["mapping"]
        sizes = {name: mapping[name] for name in _MAPPING_SIZES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Problem(str(path), f"cannot be read: {error!r}", fix="build again")]
    wanted = {name: checkpoint["mapping"][name] for name in _MAPPING_SIZES}
    problems = []
    if built != version:
        what = f"was written by TensorRT-LLM {built}"
        problems.append(Problem(str(path), what, version, "build again"))
    if sizes != wanted:
        problems.append(Problem(str(path), f"mapping is {sizes}", str(wanted), "build again"))
    return problems


def read_config(checkpoint_dir: Path) -> dict[str, Any]:
    """config.json of a TensorRT-LLM checkpoint.

    Raises:
        CheckpointError: it cannot be read, or has no mapping.
    """
    path = checkpoint_dir / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
        for name in _MAPPING_SIZES:
            int(config["mapping"][name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error!r}")) from error
    assert isinstance(config, dict)
    return config


def checkpoint_subject(build: BuildConfig, sm: int, checkpoint_dir: Path) -> BuildSubject:
    """What flags depend on, read from the checkpoint.

    Raises:
        CheckpointError: config.json or quant_cfg.json cannot be read.
    """
    config = read_config(checkpoint_dir)
    quantization = config.get("quantization") or {}
    names = {fmt.quant_algo: name for name, fmt in FORMATS.items()}
    name = names[quantization.get("quant_algo")]
    parts: tuple[str, ...] = (name,)
    if name == MIXED:
        layers = _read_json(checkpoint_dir / QUANT_FILE)["quantized_layers"]
        parts = tuple(sorted({names[layer["quant_algo"]] for layer in layers.values()}))
    return BuildSubject(
        build=build,
        sm=sm,
        format=name,
        parts=parts,
        kv_cache=KV_CACHE_ALGOS.get(quantization.get("kv_cache_quant_algo") or "", "fp16"),
        tp=config["mapping"]["tp_size"],
        world_size=config["mapping"]["world_size"],
        architecture=config["architecture"],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}")) from error
    assert isinstance(value, dict)
    return value
