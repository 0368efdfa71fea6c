"""The scale search: the race, and candidates that would overflow."""

from __future__ import annotations

import pytest
import torch

from pipeline.quant.search import scale
from pipeline.quant.search.moments import SecondMoment
from pipeline.quant.search.scale import ScaledWeight, search_scale

FEATURES, GROUP = 256, 64


def _problem(
    seed: int, dtype: torch.dtype = torch.float32, num_rows: int = 1500
) -> tuple[list[ScaledWeight], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels_K = torch.exp(torch.randn(FEATURES, generator=generator))
    x_TK = torch.randn(300, FEATURES, generator=generator) * channels_K
    moment = SecondMoment(FEATURES)
    moment.add(x_TK)
    weights = [
        (torch.randn(rows, FEATURES, generator=generator) * 0.05).to(dtype)
        for rows in (num_rows, num_rows // 3)
    ]
    linears = [ScaledWeight(weight_NK, moment) for weight_NK in weights]
    return linears, x_TK.abs().mean(0), x_TK.abs().amax(0)


@pytest.mark.parametrize("seed", range(6))
def test_the_race_finds_what_measuring_everything_finds(seed: int) -> None:
    linears, mean_K, amax_K = _problem(seed)
    full = search_scale(linears, mean_K, amax_K, GROUP, exhaustive=True)
    raced = search_scale(linears, mean_K, amax_K, GROUP)
    assert raced.alpha == full.alpha
    assert raced.losses == pytest.approx(full.losses, rel=1e-6)
    assert raced.rtn_losses == pytest.approx(full.rtn_losses, rel=1e-6)
    assert len(full.curve) == 22
    assert len(raced.curve) < 8  # observed 3 to 5
    for alpha, loss in raced.curve.items():
        assert loss == pytest.approx(full.curve[alpha], rel=1e-6)


def test_a_scale_that_lets_the_input_overflow_is_no_candidate() -> None:
    linears, mean_K, amax_K = _problem(0, torch.float16)
    every = search_scale(linears, mean_K, amax_K, GROUP, exhaustive=True)
    assert len(every.curve) == 22
    close_K = torch.full_like(amax_K, 65504.0)
    some = search_scale(linears, mean_K, close_K, GROUP, exhaustive=True)
    assert list(some.curve) == [None]
    assert (some.alpha, some.scale_K) == (None, None)
    assert some.losses == some.rtn_losses


def test_the_grid_holds_modelopts() -> None:
    fine = scale.alphas()
    assert len(fine) == 21
    assert {alpha.item() for alpha in torch.arange(0, 1.1, 0.1)} <= set(fine)


def test_one_row_whose_error_overflows_is_not_a_number_like_others() -> None:
    linears, mean_K, amax_K = _problem(0, num_rows=600)
    linears[0].weight_NK[7] *= 1e22  # its squared error is more than float32 holds
    found = search_scale(linears, mean_K, amax_K, GROUP)
    assert found.rtn_losses[0] == found.losses[0] == float("inf")
    assert found.rtn_losses[1] < 1e6


def test_scales_that_are_nearly_equal_are_not_told_apart_to_the_last_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(600, 1024, generator=generator)  # no channel stands out
    moment = SecondMoment(1024)
    moment.add(x_TK)
    weight_NK = torch.randn(4096, 1024, generator=generator) * 0.05
    statistics = (x_TK.abs().mean(0), x_TK.abs().amax(0))
    found = search_scale([ScaledWeight(weight_NK, moment)], *statistics, 128)
    assert len(found.curve) <= 4
    rows = [ScaledWeight(weight_NK, moment)]
    every = search_scale(rows, *statistics, 128, exhaustive=True)
    assert found.losses[0] <= min(every.curve.values()) * (1 + scale.EQUAL)
