"""Which linears alone read a norm's output: small modules, each with one trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.quant.packing.flow import norm_consumers


class _Block(nn.Module):
    """A norm, two linears, and one way to use them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.way = way

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        x_BTK = self.embedding(input_ids)
        return getattr(self, self.way)(x_BTK, self.norm(x_BTK))

    def both(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return x_BTK + self.one(normed_BTK) * self.two(normed_BTK)

    def only_one(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return self.two(x_BTK + self.one(normed_BTK))

    def through_views(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        rows_RK = normed_BTK.view(-1, 6)
        return self.one(rows_RK.unsqueeze(0)[0]) + self.two(normed_BTK.transpose(0, 1)).view(-1, 6)

    def residual_after_the_norm(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return normed_BTK + self.one(normed_BTK)

    def copied(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return self.one(normed_BTK[:, torch.tensor([0, 1])]) + self.two(normed_BTK)

    def changed_in_place(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return self.one(normed_BTK.view(-1, 6).mul_(2.0))

    def never_read(self, x_BTK: torch.Tensor, normed_BTK: torch.Tensor) -> Any:
        return self.one(x_BTK)


@pytest.mark.parametrize(
    ("way", "consumers"),
    [
        ("both", {"one", "two"}),
        ("only_one", {"one"}),
        ("through_views", {"one", "two"}),
        ("residual_after_the_norm", None),
        ("copied", None),
        ("changed_in_place", None),
        ("never_read", None),
    ],
)
def test_consumers(way: str, consumers: set[str] | None) -> None:
    assert norm_consumers(_Block(way)) == ({"norm": consumers} if consumers else {})


def test_hooks_are_removed() -> None:
    block = _Block("both")
    norm_consumers(block)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
