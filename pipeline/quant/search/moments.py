"""The second moment of a linear's input: all that a weight's rounding error needs to know of tokens.

With D = W' - W the squared error of the output over all tokens is ||D X^T||^2 = tr(D G D^T), G = X^T X.
G does not grow with the tokens; X is the smaller factor as long as there are few of them. Which of the
two is kept depends on what a product with it costs.

Shape suffixes: T tokens, K input features, R rows of a block of weights, G groups of S input features.
"""

from __future__ import annotations

import torch

PANEL = 1024
"""Columns computed together; a symmetric matrix is worked on by panels, half of it never."""


class SecondMoment:
    """sum x x^T over tokens, as G float32 [K, K] or as X float32 [T, K]; all products in float32.

    A product with X costs 2 T K operations for a row of D, one with G only K^2, because half of a
    symmetric matrix suffices: so X is kept up to K / 2 tokens, and is then the smaller in memory too.
    """

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self._batches: list[torch.Tensor] = []
        self._rows_TK: torch.Tensor | None = None
        self._gram_KK: torch.Tensor | None = None
        self._mirrored = False

    def add(self, x_TK: torch.Tensor) -> None:
        """Add the rows of `x_TK`, of any float dtype; they must not change afterwards."""
        assert self._rows_TK is None, "the moment was read already"
        assert not self._mirrored, "the moment was read already"
        self.num_tokens += len(x_TK)
        if self._gram_KK is not None:
            _add_outer(self._gram_KK, x_TK.float())
            return
        self._batches.append(x_TK)
        if self.num_tokens > self.num_features // 2:
            size = (self.num_features, self.num_features)
            self._gram_KK = torch.zeros(size, dtype=torch.float32, device=x_TK.device)
            for batch_TK in self._batches:
                _add_outer(self._gram_KK, batch_TK.float())
            self._batches.clear()

    @property
    def is_gram(self) -> bool:
        """Whether G is kept, not X."""
        return self._gram_KK is not None

    def row_losses(self, d_RK: torch.Tensor) -> torch.Tensor:
        """||d X^T||^2 of each row of `d_RK` (float32): float32 [R]."""
        if self.is_gram:
            return _quadratic_forms(d_RK, self.gram())
        return (d_RK @ self._rows().t()).square_().sum(-1)

    def gram(self) -> torch.Tensor:
        """G float32 [K, K]. Computed anew on each call where X is kept."""
        if self._gram_KK is None:
            rows_TK = self._rows()
            return rows_TK.t() @ rows_TK
        if not self._mirrored:
            _mirror(self._gram_KK)
            self._mirrored = True
        return self._gram_KK

    def group_grams(self, group_size: int) -> torch.Tensor:
        """The blocks of G on its diagonal: float32 [G, S, S]."""
        num_groups = self.num_features // group_size
        if self._gram_KK is None:
            rows_GTS = self._rows().view(-1, num_groups, group_size).transpose(0, 1)
            return rows_GTS.transpose(1, 2) @ rows_GTS
        blocks = self.gram().view(num_groups, group_size, num_groups, group_size)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def _rows(self) -> torch.Tensor:
        if self._rows_TK is None:
            self._rows_TK = torch.cat([batch_TK.float() for batch_TK in self._batches])
            self._batches.clear()
        return self._rows_TK


def _panels(num_features: int) -> list[tuple[int, int]]:
    starts = range(0, num_features, PANEL)
    return [(start, min(start + PANEL, num_features)) for start in starts]


def _add_outer(gram_KK: torch.Tensor, x_TK: torch.Tensor) -> None:
    """The blocks on and above the diagonal only."""
    for start, end in _panels(len(gram_KK)):
        gram_KK[:end, start:end].addmm_(x_TK[:, :end].t(), x_TK[:, start:end])


def _mirror(gram_KK: torch.Tensor) -> None:
    for start, end in _panels(len(gram_KK)):
        gram_KK[end:, start:end] = gram_KK[start:end, end:].t()


def _quadratic_forms(d_RK: torch.Tensor, gram_KK: torch.Tensor) -> torch.Tensor:
    """d G d^T of each row; what lies off the diagonal blocks counts twice and is computed once."""
    total_R = torch.zeros(len(d_RK), dtype=torch.float32, device=d_RK.device)
    for start, end in _panels(len(gram_KK)):
        panel_RP = d_RK[:, start:end]
        product_RP = panel_RP @ gram_KK[start:end, start:end]
        if start:
            product_RP.addmm_(d_RK[:, :start], gram_KK[:start, start:end], alpha=2.0)
        total_R += product_RP.mul_(panel_RP).sum(-1)
    return total_R
