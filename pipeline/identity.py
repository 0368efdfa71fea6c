"""What a published engine is and what it needs, as manifest.json states it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Config

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_RANK_FILE = re.compile(r"rank(\d+)\.[a-z.]+")
_UNPUBLISHED = (".log", ".json")
_CUDA_OF_DISTRIBUTION = re.compile(r"[-_]cu(12|13)\b|[-_]cu(12|13)[-_]")


class _Stated(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class DriverNeed(_Stated):
    """The oldest NVIDIA driver that an engine can run with.

    Attributes:
        minimum: version of the driver on Linux; a branch such as "580" stands for all of its releases.
        source: the public page that says so.
    """

    minimum: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]
    source: str


DRIVERS = {
    "13": DriverNeed(
        minimum="580",
        source="https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    ),
    "12": DriverNeed(
        minimum="535",
        source="https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/installing-tensorrt/"
        "prerequisites.html",
    ),
}
"""CUDA's major version, which the compiler's package is made for -> what it needs. For CUDA 12 the page
of TensorRT's own packages is the stricter one."""


class MappingIdentity(_Stated):
    """How the model is cut; world_size = tp x pp ranks, each on a GPU of its own."""

    tp: Annotated[int, Field(ge=1)]
    pp: Annotated[int, Field(ge=1)]
    moe_ep: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=1)]


class LimitsIdentity(_Stated):
    """Sizes that the engine was built for; as pipeline.network.limits.BuildLimits."""

    max_batch_size: int
    max_seq_len: int
    max_input_len: int
    gather_context_logits: bool


class RankIdentity(_Stated):
    """One rank.

    Attributes:
        rank: its number, pp_rank * tp + tp_rank.
        files: those that belong to it alone; their hashes stand under `files` of the manifest.
        weight_bytes: weights that must be on its GPU; of a checkpoint, its whole file.
        weights_sha256: of the weights inside a TensorRT-RTX plan. The file's own hash differs from build
            to build by a few bytes of code, this one does not; None for everything else.
    """

    rank: Annotated[int, Field(ge=0)]
    files: tuple[str, ...]
    weight_bytes: int | None
    weights_sha256: Sha256 | None


class Identity(_Stated):
    """The section `identity` of a manifest.

    Attributes:
        kind: an engine, or the checkpoint that the build ends with.
        backend: the word in the YAML.
        compiler: what built the engine, or the runtime that loaded it; None for a checkpoint.
        version: its exact version; a TensorRT engine runs with this one only.
        sms: compute capabilities times ten that it runs on; () where none is compiled for.
        driver: None where it needs none, or where it is unknown.
        limits: None for a checkpoint.
        checkpoint_key: key of the TensorRT-LLM checkpoint in the store: same key, same bytes.
        format: of the linears' weights, and of lm_head where it is not fp16.
        tools: stage -> distribution -> version, of what may change that stage's bytes.
    """

    kind: Literal["engine", "checkpoint"]
    backend: str
    compiler: str | None
    version: str | None
    sms: tuple[int, ...]
    driver: DriverNeed | None
    mapping: MappingIdentity
    limits: LimitsIdentity | None
    checkpoint_key: Sha256
    format: str
    tools: dict[str, dict[str, str]]
    ranks: tuple[RankIdentity, ...]


def identity_of(
    config: Config,
    actions: Mapping[str, Mapping[str, Any]],
    checkpoint_key: str,
    build: Mapping[str, Any] | None,
    limits: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> Identity:
    """The identity of what is about to be published.

    Args:
        config: of the build.
        actions: stage -> fields of its action.
        checkpoint_key: of the convert stage.
        build: facts of the build stage; None where the checkpoint is what is published.
        limits: fields of BuildLimits.
        files: of the artifact that holds the ranks, as its manifest lists them.
    """
    tools = {stage: dict(action["tools"]) for stage, action in actions.items() if action["tools"]}
    facts = [] if build is None else build["ranks"]
    compiler, _, version = facts[0]["compiler"].partition(" ") if facts else ("", "", "")
    sms = tuple(facts[0]["sms"]) if facts else ()
    return Identity(
        kind="checkpoint" if build is None else "engine",
        backend=config.build.backend,
        compiler=compiler or None,
        version=version or None,
        sms=sms,
        driver=_driver(tools.get("build", {})) if sms else None,
        mapping=MappingIdentity(
            tp=config.mapping.tp,
            pp=config.mapping.pp,
            moe_ep=config.mapping.moe_ep,
            world_size=config.mapping.world_size,
        ),
        limits=None if build is None else LimitsIdentity.model_validate(dict(limits)),
        checkpoint_key=checkpoint_key,
        format=_format(config),
        tools=tools,
        ranks=tuple(_ranks(facts, files)),
    )


def _format(config: Config) -> str:
    quantize = config.quantize
    head = "" if quantize.lm_head == "fp16" else f", lm_head {quantize.lm_head}"
    return f"{quantize.format}{head}"


def _driver(distributions: Iterable[str]) -> DriverNeed | None:
    """By the CUDA version that a compiler's package has in its name."""
    found = [_CUDA_OF_DISTRIBUTION.search(name) for name in distributions]
    majors = {match[1] or match[2] for match in found if match}
    return DRIVERS[majors.pop()] if len(majors) == 1 else None


def _ranks(
    facts: Iterable[Mapping[str, Any]], files: Mapping[str, Mapping[str, Any]]
) -> Iterable[RankIdentity]:
    known = {rank["rank"]: rank for rank in facts}
    of_rank = rank_files(files)
    for rank, names in sorted(of_rank.items()):
        own = known.get(rank, {})
        yield RankIdentity(
            rank=rank,
            files=names,
            weight_bytes=own.get("weight_bytes") if known else files[names[0]]["bytes"],
            weights_sha256=own.get("weights_sha256"),
        )


def rank_files(names: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """Rank -> its published files, sorted, of the names in an engine or checkpoint directory."""
    found: dict[int, tuple[str, ...]] = {}
    for name in sorted(names):
        match = _RANK_FILE.fullmatch(name)
        if match and not name.endswith(_UNPUBLISHED):
            found[int(match[1])] = (*found.get(int(match[1]), ()), name)
    return found
