"""Spacings: the asked number of steps, always, strictly falling to 0; their published forms; names and options."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ideal import gaussian

from latentkit.diffusion.samplers.driver import sample
from latentkit.diffusion.schedule import KINDS, SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import ALIASES, AYS_SD1, FLOW_SIGMA_MAX, SPACINGS, beta_quantile, space
from latentkit.errors import InputError

SCHEDULES = {
    **{kind: NoiseSchedule(kind) for kind in KINDS},  # type: ignore[arg-type]
    "zero_terminal": NoiseSchedule("scaled_linear", zero_terminal=True),
    "shifted": NoiseSchedule("flow", shift=3.0),
}
SD = SCHEDULES["scaled_linear"]
VARIANTS = (
    *SPACINGS,
    "leading:drop=1",
    "leading:offset=1",
    "linspace:drop=1,whole=1",
    "linspace:whole=1",
    "karras:rho=3",
)


def falls(name: str, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    sigmas = space(name, schedule, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == np.float64
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert sigmas[-1] == 0
    assert np.isfinite(sigmas).all()
    return sigmas


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("unchecked")
def test_every_one_of_a_thousand_step_counts_is_exact_and_falls_to_zero(name: str) -> None:
    """CompVis's uniform spacing fails at 599 of them."""
    for steps in range(1, 1001):
        falls(name, SD, steps)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("unchecked")
def test_every_schedule_gives_every_spacing(name: str, kind: str) -> None:
    schedule = SCHEDULES[kind]
    for steps in (*range(1, 13), 20, 50, 111, 333, 500, 501, 749, 999, 1000):
        sigmas = falls(name, schedule, steps)
        if not name.startswith(("leading", "ays", "lcm")) and (steps > 1 or not name.startswith("linspace")):
            assert sigmas[0] == pytest.approx(schedule.sigma_max, rel=1e-9)


@given(
    kind=st.sampled_from(KINDS), steps=st.integers(1, 60), share=st.floats(0, 1), name=st.sampled_from(VARIANTS),
    end=st.floats(1e-4, 0.5), zero=st.booleans(), shift=st.floats(0.2, 8),
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_any_schedule_of_any_length(
    kind: str, steps: int, share: float, name: str, end: float, zero: bool, shift: float
) -> None:
    zero = zero and kind in ("linear", "cosine") and steps > 1
    schedule = NoiseSchedule(
        kind, beta_start=end / 10, beta_end=end, steps=steps, zero_terminal=zero,
        shift=shift if kind == "flow" else 1.0,
    )  # type: ignore[arg-type]  # fmt: skip
    if name.startswith("ays") and schedule.sigma_max < AYS_SD1[0]:
        with pytest.raises(InputError, match=r"begins at sigma 14\.615"):
            space(name, schedule, 1)
        return
    falls(name, schedule, 1 + round(share * (steps - 1)))


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_uniform_visits_evenly_spaced_timesteps_from_the_last(kind: str) -> None:
    schedule = SCHEDULES[kind]
    timesteps = schedule.to_timestep(space("uniform", schedule, 50)[:-1])
    np.testing.assert_allclose(timesteps, np.arange(999, -1, -20), atol=1e-9)


def test_uniform_on_a_flow_is_even_in_its_own_time_which_a_shift_moves() -> None:
    schedule = NoiseSchedule("flow")
    np.testing.assert_allclose(schedule.to_timestep(space("uniform", schedule, 4)), [1000, 750, 500, 250, 0])
    shifted = SCHEDULES["shifted"].to_timestep(space("uniform", SCHEDULES["shifted"], 4))
    np.testing.assert_allclose(shifted, [1000, 900, 750, 500, 0])


@pytest.mark.parametrize(
    ("name", "warp"),
    [
        ("karras", lambda s: s ** (1 / 7)),
        ("karras:rho=3", lambda s: s ** (1 / 3)),
        ("exponential", np.log),
        ("polyexponential", np.log),
        ("kl_optimal", np.arctan),
    ],
)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_others_are_even_in_their_own_scale(name: str, warp: np.ufunc, kind: str) -> None:
    schedule = SCHEDULES[kind]
    capped = schedule.sigma_max >= SIGMA_CAP
    finite = space(name, schedule, 20)[int(capped) : -1]
    assert finite[0] == pytest.approx(FLOW_SIGMA_MAX if capped else schedule.sigma_max)
    assert finite[-1] == pytest.approx(schedule.sigma_min)
    np.testing.assert_allclose(np.diff(warp(finite), 2), 0, atol=1e-9)


def test_polyexponential_is_a_power_of_the_way_in_log_sigma() -> None:
    logs = np.log(space("polyexponential:rho=2", SD, 11)[:-1])
    np.testing.assert_allclose((logs - logs[-1]) / (logs[0] - logs[-1]), np.linspace(1, 0, 11) ** 2, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("leading")])
