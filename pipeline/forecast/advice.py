"""What is legal, and may disappoint: bounds and measurements of others, each with its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.forecast.device import RankMemory, rank_memories
from pipeline.forecast.sizes_text import size_text
from pipeline.forecast.subject import Subject
from pipeline.quant.backends import ONNXRUNTIME

_NVLINK: Final = ("a100-80gb", "h100-80gb")
"""Targets whose boards are joined by NVLink (their data sheets); the others have PCIe, or are alone."""
_DATA_CENTRE_SMS: Final = (80, 90)
_LARGE_BATCH: Final = 8
_BOUND_BY_OTHERS: Final = 3000
"""Tokens per second from which starting kernels takes longer than reading such small weights."""
_ROOFLINE = "bytes per token over the data sheet's bandwidth"
_MODELOPT = "ModelOpt 0.37, examples/benchmark.md: H200, TensorRT-LLM 0.15, 2048 + 128 tokens"


@dataclass(frozen=True)
class Advice:
    """One remark.

    Attributes:
        source: where that is known from.
    """

    text: str
    source: str

    @property
    def line(self) -> str:
        """Both."""
        return f"{self.text} ({self.source})"


def advice(subject: Subject) -> tuple[Advice, ...]:
    """Every remark on a build whose shape can be cut, most useful first; none on one for the CPU."""
    if subject.backend == ONNXRUNTIME:
        return ()
    found = (*_roofline(subject), *_slow_int4(subject), *_slow_links(subject), *_tokens(subject))
    return tuple(found)


def decode_rate(
    memories: tuple[RankMemory, ...], subject: Subject, batch: int, context: int
) -> float:
    """Upper bound of tokens per second: a step reads the weights once, and every row's cache.

    Ranks of a stage read at the same time, stages one after the other.

    Args:
        context: tokens in the cache of every row.
    """
    stages = memories[:: subject.tp]
    seconds = sum(
        (stage.weights.read_per_step + batch * context * stage.kv_bytes_per_token)
        / subject.target.bandwidth_bytes_s
        for stage in stages
    )
    return batch / seconds


def _roofline(subject: Subject) -> Iterator[Advice]:
    memories, limits = rank_memories(subject), subject.limits
    one = decode_rate(memories, subject, 1, 0)
    if one > _BOUND_BY_OTHERS:
        return
    text = f"decoding makes at most {one:.0f} tokens/s for one row"
    if limits.max_batch_size > 1:
        context = limits.max_input_len
        many = decode_rate(memories, subject, limits.max_batch_size, context)
        text += f", {many:.0f} for {limits.max_batch_size} rows of {context} tokens together"
    yield Advice(text, _ROOFLINE)


def _slow_int4(subject: Subject) -> Iterator[Advice]:
    """Int4 weights are unpacked for every product; with many rows that is what limits it."""
    names = {part.name for part in subject.format.parts}
    is_int4 = bool(names & {"int4_awq", "int4_gptq"})
    if not is_int4 or subject.limits.max_batch_size < _LARGE_BATCH:
        return
    if subject.target.sm in _DATA_CENTRE_SMS:
        text = (
            "int4 weights are slower than 16 bits at large batches: Llama-3.1-8B int4_awq made 1.33 of "
            "bf16's tokens/s at batch 1, 0.75 at 8, 0.83 at 64; fp8 1.41, 1.31, 1.30"
        )
        yield Advice(text, _MODELOPT)


def _slow_links(subject: Subject) -> Iterator[Advice]:
    if subject.tp == 1 or subject.target.name in _NVLINK:
        return
    shape = subject.shape
    per_token = 2 * shape.num_layers * shape.hidden_size * 2
    text = (
        f"{subject.target.name} has no NVLink: {2 * shape.num_layers} sums over tp {subject.tp} for "
        f"each step go over PCIe, {size_text(per_token)} a token; pp sends "
        f"{size_text(2 * shape.hidden_size)} a token and stage"
    )
    yield Advice(text, "two sums of the hidden state a layer, fp16")


def _tokens(subject: Subject) -> Iterator[Advice]:
    if subject.backend != "tensorrt_llm":
        return
    text = (
        "TensorRT-LLM sizes its activation buffers by max_num_tokens (8192 by default), whatever batch "
        "and length are; lower it where memory is short"
    )
    yield Advice(text, "trtllm-build of TensorRT-LLM 1.2")
