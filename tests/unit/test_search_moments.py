"""Second moments: both forms, every product against float64 on the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from pipeline.quant.search import moments
from pipeline.quant.search.moments import SecondMoment

FEATURES = 192


def _tokens(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    scale = torch.exp(torch.randn(FEATURES, generator=generator))
    return (torch.randn(count, FEATURES, generator=generator) * scale).to(dtype)


def _moment(x_TK: torch.Tensor, batch: int = 50) -> SecondMoment:
    moment = SecondMoment(FEATURES)
    for part_TK in x_TK.split(batch):
        moment.add(part_TK)
    return moment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 60, 96, 97, 700])
@pytest.mark.parametrize("panel", [64, 100, 1024])
def test_losses_are_the_errors_over_the_tokens(
    count: int, dtype: torch.dtype, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PANEL", panel)
    x_TK = _tokens(count, dtype)
    d_RK = torch.randn(30, FEATURES, generator=torch.Generator().manual_seed(3))
    expected_R = (d_RK.double() @ x_TK.double().t()).square().sum(-1)
    losses_R = _moment(x_TK).row_losses(d_RK)
    # Relative to the largest: with one token a row's error can cancel. Observed at most 2.5e-7.
    assert float((losses_R - expected_R).abs().max() / expected_R.max()) < 2e-6


@pytest.mark.parametrize("count", [60, 700])
def test_gram_and_its_diagonal_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PANEL", 80)
    x_TK = _tokens(count)
    moment = _moment(x_TK)
    expected_KK = x_TK.double().t() @ x_TK.double()
    scale = expected_KK.diagonal().max()
    assert float((moment.gram().double() - expected_KK).abs().max() / scale) < 1e-6
    for group, block_SS in enumerate(moment.group_grams(64)):
        inside = slice(64 * group, 64 * group + 64)
        assert float((block_SS - expected_KK[inside, inside]).abs().max() / scale) < 1e-6


def test_the_cheaper_factor_is_kept() -> None:
    assert not _moment(_tokens(FEATURES // 2)).is_gram
    assert _moment(_tokens(FEATURES // 2 + 1)).is_gram
