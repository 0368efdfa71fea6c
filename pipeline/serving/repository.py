"""An engine as a Triton model repository that can be moved, copied and started as it is.

<repository>/<model>/config.pbtxt      generated, and read back through Triton's schema
                    /1/model.py        loads the runtime of this package
                    /1/engine/         the engine's CPU network and tokenizer, hard-linked

Hard links cost no space and no time, survive moving the repository or deleting the engine, and never
dangle as symbolic links do; across file systems the files are copied. Engine files are never changed in
place, so sharing them is safe.

Tensor names and shapes are those of TensorRT-LLM's `ensemble` model, so its clients work unchanged: name
the model `ensemble` and even the URL is the same. One difference on purpose: the prompt is not part of
the answer unless `exclude_input_in_output` is false.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import GateError, PlanError, Problem
from pipeline.hardlink import link_or_copy
from pipeline.names import MODEL_NAME
from pipeline.serving.model_config import (
    DataType,
    ModelConfig,
    TensorConfig,
    parse_pbtxt,
    to_pbtxt,
)

ENGINE_FILES = ("config.json", "rank0.onnx", "rank0.weights", "tokenizer/tokenizer.json")
MODEL_VERSION = "1"

INPUTS = (
    TensorConfig(name="text_input", data_type=DataType.STRING, dims=(1,)),
    TensorConfig(name="max_tokens", data_type=DataType.INT32, dims=(1,)),
    TensorConfig(name="temperature", data_type=DataType.FP32, dims=(1,), optional=True),
    TensorConfig(name="top_k", data_type=DataType.INT32, dims=(1,), optional=True),
    TensorConfig(name="top_p", data_type=DataType.FP32, dims=(1,), optional=True),
    TensorConfig(name="seed", data_type=DataType.UINT64, dims=(1,), optional=True),
    TensorConfig(name="stop_words", data_type=DataType.STRING, dims=(-1,), optional=True),
    TensorConfig(name="stream", data_type=DataType.BOOL, dims=(1,), optional=True),
    TensorConfig(name="exclude_input_in_output", data_type=DataType.BOOL, dims=(1,), optional=True),
)
OUTPUTS = (
    TensorConfig(name="text_output", data_type=DataType.STRING, dims=(-1,)),
    TensorConfig(name="finish_reason", data_type=DataType.STRING, dims=(1,)),
    TensorConfig(name="num_input_tokens", data_type=DataType.INT32, dims=(1,)),
    TensorConfig(name="num_output_tokens", data_type=DataType.INT32, dims=(1,)),
)

_MODEL_SOURCE = '''\
"""Started by Triton's python backend; everything is in the installed package `trtpipe`."""

import sys

try:
    from pipeline.serving.python_model import TritonPythonModel
except ModuleNotFoundError as error:
    if error.name != "pipeline":
        raise
    raise ModuleNotFoundError(
        f"trtpipe is not installed in {sys.prefix}, the Python that the python backend found; "
        "put the bin directory of the environment that has it first on PATH"
    ) from error

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class RepositoryOptions:
    """How the engine is served.

    Attributes:
        model_name: name of the model in Triton's URLs.
        num_slots: requests that run at the same time; None: the engine's max_batch_size.
        num_threads: threads of one matrix product; None: every core.
    """

    model_name: str
    num_slots: int | None = None
    num_threads: int | None = None


def emit_repository(engine_dir: Path, out_dir: Path, options: RepositoryOptions) -> None:
    """Write a model repository for `engine_dir` into `out_dir` (existing or not; without this model).

    Raises:
        GateError: the engine lacks files, or the generated config is not what was meant.
        PlanError: a model name or slot count that cannot be served, or an engine of several ranks.
        ToolError: tritonclient, whose schema checks the config, is not installed.
    """
    engine_config = _check_engine(engine_dir)
    _check_options(options, engine_config)
    version_dir = out_dir / options.model_name / MODEL_VERSION
    version_dir.mkdir(parents=True)
    _link_engine(engine_dir, version_dir / "engine")
    (version_dir / "model.py").write_text(_MODEL_SOURCE, encoding="utf-8")
    config_path = out_dir / options.model_name / "config.pbtxt"
    config = text_model_config(options)
    config_path.write_text(to_pbtxt(config), encoding="utf-8")
    read_back = parse_pbtxt(config_path.read_text(encoding="utf-8"), str(config_path))
    if read_back != config:
        raise GateError(Problem(str(config_path), f"reads back as {read_back}", str(config)))


def text_model_config(options: RepositoryOptions) -> ModelConfig:
    """The streaming text model: text in, text out, any number of responses."""
    parameters = {"engine_dir": "engine"}  # relative to the version directory
    if options.num_slots is not None:
        parameters["num_slots"] = str(options.num_slots)
    if options.num_threads is not None:
        parameters["num_threads"] = str(options.num_threads)
    return ModelConfig(
        name=options.model_name,
        backend="python",
        # Not for batching, which the runtime does by itself: it gives tensors the shape [1, n] that
        # clients of TensorRT-LLM send.
        max_batch_size=1,
        decoupled=True,
        inputs=INPUTS,
        outputs=OUTPUTS,
        parameters=parameters,
    )


def _check_engine(engine_dir: Path) -> dict[str, Any]:
    """The engine's config.json."""
    missing = [name for name in ENGINE_FILES if not (engine_dir / name).is_file()]
    if missing:
        raise GateError(
            Problem(str(engine_dir / name), "there is no such file", fix="build the engine again")
            for name in missing
        )
    path = engine_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        world_size = config["pretrained_config"]["mapping"]["world_size"]
        int(config["build_config"]["max_batch_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise GateError(
            Problem(str(path), f"not an engine config: {error!r}", fix="build the engine again")
        ) from error
    if world_size != 1:
        raise PlanError(
            Problem(
                where=str(path),
                what=f"the engine has {world_size} ranks",
                allowed="1 rank: the CPU runtime has no collective operations",
                fix="build it with tp 1 and pp 1",
            )
        )
    assert isinstance(config, dict)
    return config


def _check_options(options: RepositoryOptions, engine_config: dict[str, Any]) -> None:
    problems = []
    if not MODEL_NAME.fullmatch(options.model_name):
        problems.append(
            Problem("model name", repr(options.model_name), "letters, digits, and . _ - inside")
        )
    max_batch_size = engine_config["build_config"]["max_batch_size"]
    if options.num_slots is not None and not 1 <= options.num_slots <= max_batch_size:
        problems.append(
            Problem(
                where="num_slots",
                what=str(options.num_slots),
                allowed=f"1 to the engine's max_batch_size = {max_batch_size}",
            )
        )
    if options.num_threads is not None and options.num_threads < 1:
        problems.append(Problem("num_threads", str(options.num_threads), "1 or more"))
    if problems:
        raise PlanError(problems)


def _link_engine(engine_dir: Path, out_dir: Path) -> None:
    tokenizer_files = sorted((engine_dir / "tokenizer").iterdir())
    sources = [engine_dir / name for name in ENGINE_FILES if "/" not in name]
    (out_dir / "tokenizer").mkdir(parents=True)
    for source in (*sources, *tokenizer_files):
        link_or_copy(source, out_dir / source.relative_to(engine_dir))
