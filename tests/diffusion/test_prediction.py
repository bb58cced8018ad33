"""Predictions: target and preconditioning are inverse to each other, and the scalings do what they say."""

import pytest
import torch
from torch import Tensor

from latentkit.diffusion.prediction import EPS, FLOW, PREDICTIONS, WEIGHTS, X0, Prediction, V
from latentkit.diffusion.schedule import SIGMA_CAP

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


@pytest.mark.parametrize("prediction", [EPS, V, X0], ids=lambda p: p.name)
def test_the_network_gets_unit_variance_for_unit_data(prediction: Prediction) -> None:
    torch.testing.assert_close(prediction.c_in(SIGMA) ** 2 * (1 + SIGMA**2), torch.ones_like(SIGMA))


@ALL
def test_at_the_cap_the_network_gets_the_noise_in_float32(prediction: Prediction) -> None:
    eps = torch.randn(1000)
    cap = torch.full((1,), SIGMA_CAP)
    torch.testing.assert_close(prediction.c_in(cap) * (0.5 + cap * eps), eps, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", [V, X0, FLOW], ids=lambda p: p.name)
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
