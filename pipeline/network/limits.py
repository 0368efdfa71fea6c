"""How large a batch and how long a sequence an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipeline.errors import PlanError, Problem


@dataclass(frozen=True)
class BuildLimits:
    """Sizes fixed when an engine is built; named as in a TensorRT-LLM build_config.

    Attributes:
        max_batch_size: most rows in one call.
        max_seq_len: positions of the KV cache per row: prompt plus generated tokens.
        max_input_len: most tokens of one row in one call (a longer prompt is given in chunks).
        gather_context_logits: whether a TensorRT engine may be asked for the logits of all
            positions of a call; otherwise one per row, which saves device memory. The CPU network
            gives any number in either case.

    Raises:
        PlanError: a limit below 1, or max_input_len above max_seq_len.
    """

    max_batch_size: int
    max_seq_len: int
    max_input_len: int
    gather_context_logits: bool = False

    def __post_init__(self) -> None:
        problems = [
            Problem("build limits", f"{field.name} is {getattr(self, field.name)}", "1 or more")
            for field in fields(self)
            if field.name.startswith("max_") and getattr(self, field.name) < 1
        ]
        if self.max_input_len > self.max_seq_len:
            problems.append(
                Problem(
                    "build limits",
                    f"max_input_len is {self.max_input_len}, max_seq_len is {self.max_seq_len}",
                    "max_input_len <= max_seq_len",
                )
            )
        if problems:
            raise PlanError(problems)
