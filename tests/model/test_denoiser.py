"""Denoiser: the preconditioning of every prediction against the formulas of the papers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.diffusion.samplers.driver import sample
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.nets.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels_in=5, channels=32, multipliers=(1,), depth=(1,), blocks=1, heads=2, context_width=6)
PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)


class Watched(nn.Module):
    """Stands in for the U-Net: keeps what it is given and answers with a fixed function of its first channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1)
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, *slots: Tensor | None, perturbed: bool = False) -> Tensor:
        self.given = [x, timestep, *(slot for slot in slots if slot is not None)]
        return x[:, :4].tanh() + timestep.to(x.dtype)[:, None, None, None] / 1000


def watched(
    prediction: str, kind: str = "scaled_linear", dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, Watched]:
    denoiser = Denoiser(CONFIG, NoiseSchedule(kind), prediction)  # type: ignore[arg-type]
    network = Watched().to(dtype)
    denoiser.unet = network  # type: ignore[assignment]
    return denoiser, network


def from_alphas(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """x0 from the variance-preserving x_t, alpha_bar and the network's answer, as DDPM and v-prediction write it."""
    return {
        "eps": lambda x_t, a, f: (x_t - (1 - a).sqrt() * f) / a.sqrt(),
        "v": lambda x_t, a, f: a.sqrt() * x_t - (1 - a).sqrt() * f,
        "x0": lambda x_t, a, f: f,
    }[name]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@torch.no_grad()
def test_preconditioning_is_that_of_alpha_bars(prediction: str) -> None:
    denoiser, network = watched(prediction)
    sigma = torch.tensor([0.05, 0.7, 3.0, 14.0], dtype=torch.float64)
    x = torch.randn(4, 4, 3, 3) * (1 + sigma.float()[:, None, None, None])
    x0 = denoiser(x, sigma, Conditioning())
    alpha_bar = (1 / (1 + sigma**2))[:, None, None, None]
    x_t, timestep = network.given
    torch.testing.assert_close(x_t, (alpha_bar.sqrt() * x).float())
    np.testing.assert_allclose(timestep, denoiser.schedule.to_timestep(sigma.numpy()), rtol=1e-6)
    torch.testing.assert_close(
        x0.double(),
        from_alphas(prediction)(x_t.double(), alpha_bar, network(x_t, timestep).double()),
        atol=2e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_preconditioning_of_a_flow_is_that_of_the_straight_path() -> None:
    denoiser, network = watched("flow", "flow")
    sigma = torch.tensor([0.05, 0.7, 3.0, 80.0], dtype=torch.float64)
    x = torch.randn(4, 4, 3, 3) * (1 + sigma.float()[:, None, None, None])
    x0 = denoiser(x, sigma, Conditioning())
    t = (sigma / (1 + sigma)).float()[:, None, None, None]
    x_t, timestep = network.given
    torch.testing.assert_close(x_t, (1 - t) * x)
    torch.testing.assert_close(timestep, 1000 * t.flatten())
    torch.testing.assert_close(x0, x_t - t * network(x_t, timestep), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@torch.no_grad()
def test_at_the_cap_the_network_gets_the_last_timestep_and_unit_noise(prediction: str) -> None:
    denoiser, network = watched(prediction, "flow")
    noise, x0 = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    denoiser.network(x0 + SIGMA_CAP * noise, torch.tensor([SIGMA_CAP, SIGMA_CAP], dtype=torch.float64), Conditioning())
    x_t, timestep = network.given
    assert timestep.tolist() == [1000, 1000]
    torch.testing.assert_close(x_t, noise, atol=1e-6, rtol=1e-6)


@PREDICTION
@torch.no_grad()
def test_the_training_target_is_what_gives_x0_back(prediction: str) -> None:
    denoiser, _ = watched(prediction)
    x0, eps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    sigma = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    rows = sigma.float()[:, None, None, None]
    target = denoiser.prediction.target(x0, eps, rows)
    denoiser.network = lambda *given: target  # type: ignore[method-assign]
    torch.testing.assert_close(denoiser(x0 + rows * eps, sigma, Conditioning()), x0, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slots_reach_the_network_in_its_own_type() -> None:
    denoiser, network = watched("eps", dtype=torch.bfloat16)
    told = Conditioning(
        context=torch.randn(2, 3, 6), vector=torch.randn(2, 7), concat=torch.full((2, 1, 3, 3), 0.5),
        mask=torch.ones(2, 3, dtype=torch.bool),
    )  # fmt: skip
    answer = denoiser.network(torch.randn(2, 4, 3, 3), torch.ones(2, dtype=torch.float64), told)
    x_t, timestep, context, vector, mask = network.given
    assert answer.dtype == timestep.dtype == torch.float32
    assert x_t.dtype == context.dtype == torch.bfloat16
    assert vector.dtype == torch.float32
    assert x_t.shape == (2, 5, 3, 3)
    assert (x_t[:, 4] == 0.5).all()  # beside the latent, and not scaled with it
    assert mask.dtype == torch.bool


@torch.no_grad()
def test_bound_it_is_a_denoise_for_samplers() -> None:
    denoiser = Denoiser(CONFIG, NoiseSchedule(), "flow").eval()
    assert isinstance(denoiser.unet, UNet)
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)  # type: ignore[arg-type]
    told = Conditioning(context=torch.randn(2, 3, 6), concat=torch.randn(2, 1, 4, 4))
    x = torch.randn(2, 4, 4, 4)
    expected = denoiser(x, torch.tensor([2.0, 2.0]), told)
    assert torch.equal(denoiser.bind(told)(x, 2.0).x0, expected)
    *_, last = sample("euler", denoiser.bind(told), 9 * x, np.array([9.0, 1.0, 0.0]), None)
    assert torch.isfinite(last.x).all()


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(InputError, match="prediction 'epsilon' is unknown; did you mean 'eps'"):
        Denoiser(CONFIG, NoiseSchedule(), "epsilon")


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule("flow"), NoiseSchedule("linear", beta_end=1.0), NoiseSchedule("cosine", zero_terminal=True)],
    ids=lambda schedule: schedule.kind,
)
def test_noise_alone_on_a_schedule_that_ends_in_pure_noise_is_refused(schedule: NoiseSchedule, prediction: str) -> None:
    with pytest.raises(InputError, match=f"prediction '{prediction}' says nothing of the picture in the pure noise"):
        Denoiser(CONFIG, schedule, prediction)


@torch.no_grad()
def test_the_preconditioning_of_edm_is_that_of_its_paper() -> None:
    denoiser, network = watched("edm", "edm")
    sigma = torch.tensor([0.01, 0.7, 3.0, 70.0], dtype=torch.float64)
    x = torch.randn(4, 4, 3, 3) * (0.5 + sigma.float()[:, None, None, None])
    x0 = denoiser(x, sigma, Conditioning())
    x_t, timestep = network.given
    total = (sigma**2 + 0.25)[:, None, None, None]
    torch.testing.assert_close(timestep, (sigma.log() / 4).float())
    torch.testing.assert_close(x_t, (x / total.sqrt()).float())
    out = sigma[:, None, None, None] * 0.5 / total.sqrt()
    torch.testing.assert_close(x0, (0.25 / total * x + out * network(x_t, timestep)).float(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_learned_variance_is_the_second_half_of_the_output_as_a_share() -> None:
    wide = replace(CONFIG, channels_in=4, channels_out=8)
    denoiser = Denoiser(wide, NoiseSchedule("cosine"), "eps", learned_variance=True)
    output = torch.randn(2, 8, 3, 3)
    denoiser.network = lambda *given: output  # type: ignore[method-assign]
    x = torch.randn(2, 4, 3, 3)
    answer = denoiser.bind(Conditioning())(x, 1.5)
    torch.testing.assert_close(answer.x0, x - 1.5 * output[:, :4])
    assert answer.log_variance is not None
    torch.testing.assert_close(answer.log_variance, output[:, 4:] / 2 + 0.5)
    assert Denoiser(CONFIG, NoiseSchedule(), "flow").bind(Conditioning(context=torch.zeros(2, 3, 6), concat=x[:, :1]))(
        x, 1.5
    ).log_variance is None  # fmt: skip


@torch.no_grad()
def test_a_row_of_a_table_is_not_rounded() -> None:
    """bfloat16 has no 257: the network would be told of level 256."""
    config = replace(CONFIG, channels_in=4, depth=(0,), middle_depth=0, context_width=None, classes=1000)
    denoiser = Denoiser(config, NoiseSchedule("scaled_linear"), "eps").to(torch.bfloat16)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.randn(1, 4, 8, 8), torch.ones(1, dtype=torch.float64)
    rounded, exact = (denoiser(x, sigma, Conditioning(vector=torch.tensor([[level]]))) for level in (256.0, 257.0))
    assert not torch.equal(rounded, exact)
