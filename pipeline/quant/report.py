"""How far each weight moved, and quant_report.json: what was calibrated on and what the search found.

The errors are measured on what was written, tensor by tensor, against the source. That also catches
a wrong packing, a lost scale or a tensor that should not have changed.

Shape suffixes: N output features, K input features.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.check import check_checkpoint, ignored_names, shadowed_names
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import Problem, StageError
from pipeline.models import ARCHITECTURES, ModelShape, Scope
from pipeline.models.linears import decoder_linears
from pipeline.quant.data import TokenWindows
from pipeline.quant.dequantized import dequantized
from pipeline.quant.formats import QuantFormat
from pipeline.quant.preflight import QuantizeOptions

REPORT_FILE = "quant_report.json"
MAX_WEIGHT_ERROR = 0.7
"""Relative. int4 gives 0.08 to 0.2; all zeros would give 1, a wrong nibble order about 1.4."""
MAX_ROUNDING = 4e-3
"""Relative: a bfloat16 weight that was multiplied by a scale and rounded once."""
_CHOOSING_ROWS = 64


def refuse_incomplete(out_dir: Path, shape: ModelShape, fmt: QuantFormat) -> None:
    """Raise StageError with every tensor of an export that is missing, unexpected, or of a wrong shape
    or dtype; reads headers only."""
    problems = check_checkpoint(CheckpointReader(out_dir), shape, fmt)
    if problems:
        raise StageError(problems)


def layer_errors(
    source: TensorReader, exported: TensorReader, shape: ModelShape, layer: int
) -> tuple[dict[str, float], list[Problem]]:
    """Relative weight error of each linear of a layer, and everything that is wrong with the layer.

    The error is ||W' - W|| / ||W|| (Frobenius norms), where W' is what the exported file computes with
    the input that the source's linear has: a pre_quant_scale belongs to it, and so does a scale that
    was folded into the norm before the linear. Which norm that is, the smallest error says.
    """
    table = _LayerTable(shape, layer)
    names = [name for name in source.tensors if name.startswith(table.prefix)]
    scales = {name: _folded_scale(source, exported, name, table.offset) for name in names}
    folded = {name: scale for name, scale in scales.items() if scale is not None}
    errors: dict[str, float] = {}
    problems: list[Problem] = []
    for name in names:
        linear = name.removesuffix(".weight")
        if name in table.ignored:
            continue
        if linear in table.linears and f"{linear}.weight_scale" in exported.tensors:
            errors[linear] = _weight_error(source, exported, name, table, list(folded.values()))
        elif name in folded or _norm_bias(name) in folded:
            problems += _finite_problems(exported, name)
        else:
            is_transposed = linear in table.transposed
            scales_K = list(folded.values())
            problems += _plain_problems(source, exported, name, scales_K, is_transposed)
    problems += [
        Problem(
            f"{name}.weight",
            f"the exported weight is {error:.3g} from the source, relative to its size",
            allowed=f"at most {MAX_WEIGHT_ERROR}",
        )
        for name, error in errors.items()
        if not error <= MAX_WEIGHT_ERROR  # written so that NaN is a problem
    ]
    for name in exported.tensors:
        if name.startswith(table.prefix) and name not in source.tensors:
            problems += _finite_problems(exported, name)
    return errors, problems


def write_quant_report(
    path: Path,
    *,
    options: QuantizeOptions,
    windows: TokenWindows,
    linears: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the facts as JSON; nothing in it depends on time or place.

    Args:
        linears: name -> fields of its LinearFacts, and "relative_weight_error".
    """
    errors = [float(facts["relative_weight_error"]) for facts in linears.values()]
    facts = {
        "format": options.format,
        "group_size": options.group_size,
        "quantizer": {
            "name": "nvidia-modelopt",
            "version": importlib.metadata.version("nvidia-modelopt"),
            "search": options.search,
            "device": options.device,
        },
        "calibration": {
            "tokens_sha256": windows.digest,
            "num_windows": len(windows.tokens_WT),
            "num_windows_available": windows.num_available,
            "seq_len": int(windows.tokens_WT.shape[1]),
            "batch_size": options.batch_size,
            "seed": options.seed,
            "num_text_tokens": windows.num_text_tokens,
            "inputs": options.inputs,
        },
        "mean_relative_weight_error": float(np.mean(errors)) if errors else 0.0,
        "linears": linears,
    }
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class _LayerTable:
    """What the architecture's table says of the tensors of one layer."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        rules = ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAYER)
        sources = [source for rule in rules for source in rule.sources]
        before = sources[0].name.partition("{layer}")[0]
        self.prefix = f"{before}{layer}."
        self.linears = {name for name in decoder_linears(shape) if name.startswith(self.prefix)}
        self.transposed = {
            source.name.format(layer=layer, expert=0) for source in sources if source.transposed
        }
        self.offset = max(source.offset for source in sources)
        self.ignored = ignored_names(shape) | shadowed_names(shape)


def _norm_bias(name: str) -> str:
    """The norm's weight beside a norm's bias, which is scaled alike."""
    return f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else ""


def _folded_scale(
    source: TensorReader, exported: TensorReader, name: str, offset: float
) -> NDArray[np.float32] | None:
    """By what a norm's weight was multiplied, [K]; None for what is no norm, or unchanged."""
    is_norm = name.endswith(".weight") and len(source.tensors[name].shape) == 1
    if not is_norm or name not in exported.tensors:
        return None
    before_K, after_K = _read_f32(source, name), _read_f32(exported, name)
    if before_K.shape != after_K.shape or np.array_equal(before_K, after_K):
        return None
    before_K, after_K = before_K + np.float32(offset), after_K + np.float32(offset)
    scale_K: NDArray[np.float32] = np.ones_like(before_K)
    np.divide(after_K, before_K, out=scale_K, where=before_K != 0)
    return scale_K


