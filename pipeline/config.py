"""The YAML of one build, as frozen typed models; every mistake is reported with file, line and fix."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline import strict_yaml
from pipeline.build_config import NETWORK_BACKENDS, BuildConfig
from pipeline.calibration_config import (
    HUB_FILE_TAG,
    PATH_TAG,
    CalibrationConfig,
    HubFile,
)
from pipeline.calibration_config import Section as _Section
from pipeline.errors import ConfigError, Problem
from pipeline.links import possible_path, resolved
from pipeline.names import BUILD_NAME, MODEL_NAME
from pipeline.run_config import RehearsalConfig, RunConfig
from pipeline.strict_yaml import Document, KeyPath, Location
from pipeline.targets import TARGETS
from pipeline.tensorrt_llm_config import ENVIRONMENTS, NOT_ONE_OF
from pipeline.verify_config import VerifyConfig

FormatName = Literal[
    "fp16", "int4_awq", "int4_gptq", "w4a8_awq", "int8_wo", "int8_sq", "fp8", "mixed"
]
AlgorithmName = Literal["awq", "awq_clip", "gptq", "rtn", "smoothquant", "max"]


class DemoSource(_Section):
    """The small Llama that ships with the project."""

    source: Literal["demo"]


class HubSource(_Section):
    """A Hugging Face Hub repository at one commit."""

    source: Literal["hub"]
    id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit hash: a branch name moves, and an engine must say what it was made from."""
    shape: dict[str, Any] | None = None
    """Fields of the model's config.json, so that it can be planned and rehearsed before a download."""


class DirectorySource(_Section):
    """A local directory in Hugging Face layout; a relative path is relative to the YAML file."""

    source: Literal["directory"]
    path: str


class SyntheticSource(_Section):
    """Seeded random weights of a true architecture, to rehearse a build at full size."""

    source: Literal["synthetic"]
    shape: dict[str, Any]
    """Fields of a config.json."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


ModelSource = Annotated[
    DemoSource | HubSource | DirectorySource | SyntheticSource, Field(discriminator="source")
]


class QuantizeConfig(_Section):
    """Weight format of the engine. A checkpoint that has it already is not quantized again."""

    format: FormatName = "int4_awq"
    group_size: Literal[64, 128] = 128
    algorithm: AlgorithmName | None = None
    """How weights are rounded; None: the usual one of the format (`pipeline.quant.recipe`)."""
    search: Literal["gram", "modelopt"] = "gram"
    """Who searches AWQ's scales: Gram matrices, one scale for linears that share an input; or
    ModelOpt's own passes over the tokens, which average such scales when they export."""
    kv_cache: Literal["fp16", "fp8", "int8"] = "fp16"
    """Scales for a quantized KV cache; the engines built here keep theirs in fp16."""
    lm_head: Literal["fp16", "int8_wo"] = "fp16"
    """Of the head, beside a quantized body; round-to-nearest, one scale for each token's row."""
    keep: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linears that stay fp16: their Hugging Face names, * stands for anything."""
    budget: str | None = None
    """With format mixed: mean bits per weight of the decoder layers' linears, such as "4.5 bits"."""
    sensitivity: Literal["layer", "output", "kl"] = "layer"
    """By what mixed formats are chosen: the error behind the layer, of the linears' outputs (fewer
    passes), or of the logits (small models)."""
    asymmetric: Literal["keep", "requantize"] = "keep"
    """What becomes of zero points that a quantized checkpoint brings: kept exactly, or rounded away."""
    calibration: CalibrationConfig = CalibrationConfig()
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the quantizer computes; its sums, and so some last bits, depend on it."""
    max_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """That activations between layers may count on; None: what is free. More go to disk. It changes
    no result."""


class MappingConfig(_Section):
    """Tensor and pipeline parallel sizes."""

    tp: Annotated[int, Field(ge=1, le=64)] = 1
    pp: Annotated[int, Field(ge=1, le=64)] = 1
    moe_ep: Annotated[int, Field(ge=1, le=64)] = 1
    """Of the tp ranks, how many blocks the experts are shared out in; the rest cut each expert."""
    pad_ffn: bool = False
    """Zeros behind the feed-forward network where it cannot be cut; the model computes the same."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp


