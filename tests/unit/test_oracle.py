"""pipeline.quant.oracle against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quant.oracle import (
    dequantize_int4,
    group_scales,
    pack_int4,
    quantize_int4,
    unpack_int4,
)


def test_the_even_row_is_the_low_nibble_in_twos_complement() -> None:
    codes = np.array([[1, -2, 0, -8], [7, -7, -1, 7]], np.int8)
    assert pack_int4(codes).tolist() == [[0x71, 0x9E, 0xF0, 0x78]]


def test_signed_bytes_of_a_rank_file_mean_the_same() -> None:
    packed = np.array([[0x71, 0x9E]], np.uint8)
    expected = [[1, -2], [7, -7]]
    assert unpack_int4(packed).tolist() == expected
    assert unpack_int4(packed.view(np.int8)).tolist() == expected


def test_columns_of_a_group_share_the_scale_of_their_row() -> None:
    packed = pack_int4(np.array([[1, 2, 3, 4], [-1, -2, -3, -4]], np.int8))
    scale = np.array([[0.5, 10.0], [2.0, 0.25]], np.float32)
    weight = dequantize_int4(packed, scale)
    assert weight.dtype == np.float32
    assert weight.tolist() == [[0.5, 1.0, 30.0, 40.0], [-2.0, -4.0, -0.75, -1.0]]


def test_codes_are_rounded_half_to_even_and_clamped() -> None:
    weight = np.array([[0.5, 1.5, 2.5, -0.5, 9.0, -9.0]], np.float32)
    codes = quantize_int4(weight, np.array([[1.0]], np.float32))
    assert codes.tolist() == [[0, 2, 2, 0, 7, -8]]


def test_scales_reach_from_the_largest_value_and_survive_a_group_of_zeros() -> None:
    weight = np.array([[-14.0, 3.0, 0.0, 0.0]], np.float16)
    scale = group_scales(weight, 2)
    assert scale.dtype == np.float32
    assert scale.tolist() == [[2.0, 1.0]]
    assert quantize_int4(weight, scale).tolist() == [[-7, 2, 0, 0]]


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        (np.zeros((3, 2), np.int8), "3 rows cannot be packed in pairs"),
        (np.array([[8], [0]], np.int8), "codes span 0..8; int4 holds -8..7"),
        (np.array([[0], [-9]], np.int16), "codes span -9..0; int4 holds -8..7"),
        (np.zeros((2, 2), np.float32), "codes must be an integer matrix, not float32"),
        (np.zeros(4, np.int8), r"of shape \(4,\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pack_int4(codes)


def test_bytes_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a uint8 or int8 matrix, not int32"):
        unpack_int4(np.zeros((1, 1), np.int32))


@pytest.mark.parametrize(
    ("scale_shape", "text"),
    [((4, 3), "does not divide 4 columns"), ((3, 2), "3 rows of scales for 4 rows of codes")],
)
def test_a_scale_of_another_weight_is_refused(scale_shape: tuple[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dequantize_int4(np.zeros((2, 4), np.uint8), np.ones(scale_shape, np.float32))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group size 3 does not divide 4 columns"):
        group_scales(np.ones((2, 4), np.float32), 3)
