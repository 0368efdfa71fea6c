"""GPTQ's rounding: against a plain loop in float64, and against round-to-nearest."""

from __future__ import annotations

import pytest
import torch

from pipeline.quant.search.gptq import gptq_rows, inverse_factor, nearest_rows

ROWS, FEATURES, GROUP = 24, 192, 64


def _weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed)) * 0.05


def _gram(count: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    mix_LK = torch.randn(
        24, FEATURES, generator=generator
    )  # few directions, as in real activations
    x_TK = torch.randn(count, 24, generator=generator) @ mix_LK
    x_TK += 0.3 * torch.randn(count, FEATURES, generator=generator)
    return x_TK.t() @ x_TK


def _loss(d_RK: torch.Tensor, gram_KK: torch.Tensor) -> float:
    return float(((d_RK.double() @ gram_KK.double()) * d_RK.double()).sum())


def _optimal_brain_quantizer(
    w_RK: torch.Tensor, gram_KK: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor
) -> torch.Tensor:
    """The definition: after each column the others minimize the error; H of those left inverted anew."""
    w_RK = w_RK.double().clone()
    hessian = gram_KK.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(FEATURES)
    codes_RK = torch.empty_like(w_RK)
    for column in range(FEATURES):
        left = torch.linalg.inv(hessian[column:, column:])
        scale_R = scale_RG[:, column // GROUP].double()
        zero_R = zero_RG[:, column // GROUP].double()
        codes_RK[:, column] = ((w_RK[:, column] / scale_R).round() + zero_R).clamp(-8, 7)
        rounded_R = (codes_RK[:, column] - zero_R) * scale_R
        error_R = (w_RK[:, column] - rounded_R) / left[0, 0]
        w_RK[:, column:] -= error_R[:, None] * left[0]
    return codes_RK


@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_are_those_of_the_definition(asymmetric: bool) -> None:
    w_RK, gram_KK = _weight(), _gram()
    upper_KK = inverse_factor(gram_KK)
    assert upper_KK is not None
    rounded = gptq_rows(w_RK, upper_KK, GROUP, asymmetric=asymmetric)
    expected_RK = _optimal_brain_quantizer(w_RK, gram_KK, rounded.scale_RG, rounded.zero_point_RG)
    # A code that tips in float32 changes the later columns of its row; observed 0 and 0.5 %.
    assert float((rounded.codes_RK != expected_RK).float().mean()) < 0.02


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_far_below_round_to_nearest(asymmetric: bool, dtype: torch.dtype) -> None:
    w_RK, gram_KK = _weight().to(dtype), _gram()
    before_RK = w_RK.clone()
    upper_KK = inverse_factor(gram_KK)
    assert upper_KK is not None
    rounded = gptq_rows(w_RK, upper_KK, GROUP, asymmetric=asymmetric)
    assert torch.equal(w_RK, before_RK)
    assert bool((rounded.zero_point_RG == 0).all()) != asymmetric
    nearest = nearest_rows(w_RK, GROUP)
    fed_back = _loss(rounded.dequantized(dtype).float() - w_RK.float(), gram_KK)
    plain = _loss(nearest.dequantized(dtype).float() - w_RK.float(), gram_KK)
    assert fed_back < 0.2 * plain  # observed 0.08 to 0.10


def test_factor_is_that_of_the_inverse() -> None:
    gram_KK = _gram().double()
    upper_KK = inverse_factor(gram_KK.float())
    assert upper_KK is not None
    assert torch.equal(upper_KK, upper_KK.triu())
    damped_KK = gram_KK + 0.01 * gram_KK.diagonal().mean() * torch.eye(FEATURES)
    product_KK = upper_KK.double().t() @ upper_KK.double() @ damped_KK
    assert float((product_KK - torch.eye(FEATURES)).abs().max()) < 1e-3  # observed 7e-5


@pytest.mark.parametrize("dead", [[3, 100], list(range(FEATURES))])
def test_features_that_are_always_zero_do_no_harm(dead: list[int]) -> None:
    gram_KK = _gram()
    gram_KK[dead] = 0.0
    gram_KK[:, dead] = 0.0
    upper_KK = inverse_factor(gram_KK)
    assert upper_KK is not None
    rounded = gptq_rows(_weight(), upper_KK, GROUP, asymmetric=False)
    assert bool(torch.isfinite(rounded.dequantized(torch.float32)).all())


def test_no_inverse_is_said_not_hidden() -> None:
    assert inverse_factor(-torch.eye(FEATURES)) is None


def test_nearest_has_zero_exactly_and_covers_the_range() -> None:
    w_RK = torch.tensor([[-0.3, 0.0, 1.2, 0.4], [0.5, 1.0, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rounded = nearest_rows(w_RK, 4)
    values = rounded.dequantized(torch.float32)
    assert torch.equal(values[w_RK == 0], torch.zeros(int((w_RK == 0).sum())))
    steps = rounded.scale_RG.expand_as(w_RK)
    assert bool(((values - w_RK).abs() <= 0.5 * steps + 1e-7).all())
    torch.testing.assert_close(rounded.scale_RG[:2, 0], torch.tensor([0.1, 1.0 / 15]))