@pytest.mark.parametrize("kind", ["flow", "shifted", "zero_terminal"])
def test_an_infinite_sigma_is_one_cap_before_a_finite_spacing(name: str, kind: str) -> None:
    sigmas = space(name, SCHEDULES[kind], 10)
    assert sigmas[0] == SIGMA_CAP
    assert sigmas[1] < SIGMA_CAP / 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_no_second_level_stands_between_an_infinite_one_and_the_last_finite_one(name: str) -> None:
    assert space(name, SCHEDULES["flow"], 1000)[1] < 1001


def test_a_schedule_whose_levels_are_all_high_has_every_spacing() -> None:
    schedule = NoiseSchedule("flow", shift=600.0, steps=5)
    assert schedule.sigma_min == pytest.approx(150)
    for name in (name for name in VARIANTS if not name.startswith("ays")):
        for steps in range(1, 6):
            falls(name, schedule, steps)


@pytest.mark.parametrize("name", ["uniform", "karras", "kl_optimal", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "heun"])
def test_the_cap_costs_float32_less_than_a_thousandth_at_the_end(sampler: str, name: str) -> None:
    denoise, sigmas = gaussian(0.3, 0.7), space(name, SCHEDULES["flow"], 12)
    assert sigmas[0] == 1e7
    start = torch.randn(2, 3, 8, 8, dtype=torch.float64) * sigmas[0]

    def end(x: torch.Tensor) -> torch.Tensor:
        *_, last = sample(sampler, denoise, x, sigmas, None)
        return last.x

    assert (end(start.float()).double() - end(start)).abs().max() < 1e-3


def test_beta_quantiles_are_those_of_the_distribution() -> None:
    mpmath = pytest.importorskip("mpmath")
    x = np.array([1e-6, 1e-3, 0.07, 0.3, 0.5, 0.62, 0.93, 0.9999])
    shares = np.array([float(mpmath.betainc(0.6, 0.6, 0, at, regularized=True)) for at in x])
    np.testing.assert_allclose(beta_quantile(shares), x, rtol=1e-9)
    np.testing.assert_array_equal(beta_quantile(np.array([0.0, 1.0])), [0, 1])


def test_align_your_steps_is_its_published_list_and_log_linear_between() -> None:
    np.testing.assert_allclose(space("ays_sd1", SD, 10)[:-1], AYS_SD1[:-1])
    twice = space("ays_sd1", SD, 20)[:-1]
    np.testing.assert_allclose(twice[::2], AYS_SD1[:-1])
    np.testing.assert_allclose(twice[1::2], np.sqrt(np.multiply(AYS_SD1[:-1], AYS_SD1[1:])))
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # as timesteps
    np.testing.assert_allclose(SD.to_timestep(np.array(AYS_SD1[:-1])), published, atol=1)
    flow = space("ays_xl", SCHEDULES["flow"], 11)
    assert flow[0] == SIGMA_CAP
    assert flow[1] == pytest.approx(14.615)
    with pytest.raises(InputError, match=r"begins at sigma 14\.615, the noise schedule ends at 1;"):
        space("ays_sd1", NoiseSchedule("geometric", sigma_last=1.0), 10)


