"""What a packed int4 weight means, in plain numpy; it shares no code with ModelOpt.

Tests compare ModelOpt's bytes with it, and `report` measures exported files with it.

Layout (read off ModelOpt 0.47 exports; the unified Hugging Face file stores the bytes as uint8, the
TensorRT-LLM rank file stores the same bytes as int8): byte [r, c] holds output row 2r in its low
nibble and output row 2r + 1 in its high nibble, both of input column c, in two's complement.
One float32 scale covers `group_size` consecutive input columns of one output row; no zero point.

    y = (x * pre_quant_scale) @ (code * scale)^T

Shape suffixes: N output features, P = N / 2 packed rows, K input features, G = K / group_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWEST_CODE, HIGHEST_CODE = -8, 7


def pack_int4(codes_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Put codes -8..7 [N, K] two to a byte.

    Returns:
        uint8 [N / 2, K]; `.view(np.int8)` gives the TensorRT-LLM form.

    Raises:
        ValueError: not a matrix of integers, N odd, or a code outside -8..7.
    """
    if codes_NK.ndim != 2 or not np.issubdtype(codes_NK.dtype, np.integer):
        raise ValueError(
            f"codes must be an integer matrix, not {codes_NK.dtype} of shape {codes_NK.shape}"
        )
    if codes_NK.shape[0] % 2:
        raise ValueError(f"{codes_NK.shape[0]} rows cannot be packed in pairs; N must be even")
    if ((codes_NK < LOWEST_CODE) | (codes_NK > HIGHEST_CODE)).any():
        raise ValueError(f"codes span {codes_NK.min()}..{codes_NK.max()}; int4 holds -8..7")
    nibbles_NK = codes_NK.astype(np.int8).view(np.uint8) & 0x0F
    return np.bitwise_or(nibbles_NK[0::2], np.left_shift(nibbles_NK[1::2], 4), dtype=np.uint8)


def unpack_int4(packed_PK: NDArray[Any]) -> NDArray[np.int8]:
    """Inverse of `pack_int4`: uint8 or int8 [N / 2, K] to int8 codes [N, K].

    Raises:
        ValueError: not a matrix of bytes.
    """
    if packed_PK.ndim != 2 or packed_PK.dtype not in (np.uint8, np.int8):
        raise ValueError(
            "packed weights must be a uint8 or int8 matrix, "
            f"not {packed_PK.dtype} of shape {packed_PK.shape}"
        )
    signed_PK = packed_PK.view(np.int8)
    codes_NK = np.empty((2 * packed_PK.shape[0], packed_PK.shape[1]), np.int8)
    # A left shift drops the high nibble; the arithmetic right shift then restores the sign.
    codes_NK[0::2] = np.left_shift(signed_PK, 4) >> 4
    codes_NK[1::2] = signed_PK >> 4
    return codes_NK


def group_size_of(num_columns: int, scale_NG: NDArray[Any]) -> int:
    """Input columns that share one scale: K / G.

    Raises:
        ValueError: the scale's second dimension does not divide `num_columns`.
    """
    num_groups = scale_NG.shape[1] if scale_NG.ndim == 2 else 0
    if not num_groups or num_columns % num_groups:
        raise ValueError(f"scale of shape {scale_NG.shape} does not divide {num_columns} columns")
    return num_columns // num_groups


def dequantize_int4(packed_PK: NDArray[Any], scale_NG: NDArray[Any]) -> NDArray[np.float32]:
    """Weights as the GEMM sees them: code * scale, float32 [N, K].

    With a pre_quant_scale p [K] the layer computes (x * p) @ W^T, so the weight of the unscaled
    input is the result times p.

    Raises:
        ValueError: shapes that do not belong together.
    """
    codes_NK = unpack_int4(packed_PK)
    group_size = group_size_of(codes_NK.shape[1], scale_NG)
    if scale_NG.shape[0] != codes_NK.shape[0]:
        raise ValueError(
            f"{scale_NG.shape[0]} rows of scales for {codes_NK.shape[0]} rows of codes"
        )
    scale_NK = np.repeat(scale_NG.astype(np.float32), group_size, axis=1)
    return codes_NK.astype(np.float32) * scale_NK


def group_scales(weight_NK: NDArray[Any], group_size: int) -> NDArray[np.float32]:
    """Round-to-nearest scales: the largest magnitude of each group over 7, float32 [N, K / g].

    A group of zeros gets scale 1, so that dividing by it stays defined.

    Raises:
        ValueError: `group_size` does not divide K.
    """
    num_rows, num_columns = weight_NK.shape
    if num_columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {num_columns} columns")
    groups = np.abs(weight_NK.astype(np.float32)).reshape(num_rows, -1, group_size)
    scale_NG: NDArray[np.float32] = groups.max(axis=2) / np.float32(HIGHEST_CODE)
    scale_NG[scale_NG == 0] = 1.0
    return scale_NG


def quantize_int4(weight_NK: NDArray[Any], scale_NG: NDArray[Any]) -> NDArray[np.int8]:
    """Codes int8 [N, K]: weight over scale, rounded half to even, clamped to -8..7.

    Raises:
        ValueError: the scale does not divide the weight.
    """
    group_size = group_size_of(weight_NK.shape[1], scale_NG)
    scale_NK = np.repeat(scale_NG.astype(np.float32), group_size, axis=1)
    rounded_NK = np.rint(weight_NK.astype(np.float32) / scale_NK)
    codes_NK: NDArray[np.int8] = rounded_NK.clip(LOWEST_CODE, HIGHEST_CODE).astype(np.int8)
    return codes_NK