class ConvertConfig(_Section):
    """What conversion lets pass."""

    allow_not_finite: bool = False
    """NaN and infinite weights are refused otherwise, with their number and names."""


class ServeConfig(_Section):
    """The Triton model repository and server."""

    model_name: Annotated[str, Field(pattern=f"^{MODEL_NAME.pattern}$")] | None = None
    host: str = "127.0.0.1"
    http_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    grpc_port: Annotated[int, Field(ge=1, le=65535)] = 8001
    metrics_port: Annotated[int, Field(ge=1, le=65535)] = 8002

    @field_validator("host")
    @classmethod
    def _host_is_an_address(cls, host: str) -> str:
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(
                    f"{host!r} is no address; allowed: localhost, or an IP address such as 127.0.0.1"
                ) from None
        return host

    @model_validator(mode="after")
    def _ports_differ(self) -> ServeConfig:
        ports = [self.http_port, self.grpc_port, self.metrics_port]
        if len(set(ports)) < len(ports):
            raise ValueError(
                f"http_port, grpc_port and metrics_port are {', '.join(map(str, ports))}; allowed: "
                "three different ports"
            )
        return self


class Config(_Section):
    """One build."""

    name: str
    model: ModelSource
    target: str = "rtx4090"
    quantize: QuantizeConfig = QuantizeConfig()
    mapping: MappingConfig = MappingConfig()
    convert: ConvertConfig = ConvertConfig()
    build: BuildConfig = BuildConfig()
    verify: VerifyConfig = VerifyConfig()
    serve: ServeConfig = ServeConfig()
    run: RunConfig = RunConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_directory_name(cls, name: str) -> str:
        if not BUILD_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a directory; allowed: 1 to 64 of a-z 0-9 . _ -, first a "
                "letter or digit"
            )
        return name

    @field_validator("target")
    @classmethod
    def _target_is_known(cls, target: str) -> str:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; allowed: {', '.join(sorted(TARGETS))}")
        return target


class LoadedConfig(BaseModel):
    """A config with what is needed to speak about it.

    Attributes:
        config: the values that count: of a rehearsal, with the sizes of its section `rehearsal`.
        written: the values as YAML and command line have them.
        path: the YAML file, absolute.
        lines: dotted key -> "file:line", for problems found later.
        files: absolute path -> sha256 of the YAML and of all that it extends.
    """

    model_config = ConfigDict(frozen=True)

    config: Config
    written: Config
    path: Path
    lines: dict[str, str]
    files: dict[str, str] = {}

    @classmethod
    def of(
        cls, written: Config, path: Path, lines: dict[str, str], files: dict[str, str]
    ) -> LoadedConfig:
        """A config whose weights are known: the one place where a rehearsal gets its sizes."""
        is_rehearsal = isinstance(written.model, SyntheticSource)
        config = _rehearsed(written) if is_rehearsal else written
        return cls(config=config, written=written, path=path, lines=lines, files=files)

    def replaced(self, **changes: Any) -> LoadedConfig:
        """The same file with other top-level values, such as `model`."""
        written = self.written.model_copy(update=changes)
        return self.of(written, self.path, self.lines, self.files)

    @property
    def rehearsal(self) -> bool:
        """Synthetic weights: everything is built and measured, nothing is judged."""
        return isinstance(self.config.model, SyntheticSource)

    @property
    def rehearsal_note(self) -> str:
        """What a rehearsal reads less of than the build that it stands for; "" for nothing."""
        (quantize, verify), (full, full_verify) = (
            (config.quantize.calibration, config.verify) for config in (self.config, self.written)
        )
        parts = []
        if quantize != full and self.config.quantize.format != "fp16":
            parts.append(
                f"{quantize.num_samples} samples of {quantize.seq_len} tokens instead of "
                f"{full.num_samples} of {full.seq_len} to calibrate"
            )
        if verify != full_verify and self.has_network:
            parts.append(
                f"{verify.num_windows} windows of {verify.seq_len} tokens instead of "
                f"{full_verify.num_windows} of {full_verify.seq_len} to verify"
            )
        return f"rehearsal: {', '.join(parts)}" if parts else ""

    @property
    def converts_only(self) -> bool:
        """The build ends with the TensorRT-LLM checkpoint; no engine is made of it here."""
        return self.config.build.backend == "none"

    @property
    def has_network(self) -> bool:
        """The build makes an ONNX network, which can be verified on the CPU."""
        return self.config.build.backend in NETWORK_BACKENDS

    @property
    def served_name(self) -> str:
        """Name of the model in Triton."""
        return self.config.serve.model_name or self.config.name

    def where(self, *keys: str) -> str:
        """`file:line: dotted.key` of the nearest key that the YAML really has."""
        for end in range(len(keys), 0, -1):
            line = self.lines.get(".".join(keys[:end]))
            if line:
                return f"{line}: {'.'.join(keys)}"
        return f"{self.path}: {'.'.join(keys)}"

    def resolve(self, path: str, *keys: str) -> Path:
        """A path of the YAML as an absolute one; relative paths start at the file that has the key.

        A link that leads in a circle stays what it is, for the reader to report.

        Raises:
            ConfigError: no file can have this path.
        """
        location = self.lines.get(".".join(keys))
        base = Path(location.rpartition(":")[0]).parent if location else self.path.parent
        return resolved(base / _possible(path, self.where(*keys)))


