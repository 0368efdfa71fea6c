"""A build kit: a directory that builds the engine where this machine cannot, by one command.

build.sh            ./build.sh [host|container|slurm] [DIRECTORY]
build.slurm         what `slurm` submits
README.md           the same commands, by hand
config.yaml         the resolved YAML
checkpoint/         TensorRT-LLM checkpoint (tensorrt_llm), or
network/, pipeline/ ONNX network and the modules that compile it (tensorrt)
tokenizer/
SHA256SUMS          of every file above, checked before anything is built
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import pipeline
from pipeline.checkpoint.trtllm_config import QUANT_FILE
from pipeline.engine.engine_config import CONFIG_FILE
from pipeline.engine.trtllm_version import ALLOWED, PINNED
from pipeline.hardlink import link_or_copy
from pipeline.network.export import tensorrt_graph_path, weights_path
from pipeline.store import file_sha256, list_files
from pipeline.targets import Target

CHECKSUMS = "SHA256SUMS"
_GPUS_PER_NODE = 8
_LEFT_OUT = ("demo", "__pycache__")


@dataclass(frozen=True)
class Kit:
    """What every kit has.

    Attributes:
        name: of the build.
        target: the GPU that it must be built on.
        world_size: ranks.
        workers: ranks built at the same time, each on a GPU of its own.
        config_yaml: text of the resolved YAML.
        checkpoint_dir: TensorRT-LLM checkpoint.
        image: container image; "" where the user must name one.
    """

    name: str
    target: Target
    world_size: int
    workers: int
    config_yaml: str
    checkpoint_dir: Path
    image: str

    @property
    def tasks_per_node(self) -> int:
        """Of a Slurm job: trtllm-build gives the GPU of its own number to every task of a node."""
        return min(self.workers, _GPUS_PER_NODE)


@dataclass(frozen=True)
class CheckpointKit(Kit):
    """For trtllm-build.

    Attributes:
        arguments: flags of trtllm-build, without directories, workers and timing caches.
    """

    arguments: Sequence[str]


@dataclass(frozen=True)
class NetworkKit(Kit):
    """For TensorRT's builder.

    Attributes:
        engine_dir: directory with the ranks' ONNX networks.
        requests: for each rank, the first argument of `python -m pipeline.engine.tensorrt_worker`.
    """

    engine_dir: Path
    requests: Sequence[str]


def write_kit(kit: CheckpointKit | NetworkKit, out_dir: Path) -> None:
    """Fill a directory that holds tokenizer/; large files are hard links where that is possible."""
    (out_dir / "config.yaml").write_text(kit.config_yaml, "utf-8")
    if isinstance(kit, CheckpointKit):
        _link(kit.checkpoint_dir, _checkpoint_files(kit), out_dir / "checkpoint")
    else:
        _link(kit.engine_dir, _network_files(kit), out_dir / "network")
        _link(kit.checkpoint_dir, _config_files(kit), out_dir / "network" / "checkpoint")
        root = Path(pipeline.__file__).parent
        _link(root, _sources(root), out_dir / "pipeline")
    for name in ("build.sh", "build.slurm", "README.md"):
        (out_dir / name).write_text(_rendered(name, kit), "utf-8")
    (out_dir / "build.sh").chmod(0o755)
    _write_checksums(out_dir)


def _checkpoint_files(kit: CheckpointKit) -> list[Path]:
    ranks = [kit.checkpoint_dir / f"rank{rank}.safetensors" for rank in range(kit.world_size)]
    return [*_config_files(kit), *ranks]


def _config_files(kit: Kit) -> list[Path]:
    files = [kit.checkpoint_dir / name for name in (CONFIG_FILE, QUANT_FILE)]
    return [path for path in files if path.exists() or path.name == CONFIG_FILE]


def _network_files(kit: NetworkKit) -> list[Path]:
    files = [kit.engine_dir / CONFIG_FILE]
    for rank in range(kit.world_size):
        files += [tensorrt_graph_path(kit.engine_dir, rank), weights_path(kit.engine_dir, rank)]
    return files


def _sources(root: Path) -> list[Path]:
    """Our own modules: TensorRT's parser leaves work undone that they do."""
    return [
        path
        for path in list_files(root)
        if path.suffix == ".py" and not set(path.relative_to(root).parts) & set(_LEFT_OUT)
    ]


def _link(root: Path, files: Sequence[Path], destination: Path) -> None:
    for path in files:
        target = destination / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, target)


def _rendered(name: str, kit: CheckpointKit | NetworkKit) -> str:
    templates = Environment(
        loader=PackageLoader("pipeline.packaging"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and Markdown, from typed and quoted values
    )
    templates.filters["quoted"] = shlex.quote
    is_checkpoint = isinstance(kit, CheckpointKit)
    return templates.get_template(f"{name}.j2").render(
        kit=kit,
        is_checkpoint=is_checkpoint,
        lines=_lines(kit.arguments) if isinstance(kit, CheckpointKit) else (),
        requests=kit.requests if isinstance(kit, NetworkKit) else (),
        allowed=ALLOWED,
        pinned=PINNED,
    )


def _lines(arguments: Sequence[str]) -> list[str]:
    """Each flag with its value, as a shell reads it."""
    lines: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            lines.append(argument)
        else:
            lines[-1] += f" {shlex.quote(argument)}"
    return lines


def _write_checksums(directory: Path) -> None:
    lines = [
        f"{file_sha256(path)}  {path.relative_to(directory).as_posix()}\n"
        for path in list_files(directory)
    ]
    (directory / CHECKSUMS).write_text("".join(lines), "utf-8")