def test_a_searched_spacing_is_the_models_own_list_and_log_linear_between() -> None:
    schedule, found = (
        SCHEDULES["flow"],
        ((SIGMA_CAP, 5.0, 1.0, 0.1, 0.0), (SIGMA_CAP, 6.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.0)),
    )
    np.testing.assert_array_equal(space("searched", schedule, 4, found), found[0])
    np.testing.assert_array_equal(space("gits", schedule, 8, found), found[1])
    near = space("searched", schedule, 3, found)
    assert near[0] == SIGMA_CAP
    assert near[1] == pytest.approx(5.0)
    doubled = space("searched", SD, 6, ((5.0, 1.0, 0.1, 0.0),))
    np.testing.assert_allclose(doubled[[0, 1, 2, 3, 4]], [5, 5**0.5, 1, 0.1**0.5, 0.1])
    for steps in (*range(1, 40), 999, 1000):
        for lists in (found, ((SIGMA_CAP, 0.0),), ((SIGMA_CAP, 0.0005, 0.0),), ((2.0, 0.0),)):
            sigmas = space("searched", schedule, steps, lists)
            assert sigmas.shape == (steps + 1,)
            assert (np.diff(sigmas) < 0).all()
    assert space("searched", schedule, 3, ((SIGMA_CAP, 0.0),))[1] == pytest.approx(FLOW_SIGMA_MAX)
    with pytest.raises(InputError, match="this model holds no searched spacing; `latentkit search-spacing` finds one"):
        space("searched", schedule, 4)


def test_lcm_takes_some_of_its_fifty() -> None:
    np.testing.assert_allclose(SD.to_timestep(space("lcm", SD, 4)[:-1]), [999, 759, 499, 259])
    np.testing.assert_allclose(SD.to_timestep(space("lcm:origin=100", SD, 3)[:-1]), [999, 669, 339])
    for steps in range(1, 8):
        falls("lcm", NoiseSchedule("cosine", steps=7), steps)


def test_the_end_is_zero_or_what_is_asked_for() -> None:
    assert space("leading:offset=1,end=sigma_min", SD, 20)[-1] == SD.sigma_min
    assert space("karras:low=0.5,high=5,end=0.1", SD, 7)[[0, -2, -1]] == pytest.approx([5, 0.5, 0.1])
    with pytest.raises(InputError, match=r"gives no 20 falling steps here .*then 0\.02917.*; change its options"):
        space("leading:end=sigma_min", SD, 20)  # it visits the first level, and would stay there
    assert space("karras:high=50", SCHEDULES["flow"], 3)[0] == pytest.approx(50)  # no cap before it


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("KL Optimal", "kl_optimal"), ("Simple", "simple"),
        ("align-your-steps", "ays_sd1"), ("Align Your Steps", "ays_sd1"), ("DDIM", "leading:offset=1"),
        ("ddim_uniform", "leading:offset=1"), ("Automatic", "normal"), ("Polyexponential", "exponential"),
        ("ddim_uniform:end=sigma_min", "leading:offset=1,end=sigma_min"),
    ],
)  # fmt: skip
def test_peers_names_mean_the_same(theirs: str, ours: str) -> None:
    np.testing.assert_allclose(space(theirs, SD, 17), space(ours, SD, 17), rtol=1e-12)


def test_every_alias_leads_somewhere() -> None:
    for alias in ALIASES:
        assert space(alias, SD, 3, ((9.0, 1.0, 0.1, 0.0),)).shape == (4,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("karas", "'karas' is unknown; did you mean 'karras'"),
        ("searchd", "did you mean 'searched'"),
        ("karras:roh=3", "'karras' has no option 'roh'; did you mean 'rho'"),
        ("uniform:offset=1", "'uniform' has no option 'offset'"),
        ("karras:rho", "options are written NAME:option=value,option=value"),
        ("karras:rho=fast", "option 'rho' of spacing 'karras' is 'fast'; it must be a number of at least 0"),
        ("karras:rho=-1", "must be a number of at least 0"),
        ("karras:rho=inf", "must be a number of at least 0"),
        ("karras:rho=0", "gives no 10 falling steps"),
        ("karras:low=9,high=3", "gives no 10 falling steps"),
        ("polyexponential:rho=1e9", "gives no 10 falling steps"),
    ],
)
def test_a_wrong_spacing_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        space(name, SD, 10)


def test_a_wrong_number_of_steps_is_refused() -> None:
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"{steps} sampler steps asked for; allowed are 1 to 1000"):
            space("uniform", SD, steps)
