"""quant_report.json: what was calibrated on, what the search found, how far each weight moved.

The errors are measured on the exported file with the numpy oracle, tensor by tensor, against the
source file. That also catches a wrong packing, a lost scale or a tensor that should not have changed.

Shape suffixes: N output features, K input features.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.check import check_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import Problem, StageError
from pipeline.quant.calibration import TokenWindows
from pipeline.quant.formats import QuantFormat
from pipeline.quant.oracle import dequantize_int4
from pipeline.quant.preflight import QUANTIZERS, QuantizeOptions, linears_to_quantize

MAX_WEIGHT_ERROR = 0.7
"""Relative. int4 gives 0.08 to 0.2; all zeros would give 1, a wrong nibble order about 1.4."""

_FOLDED_INTO = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}
"""Linear -> the norm of the same layer that took its pre_quant_scale."""


def audit_export(source: HfCheckpoint, out_dir: Path, fmt: QuantFormat) -> dict[str, float]:
    """Relative weight error of each linear: ||W' - W|| / ||W|| (Frobenius norms).

    W' is what the exported file computes with the layer's unscaled input. Where a pre_quant_scale was
    folded into the norm before the linear, both sides are taken together with their norm's weight.

    Raises:
        StageError: every tensor that is missing, unexpected, of the wrong shape or dtype, changed
            without reason, not finite, or too far from the source.
    """
    exported = CheckpointReader(out_dir)
    problems = check_checkpoint(exported, source.shape, fmt)
    if problems:
        raise StageError(problems)
    names = linears_to_quantize(source.shape)
    with np.errstate(invalid="ignore"):  # an infinite scale times code 0: NaN, reported below
        errors = {name: _weight_error(source.reader, exported, name) for name in names}
    problems = [
        Problem(
            f"{name}.weight",
            f"the exported weight is {error:.3g} from the source, relative to its size",
            allowed=f"at most {MAX_WEIGHT_ERROR}",
        )
        for name, error in errors.items()
        if not error <= MAX_WEIGHT_ERROR  # written so that NaN is a problem
    ]
    problems.extend(_plain_tensor_problems(source.reader, exported, names))
    if problems:
        raise StageError(problems)
    return errors


def write_quant_report(
    path: Path,
    *,
    options: QuantizeOptions,
    windows: TokenWindows,
    device: str,
    search: Mapping[str, tuple[float, float]],
    weight_errors: Mapping[str, float],
) -> None:
    """Write the facts as JSON; nothing in it depends on time or place.

    Args:
        search: linear -> (alpha, mean squared output error at that alpha).
        weight_errors: linear -> relative error, from `audit_export`.
    """
    facts = {
        "format": options.format,
        "group_size": options.group_size,
        "quantizer": {
            "name": "nvidia-modelopt",
            "version": importlib.metadata.version("nvidia-modelopt"),
            "algorithm": QUANTIZERS[options.format],
            "device": device,
        },
        "calibration": {
            "tokens_sha256": windows.digest,
            "num_windows": len(windows.tokens_WT),
            "num_windows_available": windows.num_available,
            "seq_len": int(windows.tokens_WT.shape[1]),
            "batch_size": options.batch_size,
            "seed": options.seed,
            "num_text_tokens": windows.num_text_tokens,
        },
        "mean_relative_weight_error": float(np.mean(list(weight_errors.values()))),
        "linears": {
            name: {
                "alpha": search[name][0],
                "output_mean_squared_error": search[name][1],
                "relative_weight_error": weight_errors[name],
            }
            for name in weight_errors
        },
    }
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _weight_error(source: TensorReader, exported: TensorReader, name: str) -> float:
    wanted_NK = _read_f32(source, f"{name}.weight")
    actual_NK = dequantize_int4(
        exported.read(f"{name}.weight"), exported.read(f"{name}.weight_scale")
    )
    if f"{name}.pre_quant_scale" in exported.tensors:
        actual_NK *= _read_f32(exported, f"{name}.pre_quant_scale")
    else:
        norm = f"{_norm_before(name)}.weight"
        wanted_NK *= _read_f32(source, norm)
        actual_NK *= _read_f32(exported, norm)
    size = float(np.linalg.norm(wanted_NK))
    difference = float(np.linalg.norm(actual_NK - wanted_NK))
    return difference / size if size else difference


def _norm_before(name: str) -> str:
    layer, _, linear = name.partition(next(key for key in _FOLDED_INTO if name.endswith(key)))
    assert not linear, name
    return layer + _FOLDED_INTO[name.removeprefix(layer)]


def _plain_tensor_problems(
    source: TensorReader, exported: TensorReader, names: Sequence[str]
) -> Iterator[Problem]:
    """Tensors that are not int4: finite; and unchanged, unless a scale was folded into them."""
    packed = {f"{name}.weight" for name in names}
    folded = {f"{_norm_before(name)}.weight" for name in names if _is_folded(exported, name)}
    for tensor in exported.tensors:
        if tensor in packed:
            continue
        for start, rows in exported.row_blocks(tensor):
            if not np.isfinite(rows.astype(np.float32)).all():
                yield Problem(tensor, "holds values that are not finite")
                break
            if tensor not in source.tensors or tensor in folded:
                continue
            if rows.tobytes() != source.read_rows(tensor, start, start + len(rows)).tobytes():
                yield Problem(tensor, "should be unchanged, but differs from the source")
                break


def _is_folded(exported: TensorReader, name: str) -> bool:
    return f"{name}.pre_quant_scale" not in exported.tensors


def _read_f32(reader: TensorReader, name: str) -> NDArray[np.float32]:
    values: NDArray[Any] = reader.read(name)
    return values.astype(np.float32)
