"""Spacings: the asked number of steps, always, strictly falling to 0."""

from typing import Any

import numpy as np
import pytest

from latentkit.diffusion.schedule import KINDS, SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import FLOW_SIGMA_MAX, SPACINGS, space
from latentkit.errors import InputError

SCHEDULES = {kind: NoiseSchedule(kind) for kind in KINDS}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPACINGS)
def test_every_step_count_is_exact_and_falls_to_zero(name: str, kind: str) -> None:
    schedule = SCHEDULES[kind]
    for steps in range(1, 1001):
        sigmas = space(name, schedule, steps)
        assert sigmas.shape == (steps + 1,)
        assert sigmas.dtype == np.float64
        assert (sigmas[1:] < sigmas[:-1]).all()
        assert sigmas[-1] == 0
        assert sigmas[0] == pytest.approx(schedule.sigma_max, rel=1e-9)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_uniform_visits_evenly_spaced_timesteps_from_the_last(kind: str) -> None:
    schedule = SCHEDULES[kind]
    timesteps = schedule.to_timestep(space("uniform", schedule, 50)[:-1])
    np.testing.assert_allclose(timesteps, np.arange(999, -1, -20), atol=1e-9)


def test_uniform_on_a_flow_is_even_in_its_own_time() -> None:
    schedule = NoiseSchedule("flow")
    np.testing.assert_allclose(schedule.to_timestep(space("uniform", schedule, 4)), [1000, 750, 500, 250, 0])


@pytest.mark.parametrize(
    ("name", "warp"),
    [("karras", lambda s: s ** (1 / 7)), ("exponential", np.log), ("kl_optimal", np.arctan)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_others_are_even_in_their_own_scale(name: str, warp: np.ufunc, kind: str) -> None:
    schedule = SCHEDULES[kind]
    finite = space(name, schedule, 20)[int(kind == "flow") : -1]
    assert finite[0] == pytest.approx(FLOW_SIGMA_MAX if kind == "flow" else schedule.sigma_max)
    assert finite[-1] == pytest.approx(schedule.sigma_min)
    np.testing.assert_allclose(np.diff(warp(finite), 2), 0, atol=1e-9)


@pytest.mark.parametrize("name", SPACINGS)
def test_an_infinite_sigma_is_one_cap_before_a_finite_spacing(name: str) -> None:
    sigmas = space(name, NoiseSchedule("flow"), 10)
    assert sigmas[0] == SIGMA_CAP
    assert sigmas[1] < SIGMA_CAP / 1000


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_uniform_and_karras_are_those_of_diffusers() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    schedule = NoiseSchedule("scaled_linear")
    for karras in (False, True):
        peer = diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="linspace" if karras else "trailing",
            use_karras_sigmas=karras,
        )
        peer.set_timesteps(20)
        ours = space("karras" if karras else "uniform", schedule, 20)
        np.testing.assert_allclose(ours, peer.sigmas.double().numpy(), rtol=1e-4)


def test_a_wrong_spacing_is_refused() -> None:
    schedule = NoiseSchedule("flow")
    with pytest.raises(InputError, match="'karas' is unknown; did you mean 'karras'"):
        space("karas", schedule, 10)
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"{steps} sampler steps asked for; allowed are 1 to 1000"):
            space("uniform", schedule, steps)
