"""AutoAWQ and GPTQ checkpoints for tests, packed here from the description of the formats.

Nothing of `pipeline` is used. Where AutoAWQ and AutoGPTQ pack with integer matrices, this writes one
code after the other into an array of bytes-to-be, so that it cannot share a mistake of indexing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Column that AutoAWQ puts into nibble i of a word.
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Linear:
    """Codes 0..15 [N, K], zeros 0..15 and scales [N, K/g]: W = (code - zero) * scale."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]

    def weight(self) -> np.ndarray[Any, Any]:
        """What it means, in float64: every product is exact there."""
        group = self.codes.shape[1] // self.zeros.shape[1]
        result = np.empty(self.codes.shape, np.float64)
        for column in range(self.codes.shape[1]):
            zero, scale = self.zeros[:, column // group], self.scales[:, column // group]
            difference = self.codes[:, column].astype(np.float64) - zero
            result[:, column] = difference * scale.astype(np.float64)
        return result


def random_linear(
    rng: np.random.Generator, rows: int, columns: int, group: int, *, symmetric: bool
) -> Linear:
    """All 16 codes occur; zeros 1 to 15 (GPTQ cannot store 0), or 8 throughout."""
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    shape = (rows, columns // group)
    zeros = (
        np.full(shape, 8, np.uint8) if symmetric else rng.integers(1, 16, shape).astype(np.uint8)
    )
    scales = (rng.uniform(0.5, 1.5, shape) * 0.25 * columns**-0.5).astype(np.float16)
    return Linear(codes, zeros, scales)


def pack_words(values: np.ndarray[Any, Any], order: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Nibble i of word w is values[:, 8 w + order[i]]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for word in range(words.shape[1]):
        for nibble in range(8):
            words[:, word] += values[:, 8 * word + order[nibble]].astype(np.int64) * 16**nibble
    return words.astype(np.uint32).view(np.int32)


def awq_tensors(linear: Linear) -> dict[str, np.ndarray[Any, Any]]:
    """As AutoAWQ's GEMM layout."""
    return {
        "qweight": pack_words(linear.codes.T, AWQ_NIBBLES),
        "qzeros": pack_words(linear.zeros.T, AWQ_NIBBLES),
        "scales": np.ascontiguousarray(linear.scales.T),
    }


def gptq_tensors(linear: Linear, *, version: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """As GPTQ; version 1 stores zeros less 1."""
    in_order = tuple(range(8))
    group = linear.codes.shape[1] // linear.zeros.shape[1]
    stored = linear.zeros - np.uint8(version == 1)
    return {
        "qweight": np.ascontiguousarray(pack_words(linear.codes, in_order).T),
        "qzeros": pack_words(stored.T, in_order),
        "scales": np.ascontiguousarray(linear.scales.T),
        "g_idx": (np.arange(linear.codes.shape[1]) // group).astype(np.int32),
    }


def write_foreign(
    plain: Path,
    directory: Path,
    *,
    method: str,
    group: int = 64,
    symmetric: bool = False,
    seed: int = 0,
    **fields: Any,
) -> dict[str, Linear]:
    """A copy of a plain single-file checkpoint whose decoder linears are random int4.

    `method` is "awq", "gptq" or "gptq_v2"; `fields` replace those of quantization_config. Returns the
    linears by module name.
    """
    shutil.copytree(plain, directory)
    tensors = load_file(directory / "model.safetensors")
    rng = np.random.default_rng(seed)
    linears: dict[str, Linear] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        rows, columns = tensors.pop(name).shape
        linear = random_linear(rng, rows, columns, group, symmetric=symmetric)
        linears[module] = linear
        packed = (
            awq_tensors(linear)
            if method == "awq"
            else gptq_tensors(linear, version=2 if method == "gptq_v2" else 1)
        )
        tensors |= {f"{module}.{suffix}": value for suffix, value in packed.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**declaration(method, group, symmetric), **fields}
    path.write_text(json.dumps(config))
    return linears


def declaration(method: str, group: int, symmetric: bool) -> dict[str, Any]:
    """quantization_config as transformers' own classes write it."""
    from transformers import AwqConfig, GPTQConfig

    if method == "awq":
        fields = AwqConfig(bits=4, group_size=group, zero_point=not symmetric).to_dict()
    else:
        fields = GPTQConfig(
            bits=4, group_size=group, desc_act=False, sym=symmetric, checkpoint_format=method
        ).to_dict()
    return json.loads(json.dumps(fields, default=str))