def load_config(path: Path) -> LoadedConfig:
    """Read, merge (`extends:`) and check one YAML file.

    Raises:
        ConfigError: every problem of the file at once, each as `file:line: key: what; allowed; fix`.
    """
    shown_path = Path(path)
    document = _load_merged(shown_path, ())
    document.data.setdefault("name", shown_path.stem)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(_problems(error, document, shown_path)) from None
    lines = {
        ".".join(map(str, key)): str(location)
        for key, location in document.locations.items()
        if key
    }
    return LoadedConfig.of(config, resolved(shown_path), lines, document.digests)


def _rehearsed(written: Config) -> Config:
    """The same build on less text; never on more than the YAML asks for."""
    small, verify, quantize = written.rehearsal, written.verify, written.quantize
    calibration = quantize.calibration
    shorter = calibration.model_copy(
        update={
            "num_samples": min(small.num_samples, calibration.num_samples),
            "seq_len": min(small.seq_len, calibration.seq_len),
        }
    )
    fewer = verify.model_copy(
        update={
            "num_windows": min(small.num_windows, verify.num_windows),
            "seq_len": min(small.window_len, verify.seq_len),
        }
    )
    quantized = quantize.model_copy(update={"calibration": shorter})
    return written.model_copy(update={"quantize": quantized, "verify": fewer})


def _possible(path: str, where: str) -> Path:
    try:
        return possible_path(path)
    except ValueError as error:
        raise ConfigError(Problem(where, str(error))) from None


def _load_merged(path: Path, chain: tuple[Path, ...]) -> Document:
    real_path = resolved(path)
    if real_path in chain:
        cycle = " -> ".join(p.name for p in (*chain, real_path))
        raise ConfigError(Problem(f"{path}:1", f"extends: goes round in a circle: {cycle}"))
    document = strict_yaml.load(path)
    parent_name = document.data.pop("extends", None)
    if parent_name is None:
        return document
    where = document.locations[("extends",)]
    if not isinstance(parent_name, str):
        raise ConfigError(Problem(f"{where}: extends", f"{parent_name!r} is not a path"))
    parent_path = path.parent / _possible(parent_name, f"{where}: extends")
    if not parent_path.is_file():
        raise ConfigError(Problem(f"{where}: extends", f"no such file: {parent_path}"))
    parent = _load_merged(parent_path, (*chain, real_path))
    parent.data.pop("name", None)  # a variant has its own name
    return _merge(parent, document)


def _merge(parent: Document, child: Document) -> Document:
    data = _merge_data(parent.data, child.data)
    locations = {**parent.locations, **child.locations}
    return Document(data, locations, {**parent.digests, **child.digests})


