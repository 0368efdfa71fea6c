"""What a comparison found, as a typed record, a JSON file and a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


class _Record(BaseModel):
    # NaN and infinity are no JSON numbers; as strings they survive, as null they would be lost.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Verdict(_Record):
    """One gate.

    Attributes:
        gate: its name, as in the YAML; "finite" is always there.
        comparison: `measured comparison limit` must hold; NaN never does.
        note: which windows are to blame, for example; may be empty.
    """

    gate: str
    measured: float
    comparison: Literal["<=", ">="]
    limit: float
    passed: bool
    note: str = ""


class NotFinite(_Record):
    """Logits that are NaN or infinite: which side, which window, first position inside it."""

    side: Literal["original", "engine"]
    window: int
    position: int


class Side(_Record):
    """One model on the measured tokens.

    Attributes:
        vocab_size: of its logits; the engine's may be padded.
        loss: mean -log p of the next token, nats per token.
        perplexity: exp(loss).
        weight_bytes: tensors of the checkpoint; the weights files of the engine's ranks.
        deployed_bytes: what a device needs: the checkpoint; the compiled engine, which adds code to the
            weights, or without one the CPU graph and its weights.
    """

    vocab_size: int
    loss: float
    perplexity: float
    weight_bytes: int
    deployed_bytes: int


class WindowResult(_Record):
    """Means over one window; losses and KL in nats per token."""

    window: int
    original_loss: float
    engine_loss: float
    mean_kl: float
    top1_agreement: float


class Histogram(_Record):
    """Counts of values between neighbouring edges; values outside are in the outer bins."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Data(_Record):
    """The held-out text: `num_tokens` predictions were compared in `num_windows` windows."""

    num_windows: int
    num_windows_available: int
    seq_len: int
    num_tokens: int
    tokens_sha256: str


class RankMapping(_Record):
    """How the engine's ranks share the model."""

    tp: int = 1
    pp: int = 1
    moe_ep: int = 1


class Report(_Record):
    """Original against engine.

    Attributes:
        architecture: Hugging Face class name.
        quant_algo: TensorRT-LLM's name of the engine's weight format; None for fp16.
        original_quantized_by: "modelopt", "awq" or "gptq" when the build started from weights that were
            quantized already: then it computes as their format says, and the comparison says nothing
            about what quantizing them had lost. None for plain weights.
        executed: how the engine's network was run.
        engine_files: name -> bytes of every file in the engine directory that holds weights or graph.
        mean_kl, p99_kl, max_kl: KL(original || engine), nats per token.
        top1_agreement: share of tokens where both rank the same token first.
        perplexity_ratio: engine over original.
        loss_pairs: (original, engine) losses of evenly spaced tokens, for the plot.
        versions: of the libraries that computed both sides.
    """

    architecture: str
    quant_algo: str | None
    original_quantized_by: str | None = None
    mapping: RankMapping = RankMapping()
    executed: str = "1 rank in one process"
    data: Data
    original: Side
    engine: Side
    engine_files: dict[str, int]
    perplexity_ratio: float
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    not_finite: tuple[NotFinite, ...]
    verdicts: tuple[Verdict, ...]
    windows: tuple[WindowResult, ...]
    kl_histogram: Histogram
    loss_pairs: tuple[tuple[float, float], ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def weight_ratio(self) -> float:
        """Bytes of the engine's weights over the checkpoint's."""
        return self.engine.weight_bytes / self.original.weight_bytes

    def headline(self) -> dict[str, float | int | bool]:
        """The figures for a manifest or a one-line summary."""
        return {
            "passed": self.passed,
            "num_tokens": self.data.num_tokens,
            "original_perplexity": self.original.perplexity,
            "engine_perplexity": self.engine.perplexity,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "original_weight_bytes": self.original.weight_bytes,
            "engine_weight_bytes": self.engine.weight_bytes,
            "engine_deployed_bytes": self.engine.deployed_bytes,
        }


def read_report(path: Path) -> Report:
    """Inverse of the JSON half of `pipeline.verification.page.write_report`."""
    return Report.model_validate_json(path.read_text(encoding="utf-8"))


def within(measured: float, comparison: Literal["<=", ">="], limit: float) -> bool:
    """Whether `measured comparison limit` holds; never for NaN on either side."""
    if math.isnan(measured) or math.isnan(limit):
        return False
    return measured <= limit if comparison == "<=" else measured >= limit