def _weight_error(
    source: TensorReader,
    exported: TensorReader,
    name: str,
    table: _LayerTable,
    folded: list[NDArray[np.float32]],
) -> float:
    with np.errstate(invalid="ignore"):  # an infinite scale times code 0: NaN, which is reported
        actual_NK = dequantized(exported, name)
        linear = name.removesuffix(".weight")
        scales = [np.ones(1, np.float32)]
        if f"{linear}.pre_quant_scale" not in exported.tensors:
            scales += [scale_K for scale_K in folded if len(scale_K) == actual_NK.shape[1]]
        is_transposed = linear in table.transposed
        if len(scales) > 1:
            rows_NK = next(_row_blocks(source, name, is_transposed))[1][:_CHOOSING_ROWS]
            some = [_distance(actual_NK[: len(rows_NK)] * scale_K, rows_NK) for scale_K in scales]
            scales = [scales[int(np.argmin(np.nan_to_num(some, nan=np.inf)))]]
        difference = size = 0.0
        for start, wanted_NK in _row_blocks(source, name, is_transposed):
            block_NK = actual_NK[start : start + len(wanted_NK)] * scales[0]
            difference += _distance(block_NK, wanted_NK)
            size += float(np.vdot(wanted_NK, wanted_NK))
    return float(np.sqrt(difference / size)) if size else float(np.sqrt(difference))


def _distance(actual_NK: NDArray[np.float32], wanted_NK: NDArray[np.float32]) -> float:
    delta_NK = actual_NK - wanted_NK
    return float(np.vdot(delta_NK, delta_NK))


def _row_blocks(
    reader: TensorReader, name: str, is_transposed: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    if is_transposed:
        yield 0, np.ascontiguousarray(_read_f32(reader, name).T)
        return
    for start, rows in reader.row_blocks(name):
        yield start, rows.astype(np.float32)


def _plain_problems(
    source: TensorReader,
    exported: TensorReader,
    name: str,
    folded: list[NDArray[np.float32]] | None = None,
    is_transposed: bool = False,
) -> Iterator[Problem]:
    """What should be unchanged: the same bytes, or a router behind a norm that took a scale."""
    if name not in exported.tensors:
        yield Problem(name, "missing in the export")
        return
    if name not in source.tensors or _is_same(source, exported, name, is_transposed):
        yield from _finite_problems(exported, name)
        return
    if source.tensors[name].shape == exported.tensors[name].shape and folded:
        wanted_NK, actual_NK = _read_f32(source, name), _read_f32(exported, name)
        fitting = [scale_K for scale_K in folded if actual_NK.shape[-1:] == scale_K.shape]
        limit = (MAX_ROUNDING * float(np.linalg.norm(wanted_NK))) ** 2
        if any(_distance(actual_NK * scale_K, wanted_NK) <= limit for scale_K in fitting):
            return
    yield Problem(name, "should be unchanged, but differs from the source")
    yield from _finite_problems(exported, name)


def _is_same(source: TensorReader, exported: TensorReader, name: str, is_transposed: bool) -> bool:
    before, after = source.tensors[name], exported.tensors[name]
    if is_transposed:
        return np.array_equal(source.read(name).T, exported.read(name))
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return False
    pairs = zip(_blocks(source, name), _blocks(exported, name), strict=True)
    return all(one.tobytes() == other.tobytes() for one, other in pairs)


def _finite_problems(reader: TensorReader, name: str) -> Iterator[Problem]:
    for rows in _blocks(reader, name):
        is_float = rows.dtype.kind not in "iub"
        if is_float and not np.isfinite(rows.astype(np.float32)).all():
            yield Problem(name, "holds values that are not finite")
            return


def _blocks(reader: TensorReader, name: str) -> Iterator[NDArray[Any]]:
    if not reader.tensors[name].shape:
        yield reader.read(name)
        return
    for _, rows in reader.row_blocks(name):
        yield rows


def _read_f32(reader: TensorReader, name: str) -> NDArray[np.float32]:
    values: NDArray[Any] = reader.read(name)
    return values.astype(np.float32)
