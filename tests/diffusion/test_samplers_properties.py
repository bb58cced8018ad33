"""What holds of every sampler: any number of steps, any type, caps, batches, no state between runs."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ideal import gaussian, mixture
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise, Denoised, Step, sample, table
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import space

ENTRIES = table()
NAMES = pytest.mark.parametrize("name", ENTRIES)
FLOW, SD = NoiseSchedule("flow"), NoiseSchedule("scaled_linear")
CENTRES = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]


def blobs(x: Tensor, sigma: float) -> Denoised:
    """A mixture's denoiser in the type of x."""
    return mixture(CENTRES.to(x), 0.6)(x, sigma)


def run(name: str, denoise: Denoise, x: Tensor, sigmas: np.ndarray, noise: Any) -> list[Step]:
    """Every step, its tensors kept."""
    return [step._replace(x=step.x.clone(), x0=step.x0.clone()) for step in sample(name, denoise, x, sigmas, noise)]


@given(
    name=st.sampled_from(sorted(ENTRIES)),
    steps=st.one_of(st.integers(1, 30), st.integers(1, 1000)),
    schedule=st.sampled_from([FLOW, SD]),
    spacing=st.sampled_from(["uniform", "karras", "trailing"]),
)
@settings(max_examples=25)
def test_any_number_of_steps_is_taken(name: str, steps: int, schedule: NoiseSchedule, spacing: str) -> None:
    sigmas, noise = space(spacing, schedule, steps), PictureNoise([1], (1, 1, 1))
    x = noise.initial().double() * schedule.initial_std(float(sigmas[0]))
    taken = list(sample(name, gaussian(0.3, 0.7), x, sigmas, noise))
    assert [step.sigma for step in taken] == sigmas[1:].tolist()
    assert all(step.x.isfinite().all() for step in taken)
    assert abs(float(taken[-1].x)) < 10


@NAMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_latent_keeps_its_type(name: str, dtype: torch.dtype) -> None:
    noise = PictureNoise([1, 2], (2, 1, 1))
    x = (9 * noise.initial()).to(dtype)
    taken = run(name, blobs, x, np.array([9.0, 4.0, 2.0, 1.0, 0.5, 0.0]), noise)
    assert {step.x.dtype for step in taken} == {step.x0.dtype for step in taken} == {dtype}
    wide = run(name, blobs, x.double(), np.array([9.0, 4.0, 2.0, 1.0, 0.5, 0.0]), noise)
    apart = (taken[-1].x.double() - wide[-1].x).abs().max()
    assert apart < 60 * torch.finfo(dtype).eps


@NAMES
@pytest.mark.parametrize("spacing", ["uniform", "karras", "kl_optimal"])
def test_from_a_cap_float32_is_within_a_thousandth_of_float64(name: str, spacing: str) -> None:
    noise = PictureNoise([1, 2, 3], (2, 1, 1))
    sigmas = space(spacing, FLOW, 25)
    assert sigmas[0] == SIGMA_CAP == 1e7
    ends = [
        run(name, blobs, noise.initial().to(t) * SIGMA_CAP, sigmas, noise)[-1].x for t in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(ends[0].double(), ends[1], atol=1e-3, rtol=0)


@NAMES
def test_a_picture_of_a_batch_is_the_picture_alone(name: str) -> None:
    """Exactly, but for the adaptive rule: its steps are those that the worst picture needs."""
    allowed = 1e-6 if name == "dpm_adaptive" else 1e-12
    seeds, sigmas = [3, 1, 4], space("karras", SD, 9)
    batch = PictureNoise(seeds, (2, 3, 3))
    together = run(name, squashed, batch.initial().double() * 14.6, sigmas, batch)
    for row, seed in enumerate(seeds):
        alone = PictureNoise([seed], (2, 3, 3))
        steps = run(name, squashed, alone.initial().double() * 14.6, sigmas, alone)
        for a, b in zip(together, steps, strict=True):
            torch.testing.assert_close(a.x[row : row + 1], b.x, rtol=allowed, atol=allowed)


def squashed(x: Tensor, sigma: float) -> Denoised:
    """Elementwise, so that no order of summation differs between batches."""
    return Denoised(torch.tanh(x / (1 + sigma)))


@NAMES
def test_two_runs_are_one_run_and_nothing_given_is_changed(name: str) -> None:
    noise, sigmas = PictureNoise([7], (2, 1, 1)), space("karras", SD, 7)
    x, laid = noise.initial() * 14.6, sigmas.copy()
    before = x.clone()
    first = run(name, blobs, x, sigmas, noise)
    next(iter(sample(name, blobs, x, sigmas, noise)))  # left after its first step
    second = run(name, blobs, x, sigmas, noise)
    assert torch.equal(x, before)
    assert np.array_equal(sigmas, laid)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x0, b.x0)


@NAMES
def test_what_a_denoiser_returned_is_never_written_into(name: str) -> None:
    given_out: list[tuple[Tensor, Tensor]] = []

    def kept(x: Tensor, sigma: float) -> Denoised:
        x0 = blobs(x, sigma).x0
        given_out.append((x0, x0.clone()))
        return Denoised(x0)

    noise = PictureNoise([7], (2, 1, 1))
    run(name, kept, noise.initial() * 14.6, space("karras", SD, 7), noise)
    assert all(torch.equal(now, then) for now, then in given_out)


@NAMES
def test_a_denoiser_may_return_its_input(name: str) -> None:
    noise = PictureNoise([7], (2, 1, 1))

    def same(x: Tensor, sigma: float) -> Denoised:
        return Denoised(x)

    def copied(x: Tensor, sigma: float) -> Denoised:
        return Denoised(x.clone())

    x, sigmas = noise.initial() * 9, np.array([9.0, 4.0, 2.0, 1.0, 0.5])
    assert torch.equal(run(name, same, x, sigmas, noise)[-1].x, run(name, copied, x, sigmas, noise)[-1].x)
