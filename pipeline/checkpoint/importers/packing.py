"""How AutoAWQ and GPTQ store an int4 linear, and its values in plain form. No file access.

Both keep three tensors per linear, with 8 codes of 4 bits in each int32 word:
    AutoAWQ GEMM: qweight [K, N/8], qzeros [G, N/8], scales [G, N]
    GPTQ:         qweight [K/8, N], qzeros [G, N/8], scales [G, N]
W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g], codes and zeros without sign, 0 to 15.
Nibble i of a GPTQ word is element i. Nibble i of an AutoAWQ word is column (0, 2, 4, 6, 1, 3, 5, 7)[i].
GPTQ's first version (checkpoint_format "gptq") stores zeros less 1, "gptq_v2" as they are.

Shape suffixes: N output features, K input features, G = K / group size, W = N / 8 words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

CODES_PER_WORD: Final = 8
MIDDLE: Final = 8
"""The zero of symmetric int4: subtracted from codes and zeros, so that both get a sign."""

Codes = npt.NDArray[np.uint8]

_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
# Where column c of eight lies in an AutoAWQ word: the inverse of the order in the module's text.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Packing:
    """One of the two layouts.

    Attributes:
        along_inputs: words of qweight run along K (GPTQ), otherwise along N.
        nibbles: nibbles[c] is the place of column c in a word whose codes run along N.
        zero_offset: what was subtracted from a zero before it was stored.
    """

    along_inputs: bool
    nibbles: tuple[int, ...]
    zero_offset: int

    def shapes(
        self, num_outputs: int, num_inputs: int, num_groups: int
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each stored tensor of a linear."""
        words = num_outputs // CODES_PER_WORD
        qweight = (
            (num_inputs // CODES_PER_WORD, num_outputs)
            if self.along_inputs
            else (num_inputs, words)
        )
        return {
            "qweight": qweight,
            "qzeros": (num_groups, words),
            "scales": (num_groups, num_outputs),
        }

    def sizes(self, qweight_shape: tuple[int, ...]) -> tuple[int, int]:
        """(N, K) of a stored qweight."""
        rows, columns = qweight_shape
        if self.along_inputs:
            return columns, rows * CODES_PER_WORD
        return columns * CODES_PER_WORD, rows

    def codes(self, qweight: npt.NDArray[Any], first: int, stop: int) -> Codes:
        """Codes 0 to 15 of output features [first, stop), which are multiples of 8: [N, K]."""
        if not self.along_inputs:
            return self._of_words(qweight, first, stop).T
        words_KN = qweight[:, first:stop].view(np.uint32)
        codes_KN = np.empty((words_KN.shape[0] * CODES_PER_WORD, stop - first), np.uint8)
        for nibble in range(CODES_PER_WORD):
            codes_KN[nibble::CODES_PER_WORD] = (words_KN >> np.uint32(4 * nibble)) & np.uint32(15)
        return codes_KN.T

    def stored_zeros(self, qzeros: npt.NDArray[Any], first: int, stop: int) -> Codes:
        """Zeros as stored, 0 to 15, of output features [first, stop): [N, G]."""
        return self._of_words(qzeros, first, stop).T

    def _of_words(self, stored: npt.NDArray[Any], first: int, stop: int) -> Codes:
        """Columns [first, stop) of a matrix whose words run along its columns."""
        assert first % CODES_PER_WORD == 0, first
        assert stop % CODES_PER_WORD == 0, stop
        words = stored[:, first // CODES_PER_WORD : stop // CODES_PER_WORD].view(np.uint32)
        columns = np.empty((words.shape[0], stop - first), np.uint8)
        for column, nibble in enumerate(self.nibbles):
            shifted = words >> np.uint32(4 * nibble)
            columns[:, column::CODES_PER_WORD] = shifted & np.uint32(15)
        return columns


AWQ_GEMM: Final = Packing(along_inputs=False, nibbles=_AWQ_ORDER, zero_offset=0)
GPTQ_V1: Final = Packing(along_inputs=True, nibbles=_IN_ORDER, zero_offset=1)
GPTQ_V2: Final = Packing(along_inputs=True, nibbles=_IN_ORDER, zero_offset=0)


def pack_pairs(codes_NK: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Codes -8 to 7 as ModelOpt packs them: byte [i, k] is row 2i (low nibble) and row 2i + 1 (high)."""
    nibbles_NK = codes_NK.view(np.uint8) & np.uint8(15)
    return np.bitwise_or(nibbles_NK[0::2], nibbles_NK[1::2] << np.uint8(4))
