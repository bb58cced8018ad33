"""Noise schedules: sigma and timestep are inverse, the known tables, refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from latentkit.diffusion.schedule import KINDS, SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError

SCHEDULES = {
    **{kind: NoiseSchedule(kind) for kind in KINDS},  # type: ignore[arg-type]
    "sqrt": NoiseSchedule("sqrt", 1e-8, 1e-5),
    "zero_terminal": NoiseSchedule("scaled_linear", zero_terminal=True),
    "shifted": NoiseSchedule("flow", shift=3.0),
    "short": NoiseSchedule("cosine", steps=7),
}
PURE_NOISE_EARLY = NoiseSchedule("sqrt")
"""With betas as they are for other kinds, its levels past the 430th or so are all pure noise."""
NAMED = st.sampled_from(sorted(SCHEDULES))
EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def timesteps(schedule: NoiseSchedule) -> np.ndarray:
    """What the network was trained with at each level, by the papers."""
    if schedule.kind == "edm":
        return np.log(schedule.sigmas) / 4
    indices = np.arange(schedule.steps, dtype=np.float64)
    if schedule.kind == "flow":
        t = (indices + 1) / schedule.steps
        return schedule.steps * schedule.shift * t / (1 + (schedule.shift - 1) * t)
    return indices


@given(name=NAMED, share=st.floats(0, 1))
def test_sigma_to_timestep_and_back(name: str, share: float) -> None:
    schedule = SCHEDULES[name]
    sigma = schedule.sigma_min * (min(schedule.sigma_max, 1e5) / schedule.sigma_min) ** share
    assert schedule.to_sigma(schedule.to_timestep(sigma)) == pytest.approx(sigma, rel=1e-9)
    assert schedule.at(schedule.position(sigma)) == pytest.approx(sigma, rel=1e-9)


@given(name=NAMED, share=st.floats(0.001, 0.999))
def test_timestep_to_sigma_and_back(name: str, share: float) -> None:
    schedule = SCHEDULES[name]
    first, last = timesteps(schedule)[[0, -1]]
    timestep = first + share * (last - first)
    assert schedule.to_timestep(schedule.to_sigma(timestep)) == pytest.approx(timestep, rel=1e-9, abs=1e-9)


@EACH
def test_trained_levels_have_the_timesteps_of_the_papers(schedule: NoiseSchedule) -> None:
    trained = timesteps(schedule)
    assert schedule.sigmas.shape == (schedule.steps,)
    assert np.all(np.diff(schedule.sigmas) > 0)
    np.testing.assert_allclose(schedule.to_timestep(schedule.sigmas), trained, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(schedule.to_sigma(trained), schedule.sigmas, rtol=1e-9)
    np.testing.assert_allclose(schedule.position(schedule.sigmas), np.arange(schedule.steps), atol=1e-7)
    between = schedule.at(np.arange(schedule.steps - 1) + 0.4)
    rounded = schedule.to_timestep(between, nearest_index=True)
    np.testing.assert_allclose(rounded, trained[:-1], rtol=1e-12)
    if schedule.kind not in ("edm", "flow"):
        np.testing.assert_array_equal(rounded, trained[:-1])  # an index is exact


def test_outside_the_trained_levels_the_timestep_is_clipped() -> None:
    schedule = NoiseSchedule("scaled_linear")
    np.testing.assert_array_equal(schedule.to_timestep(np.array([0.0, 1e-9, 1e9])), [0, 0, 999])
    np.testing.assert_array_equal(schedule.to_sigma(np.array([-5.0, 2000.0])), schedule.sigmas[[0, -1]])
    assert float(NoiseSchedule("flow").to_sigma(1500)) == SIGMA_CAP
    edm = NoiseSchedule("edm")
    np.testing.assert_allclose(edm.to_timestep(np.array([0.0, 1e9])), [math.log(0.002) / 4, math.log(80) / 4])
    np.testing.assert_allclose(edm.to_sigma(np.array([-9.0, 1e6])), [0.002, 80.0])


def test_a_position_below_the_first_level_leads_to_the_clean_picture() -> None:
    for schedule in SCHEDULES.values():
        assert float(schedule.at(-1)) == 0
        assert 0 < float(schedule.at(-0.5)) < schedule.sigma_min


def test_infinity_is_the_cap_and_the_last_timestep() -> None:
    for shift in (1.0, 5.0):
        flow = NoiseSchedule("flow", shift=shift)
        assert flow.sigma_max == SIGMA_CAP == float(flow.to_sigma(1000))
        assert float(flow.to_timestep(SIGMA_CAP)) == 1000
    for schedule in (SCHEDULES["zero_terminal"], NoiseSchedule("linear", beta_start=0.1, beta_end=1.0)):
        assert schedule.sigma_max == SIGMA_CAP == float(schedule.to_sigma(999))
        assert float(schedule.to_timestep(SIGMA_CAP)) == 999
    assert float(schedule.to_sigma(np.nextafter(999, 0))) == SIGMA_CAP  # a cap that rounding has moved


def test_levels_past_the_cap_are_one_level() -> None:
    schedule, top = PURE_NOISE_EARLY, PURE_NOISE_EARLY.top
    assert 0 < top < 999
    assert np.all(np.diff(schedule.sigmas[: top + 1]) > 0)
    assert np.all(schedule.sigmas[top:] == SIGMA_CAP)
    assert float(schedule.to_timestep(SIGMA_CAP)) == 999
    below = schedule.sigmas[:top]
    np.testing.assert_allclose(schedule.to_sigma(schedule.to_timestep(below)), below, rtol=1e-9)
    assert SCHEDULES["flow"].top == SCHEDULES["cosine"].top == 999


def test_stable_diffusions_table() -> None:
    schedule = NoiseSchedule("scaled_linear", 0.00085, 0.012)
    assert schedule.sigma_min == pytest.approx(0.029167158, rel=1e-7)
    assert schedule.sigma_max == pytest.approx(14.614642, rel=1e-6)


def test_betas_too_small_for_alpha_bar_have_sigmas() -> None:
    schedule = NoiseSchedule("linear", 1e-20, 1e-20, steps=4)  # 1 - beta is 1 in float64
    np.testing.assert_allclose(schedule.sigmas, 1e-10 * np.sqrt([1, 2, 3, 4]), rtol=1e-12)


def test_edm_and_geometric_levels() -> None:
    edm = NoiseSchedule("edm", sigma_first=0.01, sigma_last=50.0, steps=11)
    np.testing.assert_allclose(np.diff(edm.sigmas ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(edm.sigmas[[0, -1]], [0.01, 50])
    smld = NoiseSchedule("geometric", sigma_first=0.01, sigma_last=1.0, steps=10)  # Song & Ermon 2019, section 3.2
    np.testing.assert_allclose(smld.sigmas[1:] / smld.sigmas[:-1], 100 ** (1 / 9))
    for kind in ("edm", "geometric"):
        assert NoiseSchedule(kind, steps=1).sigmas == pytest.approx([80.0])


@given(t=st.floats(0.001, 0.999), shift=st.floats(0.1, 20))
def test_a_shifted_flow_moves_its_time(t: float, shift: float) -> None:
    schedule = NoiseSchedule("flow", shift=shift)
    moved = shift * t / (1 + (shift - 1) * t)
    assert float(schedule.to_timestep(schedule.at(1000 * t - 1))) == pytest.approx(1000 * moved, rel=1e-9)


BETA_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parity
@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("kind", BETA_KINDS)
def test_alpha_bars_are_those_of_diffusers(kind: str, zero_terminal: bool, steps: int) -> None:
    """diffusers multiplies a thousand float32 factors up."""
    diffusers: Any = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=steps, beta_schedule=BETA_KINDS[kind], beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal,
    )  # fmt: skip
    ours = NoiseSchedule(kind, steps=steps, zero_terminal=zero_terminal)  # type: ignore[arg-type]
    theirs = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(1 / (1 + ours.sigmas**2), theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parity
def test_zero_terminal_rescaling_is_that_of_diffusers_in_float64() -> None:
    ddim: Any = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - ddim.rescale_zero_terminal_snr(betas), 0).numpy()
    ours = SCHEDULES["zero_terminal"].sigmas
    np.testing.assert_allclose(1 / (1 + ours[:-1] ** 2), theirs[:-1], rtol=1e-8)
    assert theirs[-1] == 0
    assert ours[-1] == SIGMA_CAP


@pytest.mark.parity
def test_flow_and_geometric_levels_are_those_of_diffusers() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = SCHEDULES["shifted"]
    np.testing.assert_allclose(ours.to_timestep(ours.sigmas)[::-1], flow.timesteps.numpy(), rtol=1e-6)
    ve = diffusers.ScoreSdeVeScheduler(num_train_timesteps=50, sigma_min=0.01, sigma_max=1348.0)
    geometric = NoiseSchedule("geometric", sigma_first=0.01, sigma_last=1348.0, steps=50)
    np.testing.assert_allclose(geometric.sigmas, ve.discrete_sigmas.double().numpy(), rtol=1e-5)
    edm = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, num_train_timesteps=999)
    np.testing.assert_allclose(SCHEDULES["edm"].sigmas[::-1], edm.sigmas[:-1].double().numpy(), rtol=1e-5)
    np.testing.assert_allclose(timesteps(SCHEDULES["edm"])[::-1], edm.timesteps.double().numpy(), rtol=1e-5, atol=1e-6)


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
        ({"kind": "sqrt", "beta_start": 0.0}, "0 < beta_start"),
        ({"kind": "linear", "beta_start": math.nan}, "0 < beta_start"),
        ({"kind": "edm", "sigma_first": 0.0}, "0 < sigma_first < sigma_last < 1e[+]07"),
        ({"kind": "geometric", "sigma_first": 2.0, "sigma_last": 1.0}, "0 < sigma_first < sigma_last"),
        ({"kind": "edm", "sigma_last": 1e7}, "sigma_last < 1e[+]07"),
        ({"kind": "flow", "zero_terminal": True}, "a flow ends in pure noise as it is: leave it out"),
        ({"kind": "edm", "zero_terminal": True}, "this is 'edm'"),
        ({"kind": "cosine", "zero_terminal": True, "steps": 1}, "at least 2 of them; this is 'cosine' of 1 steps"),
        ({"kind": "flow", "shift": 0.0}, "shift=0.0; a flow takes a positive one"),
        ({"kind": "flow", "shift": math.inf}, "a flow takes a positive one"),
        ({"kind": "cosine", "shift": 2.0}, "a flow takes a positive one, all others 1"),
        ({"kind": "linear", "beta_start": 1.0, "beta_end": 1.0}, "goes from sigma 1e[+]07 to 1e[+]07"),
        ({"kind": "flow", "shift": 1e9}, "begin above 0 and at most at 1000"),
        ({"kind": "geometric", "sigma_first": 1.0, "sigma_last": 1 + 1e-15}, "its levels must rise"),
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


def test_a_schedule_of_a_file_written_before_is_read() -> None:
    old = '{"kind": "flow", "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000}'
    assert TypeAdapter(NoiseSchedule).validate_json(old, strict=True) == NoiseSchedule("flow")
