"""Packing int4 loses nothing, and means what the layout says, for every matrix."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.quant.oracle import (
    dequantize_int4,
    group_scales,
    pack_int4,
    quantize_int4,
    unpack_int4,
)

PAIRS = st.integers(1, 6)
COLUMNS = st.integers(1, 9)


@st.composite
def code_matrices(draw: st.DrawFn) -> np.ndarray:
    shape = (2 * draw(PAIRS), draw(COLUMNS))
    return draw(hnp.arrays(np.int8, shape, elements=st.integers(-8, 7)))


@given(code_matrices())
def test_unpack_undoes_pack(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert packed.shape == (codes.shape[0] // 2, codes.shape[1])
    assert np.array_equal(unpack_int4(packed), codes)


@given(hnp.arrays(np.uint8, st.tuples(PAIRS, COLUMNS)))
def test_every_byte_is_a_pair_of_codes(packed: np.ndarray) -> None:
    assert np.array_equal(pack_int4(unpack_int4(packed)), packed)


@given(code_matrices(), st.data())
def test_the_layout_read_nibble_by_nibble(codes: np.ndarray, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, codes.shape[0] - 1))
    column = data.draw(st.integers(0, codes.shape[1] - 1))
    byte = int(pack_int4(codes)[row // 2, column])
    nibble = (byte >> 4) if row % 2 else (byte & 15)
    assert (nibble - 16 if nibble > 7 else nibble) == codes[row, column]


@given(
    pairs=PAIRS,
    groups=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_rounding_moves_a_weight_by_at_most_half_a_step(
    pairs: int, groups: int, group_size: int, data: st.DataObject
) -> None:
    values = st.floats(-100, 100, width=32, allow_subnormal=False)
    weight = data.draw(hnp.arrays(np.float32, (2 * pairs, groups * group_size), elements=values))
    scale = group_scales(weight, group_size)
    codes = quantize_int4(weight, scale)
    restored = dequantize_int4(pack_int4(codes), scale)
    step = np.repeat(scale, group_size, axis=1)
    assert (np.abs(restored - weight) <= step * 0.5000005).all()  # float32 rounding of the division
    assert np.abs(codes).max() <= 7  # -8 is never made from the largest value of a group
