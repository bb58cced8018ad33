"""Noise schedules: sigma and timestep are inverse, the known tables, refusals."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from latentkit.diffusion.schedule import KINDS, SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError

SCHEDULES = {kind: NoiseSchedule(kind) for kind in KINDS}  # type: ignore[arg-type]
KIND = st.sampled_from(KINDS)


@given(kind=KIND, share=st.floats(0, 1))
def test_sigma_to_timestep_and_back(kind: str, share: float) -> None:
    schedule = SCHEDULES[kind]
    sigma = schedule.sigma_min * (min(schedule.sigma_max, 1e5) / schedule.sigma_min) ** share
    assert schedule.to_sigma(schedule.to_timestep(sigma)) == pytest.approx(sigma, rel=1e-9)


@given(kind=KIND, timestep=st.floats(0.001, 999))
def test_timestep_to_sigma_and_back(kind: str, timestep: float) -> None:
    schedule = SCHEDULES[kind]
    assert schedule.to_timestep(schedule.to_sigma(timestep)) == pytest.approx(timestep, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_levels_are_the_integer_timesteps(kind: str) -> None:
    schedule = SCHEDULES[kind]
    indices = np.arange(1, 1001) if kind == "flow" else np.arange(1000)
    assert np.all(np.diff(schedule.sigmas) > 0)
    np.testing.assert_allclose(schedule.to_timestep(schedule.sigmas), indices, atol=1e-9)
    np.testing.assert_allclose(schedule.to_sigma(indices), schedule.sigmas, rtol=1e-12)
    between = schedule.to_sigma(indices[:-1] + 0.4)
    np.testing.assert_array_equal(schedule.to_timestep(between, nearest_index=True), indices[:-1])


def test_outside_the_trained_levels_the_timestep_is_clipped() -> None:
    schedule = NoiseSchedule("scaled_linear")
    np.testing.assert_array_equal(schedule.to_timestep(np.array([0.0, 1e-9, 1e9])), [0, 0, 999])


def test_infinity_is_the_cap_and_the_last_timestep() -> None:
    flow = NoiseSchedule("flow")
    assert flow.sigma_max == SIGMA_CAP == float(flow.to_sigma(1000))
    assert float(flow.to_timestep(SIGMA_CAP)) == 1000
    zero_terminal = NoiseSchedule("linear", beta_start=0.1, beta_end=1.0)
    assert zero_terminal.sigma_max == SIGMA_CAP == float(zero_terminal.to_sigma(999))
    assert float(zero_terminal.to_sigma(np.nextafter(999, 0))) == SIGMA_CAP  # a cap that rounding has moved


def test_stable_diffusions_table() -> None:
    schedule = NoiseSchedule("scaled_linear", 0.00085, 0.012)
    assert schedule.sigma_min == pytest.approx(0.029167158, rel=1e-7)
    assert schedule.sigma_max == pytest.approx(14.614642, rel=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "peer"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_alpha_bars_are_those_of_diffusers(kind: str, peer: str) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=peer, beta_start=0.00085, beta_end=0.012)
    theirs = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(1 / (1 + SCHEDULES[kind].sigmas ** 2), theirs, rtol=2e-4, atol=1e-9)


def test_the_start_has_one_of_two_deviations() -> None:
    schedule = NoiseSchedule("scaled_linear")
    assert schedule.initial_std(3.0) == pytest.approx(np.sqrt(10))
    assert schedule.initial_std(3.0, exact=False) == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "scaled-linear"}, "did you mean 'scaled_linear'"),
        ({"steps": 0}, "has 0 steps; it needs at least 1"),
        ({"kind": "linear", "beta_start": 0.5, "beta_end": 0.1}, "0 < beta_start <= beta_end <= 1"),
        ({"kind": "linear", "beta_end": 1.5}, "beta_end=1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_schedule_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NoiseSchedule(**fields)  # type: ignore[arg-type]


def test_a_schedule_from_a_recipe_is_checked_and_whole() -> None:
    adapter = TypeAdapter(NoiseSchedule)
    assert adapter.validate_python({"kind": "cosine"}).sigmas[0] == SCHEDULES["cosine"].sigmas[0]
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "cosine", "betas": 3})
