"""What is forecast: the few sizes that decide memory, cut loose from files and YAML."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.checkpoint.layout import mapping_problems
from pipeline.engine import BACKENDS
from pipeline.errors import Problem
from pipeline.models import ModelShape
from pipeline.network.limits import BuildLimits
from pipeline.parallel import Mapping, mappings
from pipeline.quant.backends import TENSORRT_LLM, refusal
from pipeline.quant.choose import MAX_BUDGET
from pipeline.quant.formats import FORMATS, QuantFormat
from pipeline.targets import Target


@dataclass(frozen=True)
class Subject:
    """One build, as far as its memory depends on it.

    Attributes:
        format: how the linears are stored.
        limits: batch and lengths.
        backend: the word of the YAML; "none": another tool builds the engine, from the checkpoint.
        budget_bits: the format is still to be chosen, with so many mean bits per weight; None: it is
            known.
        group_size: of formats that have one and are not chosen yet.
        max_num_tokens: most tokens of a call, where the backend has such a limit of its own.
    """

    shape: ModelShape
    format: QuantFormat
    tp: int
    pp: int
    moe_ep: int
    limits: BuildLimits
    backend: str
    target: Target
    budget_bits: float | None = None
    group_size: int = 128
    max_num_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Most tokens of one call."""
        whole = self.limits.max_batch_size * self.limits.max_input_len
        return self.max_num_tokens or whole

    @property
    def has_paged_cache(self) -> bool:
        """Whether requests share the cache, so that a full one only makes them wait."""
        return self.backend in ("tensorrt_llm", "none")

    @property
    def ranks(self) -> list[Mapping]:
        """The mapping of every rank, in rank order."""
        return mappings(self.tp, self.pp, self.moe_ep)

    @property
    def world_size(self) -> int:
        """How many GPUs the engine runs on."""
        return self.tp * self.pp

    @property
    def cut_format(self) -> QuantFormat:
        """What decides how weights may be cut: any linear may become int4 while that is open."""
        if self.budget_bits is None:
            return self.format
        return FORMATS["int4_awq"].with_group_size(self.group_size)


def cut_problems(subject: Subject) -> list[Problem]:
    """Why the shape cannot be cut as asked, with the legal choices."""
    return mapping_problems(
        subject.shape, subject.cut_format, subject.tp, subject.pp, subject.moe_ep
    )


def is_possible(subject: Subject) -> bool:
    """Whether it can be cut, and its backend makes an engine of this format for the target."""
    if cut_problems(subject):
        return False
    parts = [part.name for part in subject.format.parts]
    if subject.backend not in BACKENDS:
        return all(refusal(name, TENSORRT_LLM, subject.target.sm) is None for name in parts)
    backend = BACKENDS[subject.backend]
    problems = (
        backend.can_target(subject.target, parts),
        backend.limits_problem(subject.limits),
        backend.head_size_problem(subject.shape.head_size),
    )
    return not any(problems)


def by_budget(fp16_bytes: int, fp8_bytes: int, bits: float) -> int:
    """Bytes with a mean of `bits` per weight of the linears, from those with 16 and with 8."""
    return fp16_bytes - round((fp16_bytes - fp8_bytes) * (MAX_BUDGET - bits) / 8)