def _merge_data(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _is_other_source(old, value):
            value = _merge_data(old, value)
        merged[key] = value
    return merged


def _is_other_source(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Another kind of source replaces the whole section: keys of the old kind would be refused."""
    return "source" in new and new["source"] != old.get("source")


def _problems(error: ValidationError, document: Document, path: Path) -> list[Problem]:
    return [_problem(dict(detail), document, path) for detail in error.errors(include_url=False)]


def _problem(detail: dict[str, Any], document: Document, path: Path) -> Problem:
    loc = _real_path(detail["loc"], document.data)
    where = f"{_nearest(loc, document.locations, path)}: {'.'.join(map(str, loc)) or 'file'}"
    kind, value = detail["type"], detail.get("input")
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(where, loc, detail["loc"])
    if kind == "model_type":
        return Problem(
            where, f"{value!r} is not a section", "`key: value` lines", "or leave it out"
        )
    if kind == "tuple_type":
        return Problem(where, f"{value!r} is not a list", f"[{value!r}]")
    if kind == "missing":
        return Problem(where, "is missing", fix=f"add `{loc[-1]}:`")
    if kind in ("literal_error", "union_tag_invalid", "enum"):
        allowed = context.get("expected") or context.get("expected_tags", "")
        key = ".source" if "tag" in context else ""
        return Problem(f"{where}{key}", f"{_shown(value, context)} is not known", str(allowed))
    if kind == NOT_ONE_OF:
        return Problem(where, f"{value!r} is not known", detail["msg"])
    if kind == "union_tag_not_found":
        return Problem(where, "has no `source:`", "demo, hub, directory, synthetic")
    if kind == "value_error":
        what, _, allowed = str(context["error"]).partition("; allowed: ")
        return Problem(where, what, allowed)
    if kind == "string_pattern_mismatch":
        return Problem(where, f"{value!r} does not fit", *_pattern_help(str(loc[-1]), context))
    fix = "put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return Problem(where, f"{value!r}: {detail['msg']}", fix=fix)


def _pattern_help(key: str, context: dict[str, Any]) -> tuple[str, str]:
    if key == "revision":
        return (
            "the 40 hexadecimal digits of a commit",
            "take it from its page on the Hub, Files, History: a branch name moves",
        )
    if key == "file":
        return "the path of one file within the dataset, such as data/train.parquet", ""
    if key in ("id", "hub"):
        return "owner/name, as on the Hub", ""
    if key == "image":
        return "name:tag or name@sha256:digest", ""
    return str(context["pattern"]), ""


def _shown(value: Any, context: dict[str, Any]) -> str:
    return repr(context["tag"]) if "tag" in context else repr(value)


def _unknown_key(where: str, loc: KeyPath, full: Iterable[str | int]) -> Problem:
    known = sorted(_fields_at(list(full)[:-1]))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    fix = f"did you mean `{close[0]}`?" if close else "remove it"
    return Problem(where, "unknown key", ", ".join(known), fix)


def _fields_at(loc: list[str | int]) -> set[str]:
    """Field names of the section at a pydantic location (union tags included in the location)."""
    section: type[BaseModel] = Config
    candidates: dict[str, type[BaseModel]] = {
        get_args(member.model_fields["source"].annotation)[0]: member
        for member in (DemoSource, HubSource, DirectorySource, SyntheticSource)
    }
    candidates |= {HUB_FILE_TAG: HubFile, **ENVIRONMENTS}
    for part in loc:
        if str(part) in candidates:
            section = candidates[str(part)]
            continue
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type):  # else a union, whose tag comes next
            assert issubclass(annotation, BaseModel)
            section = annotation
    extra = {"extends"} if section is Config else set()
    return set(section.model_fields) | extra


_SILENT_TAGS = frozenset({PATH_TAG, HUB_FILE_TAG, *ENVIRONMENTS})
"""Of unions whose members are told apart by their form; no YAML has them."""


def _real_path(loc: Iterable[str | int], data: Any) -> KeyPath:
    """Location without the union tags that pydantic puts in."""
    path: list[str | int] = []
    parts = list(loc)
    for i, part in enumerate(parts):
        present = isinstance(data, dict) and part in data
        tag = isinstance(data, dict) and data.get("source") == part and i < len(parts) - 1
        if (tag and not present) or part in _SILENT_TAGS:
            continue
        path.append(part)
        data = data[part] if present else None
    return tuple(path)


def _nearest(loc: KeyPath, locations: dict[KeyPath, Location], path: Path) -> Location:
    for end in range(len(loc), -1, -1):
        if loc[:end] in locations:
            return locations[loc[:end]]
    return Location(str(path), 1)
