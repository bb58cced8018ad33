"""Samplers against diffusers' schedulers, on a small random denoiser in float64.

DDIM and Heun compute in the type they get, so whole trajectories agree to float64; Euler and DPM-Solver++ cast the
sample to float32 inside, so theirs agree to that. Their sigmas are replaced by the same float64 values.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoised, sample
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.diffusion.spacing import space

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]
SD = NoiseSchedule("scaled_linear", 0.00085, 0.012)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 20
MIX = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
NOISE = PictureNoise([1, 2], (3, 4, 4))


def denoise(x: Tensor, sigma: float) -> Denoised:
    """A smooth nonlinear x0 that mixes channels and bends with sigma."""
    scaled = x / math.sqrt(1 + sigma * sigma)
    return Denoised(torch.tanh(torch.einsum("oc,bchw->bohw", MIX.to(x), scaled)) + 0.3 * scaled.cos())


def eps(x: Tensor, sigma: float) -> Tensor:
    """The same denoiser as a prediction of the noise."""
    return (x - denoise(x, sigma).x0) / sigma


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def ours(name: str, sigmas: np.ndarray, x: Tensor) -> list[Tensor]:
    return [step.x for step in sample(name, denoise, x, sigmas, NOISE.step)]


def agree(theirs: Iterator[Tensor], mine: list[Tensor], tolerance: float) -> None:
    steps = list(theirs)
    assert len(steps) == len(mine)
    for a, b in zip(steps, mine):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize(("name", "eta"), [("euler", 0.0), ("euler_ancestral", 1.0)])
def test_ddim_is_euler_in_sigma_space_and_its_eta_one_is_ancestral(diffusers: Any, name: str, eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + SD.sigmas**2))
    scheduler.set_timesteps(STEPS)
    sigmas = space("uniform", SD, STEPS)
    start = NOISE.initial().double() * sigmas[0]

    def theirs() -> Iterator[Tensor]:
        x = start / math.sqrt(1 + sigmas[0] ** 2)
        for i, t in enumerate(scheduler.timesteps):
            predicted = eps(x * math.sqrt(1 + sigmas[i] ** 2), sigmas[i])
            noise = NOISE.step(i).double() if eta else None
            x = scheduler.step(predicted, t, x, eta=eta, variance_noise=noise).prev_sample
            yield x * math.sqrt(1 + sigmas[i + 1] ** 2)

    agree(theirs(), ours(name, sigmas, start), 1e-9)


def test_heun(diffusers: Any) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    sigmas = space("uniform", SD, STEPS)
    scheduler.sigmas = torch.from_numpy(np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]]))
    start = NOISE.initial().double() * sigmas[0]

    def theirs() -> Iterator[Tensor]:
        x = start
        for call, t in enumerate(scheduler.timesteps):
            x = scheduler.step(eps(x, float(sigmas[(call + 1) // 2])), t, x).prev_sample
            if call % 2 or call == len(scheduler.timesteps) - 1:
                yield x

    agree(theirs(), ours("heun", sigmas, start), 1e-10)


def test_euler(diffusers: Any) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    sigmas = space("karras", SD, STEPS)
    scheduler.sigmas = torch.from_numpy(sigmas)
    start = NOISE.initial().double() * sigmas[0]

    def theirs() -> Iterator[Tensor]:
        x = start
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(eps(x, float(sigmas[i])), t, x).prev_sample
            yield x

    agree(theirs(), ours("euler", sigmas, start), 1e-5)


@pytest.mark.parametrize("spacing", ["uniform", "karras", "exponential"])
def test_dpm_solver_2m(diffusers: Any, spacing: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(STEPS)
    sigmas = space(spacing, SD, STEPS)
    scheduler.sigmas = torch.from_numpy(sigmas)
    start = NOISE.initial().double() * sigmas[0]

    def theirs() -> Iterator[Tensor]:
        x = start / math.sqrt(1 + sigmas[0] ** 2)
        for i, t in enumerate(scheduler.timesteps):
            predicted = eps(x * math.sqrt(1 + sigmas[i] ** 2), float(sigmas[i]))
            x = scheduler.step(predicted, t, x).prev_sample
            yield x * math.sqrt(1 + sigmas[i + 1] ** 2)

    agree(theirs(), ours("dpm++2m", sigmas, start), 2e-5)


def test_a_flow_by_euler_from_its_cap(diffusers: Any) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    flow = NoiseSchedule("flow")
    sigmas = space("uniform", flow, STEPS)
    times = sigmas / (1 + sigmas)
    times[0] = 1.0
    scheduler.set_timesteps(sigmas=times[:-1])
    start = NOISE.initial().double()

    def theirs() -> Iterator[Tensor]:
        x = start
        for i, t in enumerate(scheduler.timesteps):
            x0 = denoise(x * (1 + sigmas[i]), float(sigmas[i])).x0
            x = scheduler.step((x - x0) / times[i], t, x).prev_sample
            yield x * (1 + sigmas[i + 1])

    agree(theirs(), ours("euler", sigmas, start * sigmas[0]), 1e-5)
