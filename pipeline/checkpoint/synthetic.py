"""Seeded random weights of a true architecture, to rehearse a build at full size.

The bytes of a tensor depend on the seed and its name alone, not on the order or the number of files.
They come from a counter-based bit generator whose stream numpy guarantees, and a table of normal
quantiles: far faster than drawing normals, and the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.layout import SourceTensor, planned_sources
from pipeline.checkpoint.reader import BLOCK_BYTES, INDEX_FILE, SINGLE_FILE
from pipeline.checkpoint.source import CONFIG_FILE
from pipeline.checkpoint.writer import SafetensorsWriter, TensorSpec
from pipeline.models import shape_from_hf
from pipeline.progress import Progress
from pipeline.quant.formats import FORMATS

MAX_SHARD_BYTES = 2 << 30
_WEIGHT_STD = 0.02
_NORM_STD = 0.1
_CHUNK = 32768
"""Values drawn at a time: draws, indices and table stay in the CPU's cache. A multiple of four."""
_METADATA = {"format": "pt"}  # transformers refuses files that do not say so

Float16Array = npt.NDArray[np.float16]


def write_synthetic(
    hf_config: Mapping[str, Any],
    out_dir: Path,
    *,
    seed: int,
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a float16 checkpoint in Hugging Face layout, without tokenizer, into `out_dir`.

    Weights are normal with standard deviation 0.02, norms normal around 1 with 0.1, biases and norms
    stored as a difference from 1 like weights. `config.json` is `hf_config` with its dtype set to
    float16, and without its quantization. Holds a few megabytes for each core, whatever the size.

    Raises:
        CheckpointError: `hf_config` is not a supported architecture, or fields are wrong.
        StageError: not enough room on the disk.
    """
    shape = shape_from_hf(hf_config)
    sources = planned_sources(shape, FORMATS["fp16"])
    shards = _shards([_spec(source) for source in sources], max_shard_bytes)
    weights, norms = _quantiles(0.0, _WEIGHT_STD), _quantiles(1.0, _NORM_STD)
    around_one = {
        source.name
        for source in sources
        if len(source.shape) == 1 and not source.name.endswith(".bias") and not source.offset
    }
    progress.start(len(sources), "tensors")
    files = {}
    for index, specs in enumerate(shards):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(out_dir / name, specs, _METADATA) as writer:
            fill = partial(_fill, writer, seed, weights, norms, around_one)
            for spec in _in_threads(fill, specs):
                files[spec.name] = name
                progress.advance(spec.name)
    if len(shards) > 1:
        total = sum(spec.nbytes for specs in shards for spec in specs)
        index_fields = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(out_dir / INDEX_FILE, index_fields)
    left_out = ("dtype", "quantization_config")
    config = {name: value for name, value in hf_config.items() if name not in left_out}
    _write_json(out_dir / CONFIG_FILE, config | {"torch_dtype": "float16"})


def _spec(source: SourceTensor) -> TensorSpec:
    return TensorSpec(source.name, "F16", source.shape)


def _shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fills one file after the other; a tensor above the limit gets a file of its own."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    return shards


def _quantiles(mean: float, std: float) -> Float16Array:
    """float16 [65536]: a uniform 16-bit number looked up here is normal."""
    normal = NormalDist(mean, std)
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float16)


def _in_threads(
    fill: Callable[[TensorSpec], None], specs: Sequence[TensorSpec]
) -> Iterator[TensorSpec]:
    """Calls `fill` for every spec, on all cores; drawing, looking up and writing leave the GIL."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for spec, _ in zip(specs, pool.map(fill, specs), strict=True):
                yield spec
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, do not finish the file


def _fill(
    writer: SafetensorsWriter,
    seed: int,
    weights: Float16Array,
    norms: Float16Array,
    around_one: Container[str],
    spec: TensorSpec,
) -> None:
    """Writes one tensor."""
    table = norms if spec.name in around_one else weights
    for first_row, rows in _random_rows(spec, seed, table):
        writer.write_rows(spec.name, first_row, rows)


def _random_rows(
    spec: TensorSpec, seed: int, table: Float16Array
) -> Iterator[tuple[int, Float16Array]]:
    """(first row, rows) of one tensor, a block at a time."""
    key = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    row_size = spec.nbytes // 2 // spec.shape[0]
    step = max(BLOCK_BYTES // (2 * row_size), 1)
    # A 64-bit draw makes four values: blocks of a multiple of four rows never cut one apart.
    step = -(-step // 4) * 4
    for start in range(0, spec.shape[0], step):
        num_rows = min(step, spec.shape[0] - start)
        values = np.empty(num_rows * row_size, np.float16)
        for first in range(0, values.size, _CHUNK):
            _draw(generator, table, values[first : first + _CHUNK])
        yield start, values.reshape(num_rows, *spec.shape[1:])


def _draw(generator: np.random.Philox, table: Float16Array, out: Float16Array) -> None:
    """Fills `out`. numpy looks up by intp only; "clip" spares it a pass over the indices."""
    draws = generator.random_raw(-(-out.size // 4)).astype("<u8", copy=False)
    np.take(table, draws.view("<u2")[: out.size].astype(np.intp), out=out, mode="clip")


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
