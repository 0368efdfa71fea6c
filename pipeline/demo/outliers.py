"""Outlier channels for the demo model, put in and taken out without changing what it computes.

Large language models have a few hidden channels whose activations are many times larger than the
rest; small ones trained for minutes have none, and then AWQ cannot be told from round-to-nearest.
Multiplying a channel where it is made and dividing it where it is read gives such channels and
leaves every logit alone:

    RMSNorm weight of the channel   x f      columns of the linears that read the norm      / f
    row of up_proj                  x f      column of down_proj                            / f

All factors are powers of two, so a multiplication only moves the exponent. A division is exact too
unless the quotient falls below 2**-14, where fp16 has fewer bits: then up to 2**-25 is lost, once.
Hence injecting into what `remove_outliers` returned gives the very same bits again, and the removed
weights differ from those before the first injection by at most factor * 2**-25, that is 2**-21.

    python -m pipeline.demo.outliers --model DIR --out DIR      writes the plain checkpoint of DIR

Shape suffixes: O outputs, I inputs of a linear; C channels of a norm.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.demo import MODEL_DIR
from pipeline.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

OUTLIERS_FILE = "outliers.json"

SITES: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""Where channels are made (dim 0 is multiplied), and which linears read them (dim 1 is divided)."""

Tensors = dict[str, "NDArray[np.float16]"]


@dataclass(frozen=True)
class Outliers:
    """Factors by the name of the multiplied tensor, then by channel.

    Attributes:
        seed, fraction, choices: what the factors were drawn with.
        factors: for each tensor of `SITES` and each layer, {channel: power of two}.
    """

    seed: int
    fraction: float
    choices: tuple[int, ...]
    factors: Mapping[str, Mapping[int, int]]

    def to_json(self) -> str:
        """Text of outliers.json."""
        factors = {
            name: {str(channel): factor for channel, factor in sorted(channels.items())}
            for name, channels in sorted(self.factors.items())
        }
        document = {
            "seed": self.seed,
            "fraction": self.fraction,
            "choices": list(self.choices),
            "factors": factors,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Outliers:
        """Inverse of `to_json`."""
        document: dict[str, Any] = json.loads(text)
        factors = {
            name: {int(channel): int(factor) for channel, factor in channels.items()}
            for name, channels in document["factors"].items()
        }
        choices = tuple(document["choices"])
        return cls(document["seed"], document["fraction"], choices, factors)


def draw_outliers(
    tensors: Tensors, *, seed: int, fraction: float, choices: tuple[int, ...]
) -> Outliers:
    """Choose `fraction` of the channels (at least one) of every site and a factor for each.

    Args:
        tensors: a Llama checkpoint by Hugging Face names.
        choices: powers of two, drawn with equal chance.
    """
    for factor in choices:
        assert math.frexp(factor)[0] == 0.5, f"{factor} is not a power of two"
    drawn = np.random.default_rng(seed)
    factors: dict[str, dict[int, int]] = {}
    for name in _made_tensors(tensors):
        num_channels = tensors[name].shape[0]
        count = max(1, round(num_channels * fraction))
        channels = drawn.choice(num_channels, size=count, replace=False)
        chosen = drawn.choice(choices, size=count)
        factors[name] = {
            int(channel): int(factor) for channel, factor in zip(channels, chosen, strict=True)
        }
    return Outliers(seed, fraction, choices, factors)


def inject_outliers(tensors: Tensors, outliers: Outliers) -> Tensors:
    """A copy of `tensors` with the outlier channels; tensors that do not change are shared.

    Raises:
        CheckpointError: a tensor is missing, has too few channels, or would overflow fp16.
    """
    return _scaled(tensors, outliers, inverse=False)


def remove_outliers(tensors: Tensors, outliers: Outliers) -> Tensors:
    """The plain weights: inverse of `inject_outliers`, see the module text for how exact.

    Raises:
        CheckpointError: a tensor is missing, has too few channels, or would overflow fp16.
    """
    return _scaled(tensors, outliers, inverse=True)


def _scaled(tensors: Tensors, outliers: Outliers, *, inverse: bool) -> Tensors:
    problems = [
        Problem(needed, "outliers.json names it, but the checkpoint has no such tensor or channel")
        for name, channels in outliers.factors.items()
        for dim, needed in [(0, name), *((1, reader) for reader in _readers(name))]
        if needed not in tensors or max(channels) >= tensors[needed].shape[dim]
    ]
    if problems:
        raise CheckpointError(problems)
    # fp32 in between: a weight of up_proj may be multiplied and divided, and must be rounded once.
    scaled: dict[str, NDArray[np.float32]] = {}
    for name, channels in outliers.factors.items():
        factors_C = np.ones(tensors[name].shape[0], dtype=np.float32)
        for channel, factor in channels.items():
            factors_C[channel] = 1 / factor if inverse else factor
        made = scaled.get(name, tensors[name].astype(np.float32))
        scaled[name] = made * factors_C.reshape(-1, *[1] * (made.ndim - 1))
        for reader in _readers(name):
            scaled[reader] = scaled.get(reader, tensors[reader].astype(np.float32)) / factors_C
    largest = np.finfo(np.float16).max
    overflown = [name for name, values in scaled.items() if np.abs(values).max() > largest]
    if overflown:
        raise CheckpointError(
            [Problem(name, "overflows fp16 with these outlier factors") for name in overflown]
        )
    return tensors | {name: values.astype(np.float16) for name, values in scaled.items()}


def _made_tensors(tensors: Tensors) -> Iterator[str]:
    for name in sorted(tensors):
        found = re.fullmatch(r"model\.layers\.\d+\.(.+)\.weight", name)
        if found and found.group(1) in SITES:
            yield name


def _readers(name: str) -> list[str]:
    found = re.fullmatch(r"(model\.layers\.\d+\.)(.+)\.weight", name)
    assert found, f"{name} makes no channels of a layer"
    return [f"{found.group(1)}{reader}.weight" for reader in SITES[found.group(2)]]


def write_plain_checkpoint(model_dir: Path, out_dir: Path) -> None:
    """Copy the checkpoint in `model_dir` to `out_dir` (new) without its outlier channels.

    Raises:
        CheckpointError: `model_dir` has no outliers.json, or it does not fit the weights.
    """
    from safetensors.numpy import load_file, save_file

    listed = model_dir / OUTLIERS_FILE
    if not listed.is_file():
        raise CheckpointError(
            Problem(str(listed), "is missing", fix="name the demo model's folder")
        )
    outliers = Outliers.from_json(listed.read_text(encoding="utf-8"))
    plain = remove_outliers(load_file(model_dir / "model.safetensors"), outliers)
    shutil.copytree(
        model_dir, out_dir, ignore=shutil.ignore_patterns(OUTLIERS_FILE, "*.safetensors", "*.md")
    )
    save_file(plain, out_dir / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model without outlier channels.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_plain_checkpoint(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
