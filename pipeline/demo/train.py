"""Train the demo model: `python -m pipeline.demo.train --out DIR`.

The schedule counts steps, never seconds, and the batch of a step depends on seed and step only. A
killed run continues from DIR/state.pt and walks the same schedule. DIR then holds `plain/` (the
trained fp16 checkpoint with tokenizer), and `training.json`; `pipeline.demo.publish` makes the
committed model from them.

Shape suffixes: B rows of a batch, S positions of a row, T tokens of the corpus, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.demo.corpus import Corpus, read_library, split_documents
from pipeline.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    VOCAB_SIZE,
    encode_documents,
    save_tokenizer,
    train_tokenizer,
)
from pipeline.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATE_FILE = "state.pt"
FACTS_FILE = "training.json"
PLAIN_DIR = "plain"


@dataclass(frozen=True)
class ModelSize:
    """Llama dimensions; 6.8 million parameters by default."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = VOCAB_SIZE
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class Schedule:
    """Everything that decides the weights besides the corpus and the size of the model.

    Attributes:
        num_steps: optimizer steps in all.
        tokens_per_step: tokens of one batch, whatever the length of its rows.
        short_length, long_length: positions per row before and after `long_from`.
        long_from: fraction of the steps after which rows are long, so that every position of the
            context is trained while most steps stay cheap.
        muon_rate: peak learning rate of the matrices inside the layers.
        adamw_rate: peak learning rate of embeddings, head and norms.
        warmup_steps: linear warm-up; a cosine down to `final_fraction` of the peak follows.
        smoothing: weight of the past in the reported loss.
    """

    seed: int = 0
    num_steps: int = 800
    tokens_per_step: int = 4096
    short_length: int = 256
    long_length: int = 1024
    long_from: float = 0.75
    muon_rate: float = 0.02
    muon_weight_decay: float = 0.01
    adamw_rate: float = 3e-3
    adamw_weight_decay: float = 0.1
    warmup_steps: int = 30
    final_fraction: float = 0.05
    smoothing: float = 0.95

    def rate_factor(self, step: int) -> float:
        """Learning rate of `step` as a fraction of the peak."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return warmup * (self.final_fraction + (1 - self.final_fraction) * cosine)

    def row_length(self, step: int) -> int:
        """Positions per row at `step`."""
        return self.long_length if step >= self.long_from * self.num_steps else self.short_length


def batch_of_step(tokens: NDArray[np.int64], schedule: Schedule, step: int) -> torch.Tensor:
    """Rows [B, S + 1] out of `tokens` [T] for `step`.

    Inputs are all columns but the last, labels all but the first.
    Rows start at random places, drawn by (seed, step). Every second row starts with BOS_ID, so the
    model knows contexts that start with it and contexts that do not.
    """
    length = schedule.row_length(step)
    num_rows = schedule.tokens_per_step // length
    drawn = np.random.default_rng([schedule.seed, step])
    starts = drawn.integers(0, len(tokens) - length, size=num_rows)
    rows_BS = np.stack([tokens[start : start + length + 1] for start in starts])
    rows_BS[::2, 0] = BOS_ID
    return torch.from_numpy(rows_BS)


class Trainer:
    """Model, both optimizers and where the training stands."""

    def __init__(self, size: ModelSize, schedule: Schedule, corpus_sha256: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(schedule.seed)
        config = LlamaConfig(
            **dataclasses.asdict(size),
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        self.model = LlamaForCausalLM(config)
        self.schedule = schedule
        self.identity = {
            "size": dataclasses.asdict(size),
            "schedule": dataclasses.asdict(schedule),
            "corpus_sha256": corpus_sha256,
        }
        matrices, others, norms = [], [], []
        for name, parameter in self.model.named_parameters():
            if parameter.dim() < 2:
                norms.append(parameter)
            elif ".layers." in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
        # Keller Jordan's choice of rates: orthogonalised updates for matrices that map between
        # hidden states, AdamW for tables of tokens and for vectors.
        self.muon = torch.optim.Muon(
            matrices,
            lr=schedule.muon_rate,
            weight_decay=schedule.muon_weight_decay,
            adjust_lr_fn="original",
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": others, "weight_decay": schedule.adamw_weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=schedule.adamw_rate,
            betas=(0.9, 0.95),
        )
        self.step = 0
        self.smoothed_loss = math.log(size.vocab_size)
        self.seconds = 0.0

    def train_step(self, tokens: NDArray[np.int64]) -> float:
        """One update on `tokens` [T]; returns the loss of its batch in nats per token."""
        began = time.monotonic()
        schedule = self.schedule
        factor = schedule.rate_factor(self.step)
        for optimizer, peak in (
            (self.muon, schedule.muon_rate),
            (self.adamw, schedule.adamw_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.zero_grad()
        rows_BS = batch_of_step(tokens, schedule, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BSV = self.model(rows_BS[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BSV.float().flatten(0, 1), rows_BS[:, 1:].flatten()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()
        value = loss.item()
        # Bias-corrected only by its start, the loss of a uniform guess; gone after some 60 steps.
        keep = schedule.smoothing
        self.smoothed_loss = keep * self.smoothed_loss + (1 - keep) * value
        self.step += 1
        self.seconds += time.monotonic() - began
        return value

    def save_state(self, path: Path) -> None:
        """Everything a killed run needs, replaced in one move."""
        state: dict[str, Any] = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "step": self.step,
            "smoothed_loss": self.smoothed_loss,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_state(self, path: Path) -> None:
        """Continue where `save_state` stopped.

        Raises:
            CheckpointError: the state was made by another schedule, size or corpus.
        """
        state = torch.load(path, weights_only=True)
        different = [key for key, mine in self.identity.items() if state["identity"][key] != mine]
        if different:
            raise CheckpointError(
                Problem(
                    str(path),
                    f"was made with another {' and '.join(different)}",
                    fix="delete the file to start again, or use another --out",
                )
            )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.step = state["step"]
        self.smoothed_loss = state["smoothed_loss"]
        self.seconds = state["seconds"]

    def save_plain(self, out_dir: Path) -> None:
        """The weights rounded to fp16 as a Hugging Face checkpoint; training goes on in fp32."""
        from transformers import LlamaForCausalLM

        copy = LlamaForCausalLM(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        copy.half().save_pretrained(out_dir)


def train(
    out_dir: Path,
    corpus: Corpus,
    size: ModelSize,
    schedule: Schedule,
    *,
    checkpoint_steps: int = 100,
    stop_after: int | None = None,
) -> Trainer:
    """Train to the end of `schedule`, or to step `stop_after`, continuing from `out_dir` if begun.

    Raises:
        CheckpointError: `out_dir` holds the state of another training.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in corpus.train]
    tokenizer = train_tokenizer(texts, size.vocab_size)
    tokens = encode_documents(tokenizer, texts)
    trainer = Trainer(size, schedule, corpus.sha256)
    state_path = out_dir / STATE_FILE
    if state_path.exists():
        trainer.load_state(state_path)
    last = schedule.num_steps if stop_after is None else min(stop_after, schedule.num_steps)
    print(f"{len(texts)} files, {len(tokens)} tokens; step {trainer.step} of {last}", flush=True)
    while trainer.step < last:
        trainer.train_step(tokens)
        if trainer.step % 10 == 0:
            ahead = (last - trainer.step) * trainer.seconds / trainer.step
            print(
                f"step {trainer.step}/{last} loss {trainer.smoothed_loss:.4f} "
                f"{trainer.seconds:.0f} s, about {ahead:.0f} s left",
                flush=True,
            )
        if trainer.step % checkpoint_steps == 0 or trainer.step == last:
            trainer.save_state(state_path)
    if trainer.step == schedule.num_steps:
        plain_dir = out_dir / PLAIN_DIR
        trainer.save_plain(plain_dir)
        save_tokenizer(tokenizer, plain_dir, size.max_position_embeddings)
        facts = {
            **trainer.identity,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "num_train_tokens": len(tokens),
            "tokens_seen": trainer.step * schedule.tokens_per_step,
            "wall_s": round(trainer.seconds),
            "final_loss_nats": round(trainer.smoothed_loss, 4),
        }
        (out_dir / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and result")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, split_documents(read_library()), ModelSize(), Schedule())


if __name__ == "__main__":
    main()
