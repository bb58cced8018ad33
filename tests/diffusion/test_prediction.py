"""Predictions: target and preconditioning are inverse to each other, and the scalings do what they say."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentkit.diffusion.prediction import (
    EDM,
    EPS,
    FLOW,
    PREDICTIONS,
    SCORE,
    WEIGHTS,
    X0,
    Prediction,
    V,
    consistency,
    convert,
    edm,
    from_x0,
    step_divergence,
    to_x0,
)
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule

ALL = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
SIGMA = torch.logspace(-3, 3, 25, dtype=torch.float64)[:, None]


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(25, 64, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


@ALL
def test_the_target_gives_x0_back(prediction: Prediction) -> None:
    x0, eps = pair()
    x = x0 + SIGMA * eps
    recovered = prediction.c_skip(SIGMA) * x + prediction.c_out(SIGMA) * prediction.target(x0, eps, SIGMA)
    torch.testing.assert_close(recovered, x0, atol=1e-11, rtol=0)


def test_targets_are_those_of_the_papers() -> None:
    x0, eps = pair()
    alpha, sigma_vp = (1 + SIGMA**2) ** -0.5, SIGMA * (1 + SIGMA**2) ** -0.5
    assert torch.equal(EPS.target(x0, eps, SIGMA), eps)
    assert torch.equal(X0.target(x0, eps, SIGMA), x0)
    torch.testing.assert_close(V.target(x0, eps, SIGMA), alpha * eps - sigma_vp * x0)
    t = SIGMA / (1 + SIGMA)
    path = (1 - t) * x0 + t * eps
    torch.testing.assert_close(FLOW.c_in(SIGMA) * (x0 + SIGMA * eps), path)
    torch.testing.assert_close(path - t * FLOW.target(x0, eps, SIGMA), x0)


def test_edm_is_its_table_one_and_minus_v_for_data_of_deviation_one() -> None:
    x0, eps = pair()
    x, data = x0 + SIGMA * eps, 0.5
    total = SIGMA**2 + data**2
    torch.testing.assert_close(EDM.c_skip(SIGMA), data**2 / total)
    torch.testing.assert_close(EDM.c_out(SIGMA), SIGMA * data / total.sqrt())
    torch.testing.assert_close(EDM.c_in(SIGMA), 1 / total.sqrt())
    torch.testing.assert_close(EDM.target(x0, eps, SIGMA), (x0 - EDM.c_skip(SIGMA) * x) / EDM.c_out(SIGMA))
    one = edm(1.0)
    torch.testing.assert_close(one.target(x0, eps, SIGMA), -V.target(x0, eps, SIGMA))
    torch.testing.assert_close(one.c_out(SIGMA), -V.c_out(SIGMA))


def test_score_is_of_the_variance_exploding_form() -> None:
    x0, eps = pair()
    x = x0 + SIGMA * eps
    assert torch.equal(SCORE.c_in(SIGMA) * x, x)
    score = (x0 - x) / SIGMA**2  # of N(x0, sigma^2)
    torch.testing.assert_close(SCORE.target(x0, eps, SIGMA), SIGMA * score)


@given(
    names=st.sampled_from(list(itertools.permutations(sorted(PREDICTIONS), 2))),
    log_sigma=st.floats(-5, 5),
    values=st.lists(st.floats(-3, 3), min_size=2, max_size=6),
)
def test_an_output_said_in_another_prediction_and_back(
    names: tuple[str, str], log_sigma: float, values: list[float]
) -> None:
    one, other = (PREDICTIONS[name] for name in names)
    sigma = torch.tensor(math.exp(log_sigma), dtype=torch.float64)
    output = torch.tensor(values[1:], dtype=torch.float64)
    x = values[0] * (1 + sigma) * torch.ones_like(output)
    there = convert(output, x, sigma, one, other)
    torch.testing.assert_close(to_x0(other, there, x, sigma), to_x0(one, output, x, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert(there, x, sigma, other, one), output, rtol=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_conversions_keep_the_type(prediction: Prediction, dtype: torch.dtype) -> None:
    x0, eps = (part.to(dtype) for part in pair())
    sigma = torch.tensor(0.7, dtype=dtype)
    x = x0 + sigma * eps
    output = from_x0(prediction, x0, x, sigma)
    assert output.dtype == to_x0(prediction, output, x, sigma).dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(to_x0(prediction, output, x, sigma), x0, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("inner", [EPS, V], ids=lambda p: p.name)
@pytest.mark.parity
def test_consistency_is_the_boundary_scaling_of_diffusers(inner: Prediction) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    peer = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = NoiseSchedule("scaled_linear")
    ours = consistency(inner, schedule)
    for timestep in (0, 1, 19, 259, 999):
        sigma = torch.from_numpy(schedule.to_sigma(timestep))
        x, output = (part[:1] for part in pair())
        skip, out = peer.get_scalings_for_boundary_condition_discrete(timestep)
        expected = skip * x / torch.sqrt(1 + sigma**2) + out * to_x0(inner, output, x, sigma)
        torch.testing.assert_close(to_x0(ours, output, x, sigma), expected, rtol=1e-9, atol=1e-9)
    assert ours.target is inner.target
    assert ours.c_in is inner.c_in


def test_the_divergence_of_a_step_is_that_of_two_normals() -> None:
    share, error = torch.rand(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    sigma, after = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    variance = after**2 * (1 - after**2 / sigma**2)  # of the posterior of x at `after`
    forward = (sigma**2 - after**2) * (1 + after**2) / (1 + sigma**2)  # beta, brought to this space
    learned = torch.exp(share * forward.log() + (1 - share) * variance.log())
    mean = (1 - after**2 / sigma**2) * error  # how far the two means are apart
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(0 * mean, learned.sqrt()))
    torch.testing.assert_close(step_divergence(share, error, sigma, after), expected)
    assert float(step_divergence(torch.zeros(1), torch.zeros(1), sigma.float(), after.float())) == 0


@pytest.mark.parametrize("prediction", [EPS, V, X0], ids=lambda p: p.name)
def test_the_network_gets_unit_variance_for_unit_data(prediction: Prediction) -> None:
    torch.testing.assert_close(prediction.c_in(SIGMA) ** 2 * (1 + SIGMA**2), torch.ones_like(SIGMA))


@pytest.mark.parametrize("prediction", [EPS, V, X0, FLOW, EDM], ids=lambda p: p.name)
def test_at_the_cap_the_network_gets_the_noise_in_float32(prediction: Prediction) -> None:
    eps = torch.randn(1000)
    cap = torch.full((1,), SIGMA_CAP)
    torch.testing.assert_close(prediction.c_in(cap) * (0.5 + cap * eps), eps, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", [V, X0, FLOW, EDM], ids=lambda p: p.name)
def test_at_the_cap_x0_is_recovered_in_float32(prediction: Prediction) -> None:
    x0, eps = torch.randn(1000), torch.randn(1000)
    cap = torch.full((1,), SIGMA_CAP, dtype=torch.float64)
    target = prediction.target(x0, eps, cap.float())
    skip, out = prediction.c_skip(cap).float(), prediction.c_out(cap).float()
    torch.testing.assert_close(skip * (x0 + cap.float() * eps) + out * target, x0, atol=2e-6, rtol=0)


@ALL
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction: Prediction) -> None:
    sigma = SIGMA.flatten()
    on_x0 = WEIGHTS["min_snr"](prediction, sigma) / prediction.c_out(sigma) ** 2
    torch.testing.assert_close(on_x0, torch.clamp(sigma**-2, max=5.0))
    assert torch.equal(WEIGHTS["uniform"](prediction, sigma), torch.ones_like(sigma))


@ALL
def test_edm_weighs_the_error_of_x0_alike_for_every_prediction_and_is_even_for_its_own(prediction: Prediction) -> None:
    sigma = SIGMA.flatten()
    on_x0 = WEIGHTS["edm"](prediction, sigma) / prediction.c_out(sigma) ** 2
    data = prediction.sigma_data
    torch.testing.assert_close(on_x0, (sigma**2 + data**2) / (sigma * data) ** 2)
    if prediction is EDM:
        torch.testing.assert_close(WEIGHTS["edm"](EDM, sigma), torch.ones_like(sigma))
