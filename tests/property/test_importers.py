"""Any AutoAWQ or GPTQ linear, read in any parts, means what its codes mean."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline.checkpoint.importers import repacked
from pipeline.checkpoint.importers.packing import AWQ_GEMM, GPTQ_V1, GPTQ_V2
from pipeline.checkpoint.importers.repacked import Layout, RepackedReader
from pipeline.checkpoint.reader import CheckpointReader
from tests.foreign_checkpoints import awq_tensors, gptq_tensors, random_linear

METHODS = {"awq": AWQ_GEMM, "gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(sorted(METHODS)),
    words=st.integers(1, 6),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([8, 64]),
    step=st.sampled_from([8, 16, 1024]),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_linear_in_any_parts(
    tmp_path: Path,
    method: str,
    words: int,
    groups: int,
    group_size: int,
    step: int,
    cuts: list[int],
    seed: int,
) -> None:
    rows, columns = 8 * words, groups * group_size
    rng = np.random.default_rng(seed)
    linear = random_linear(rng, rows, columns, group_size, symmetric=False)
    packed = (
        awq_tensors(linear)
        if method == "awq"
        else gptq_tensors(linear, version=2 if method == "gptq_v2" else 1)
    )
    path = tmp_path / "linear.safetensors"
    save_file({f"x.{name}": value for name, value in packed.items()}, path)
    reader = RepackedReader(CheckpointReader(path), Layout(METHODS[method], group_size, False))
    assert set(reader.tensors) == {"x.weight", "x.weight_scale", "x.weight_zero_point"}

    def joined(name: str, length: int) -> np.ndarray:
        edges = [0, *sorted(min(cut, length) for cut in cuts), length]
        pairs = itertools.pairwise(edges)
        return np.concatenate([reader.read_rows(name, *pair) for pair in pairs])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repacked, "_STEP", step)
        pairs = joined("x.weight", rows // 2)
        scale = joined("x.weight_scale", rows).astype(np.float64)
        zero = joined("x.weight_zero_point", rows).astype(np.float64)
    codes = np.empty((rows, columns))
    codes[0::2], codes[1::2] = pairs % 16, pairs // 16
    codes[codes > 7] -= 16
    weight = (codes - np.repeat(zero, group_size, 1)) * np.repeat(scale, group_size, 1)
    assert np.array_equal(weight, linear.weight())
