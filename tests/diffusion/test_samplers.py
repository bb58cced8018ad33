"""The loop that runs every sampler, and the table: names, options, caps, history, noise, what may be written into."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from ideal import gaussian, gaussian_path, mixture
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import (
    Denoised,
    Noise,
    Point,
    Step,
    Walk,
    follow,
    invert,
    sample,
    split_name,
    table,
)
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError

ENTRIES = table()
NAMES = pytest.mark.parametrize("name", ENTRIES)
SHAPE = (2, 3, 1)
DATA = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [0.0, -2.0]], dtype=torch.float64)[:, :, None, None]
DATUM = torch.tensor([0.3, -0.8], dtype=torch.float64)[None, :, None, None].expand(1, *SHAPE).contiguous()


def fall(steps: int, end: float = 0.05) -> np.ndarray:
    """From 9, even in log sigma."""
    return np.geomspace(9.0, end, steps + 1)


def start(*seeds: int) -> tuple[PictureNoise, Tensor]:
    """Noise, and a latent of float64 at sigma 9."""
    noise = PictureNoise(seeds, SHAPE)
    return noise, 9.0 * noise.initial().double()


def run(name: str, *given: Any, **options: Any) -> list[Step]:
    """Every step, its tensors kept."""
    return [step._replace(x=step.x.clone(), x0=step.x0.clone()) for step in sample(name, *given, **options)]


def bent(x: Tensor, sigma: float) -> Denoised:
    """A denoiser without a closed form, one number at a time."""
    return Denoised(torch.tanh(x / (1 + sigma)) + 0.1 * torch.sin(x))


@NAMES
def test_the_table_says_what_a_person_chooses_by(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.source
    assert entry.good_for
    assert 0 <= entry.order <= 4
    assert name == name.casefold()
    parameters = inspect.signature(entry.run).parameters
    for option, allowed in entry.options.items():
        default = parameters[option].default
        assert default in allowed if isinstance(allowed[0], str) else allowed[0] <= default <= allowed[1]


def test_no_two_samplers_share_a_peers_name() -> None:
    every = [name.casefold() for key, entry in ENTRIES.items() for name in (key, *entry.names)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("euler a", ("euler_ancestral", None)),
        ("DPM++ 2M", ("dpm++2m", None)),
        ("dpm++ 2m karras", ("dpm++2m", "karras")),
        ("DPM++ 2M SDE Heun Exponential", ("dpm++2m_sde_heun", "exponential")),
        ("Euler SGM Uniform", ("euler", "sgm_uniform")),
        ("LMS Karras", ("lms", "karras")),
        ("dpmpp_3m_sde_gpu", ("dpm++3m_sde", None)),
        ("uni_pc_bh2", ("unipc", None)),
        ("KDPM2AncestralDiscreteScheduler", ("dpm2_ancestral", None)),
        (" PLMS ", ("plms", None)),
    ],
)
def test_peers_names_are_understood(name: str, ours: tuple[str, str | None]) -> None:
    assert split_name(name) == ours


@pytest.mark.parametrize("name", ["eular", "euler fast", "karras", ""])
def test_an_unknown_sampler_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"is unknown; .*allowed: .*dpm\+\+2m") as error:
        split_name(name)
    assert error.value.exit_code == 2


def test_the_nearest_names_are_suggested() -> None:
    with pytest.raises(InputError, match="'eular' is unknown; did you mean 'euler"):
        sample("eular", bent, torch.zeros(1, 1, 1, 1), fall(3), None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {"eta": 1.0}, "'euler' takes no 'eta'; it takes: no options"),
        ("unipc", {"eta": 1.0}, "'unipc' takes no 'eta'; it takes: order, variant"),
        ("ddim", {"eta": 1.1}, "eta 1.1 is not allowed for 'ddim'; it takes 0.0 to 1.0"),
        ("ddim", {"eta": float("nan")}, "eta nan is not allowed"),
        ("ddim", {"eta": "much"}, "eta 'much' is not allowed"),
        ("unipc", {"order": 2.0}, "order 2.0 is not allowed for 'unipc'; it takes whole numbers 1 to 3"),
        ("unipc", {"variant": "bh3"}, "variant 'bh3' is not allowed for 'unipc'; it takes 'bh1' or 'bh2'"),
    ],
)
def test_options_are_checked_before_anything_runs(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        sample(name, bent, torch.zeros(1, 1, 1, 1), fall(3), None, **options)
    assert error.value.exit_code == 2


@NAMES
def test_evaluations_are_counted_and_as_stated(name: str) -> None:
    calls = []

    def counted(x: Tensor, sigma: float) -> Denoised:
        calls.append(sigma)
        return bent(x, sigma)

    noise, x = start(1)
    seen = [(step.evaluations, len(calls)) for step in sample(name, counted, x, fall(7), noise)]
    assert all(stated == called for stated, called in seen)
    if name == "dpm_adaptive":
        assert seen[-1][0] % 3 == 0
    else:
        extra = int(name == "plms")
        assert [stated for stated, _ in seen] == [extra + ENTRIES[name].evaluations * i for i in range(1, 8)]


@NAMES
def test_one_datum_is_reached(name: str) -> None:
    """Exactly, but by the rules that integrate the noise down to 0."""
    noise, x = start(5)
    last = run(name, mixture(DATUM, 0.0), x, np.array([9.0, 3.0, 1.0, 0.2, 0.0]), noise)[-1]
    assert last.sigma == 0
    torch.testing.assert_close(last.x, DATUM, rtol=0, atol=1e-14 if name in ("lms", "plms", "ipndm") else 0)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.stochastic])
def test_a_finite_data_set_is_reached(name: str) -> None:
    noise = PictureNoise([1, 2, 3, 4, 5, 6], (2, 1, 1))
    sigmas = np.append(np.geomspace(20.0, 0.02, 60), 0.0)
    last = run(name, mixture(DATA, 0.0), 20 * noise.initial().double(), sigmas, None)[-1].x
    assert (last[:, None] - DATA[None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-6


@NAMES
def test_from_a_cap_the_first_interval_is_one_first_order_step_without_memory(name: str) -> None:
    noise = PictureNoise([1, 2], SHAPE)
    x, sigmas = noise.initial() * SIGMA_CAP, np.array([SIGMA_CAP, 9.0, 4.0])
    first, second = run(name, gaussian(0.3, 0.7), x, sigmas, noise)
    peer = "euler_ancestral" if ENTRIES[name].stochastic else "euler"
    expected, _ = run(peer, gaussian(0.3, 0.7), x, sigmas, noise)
    assert torch.equal(first.x, expected.x)
    if not ENTRIES[name].stochastic:
        assert torch.equal(second.x, run(name, gaussian(0.3, 0.7), first.x, sigmas[1:], noise)[0].x)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "eta" in entry.options])
def test_eta_is_that_of_the_step_from_a_cap_too(name: str) -> None:
    noise = PictureNoise([1], SHAPE)
    x, sigmas = noise.initial() * SIGMA_CAP, np.array([SIGMA_CAP, 9.0])
    (quiet,) = run(name, gaussian(0.3, 0.7), x, sigmas, noise, eta=0.0)
    assert torch.equal(quiet.x, run("euler", gaussian(0.3, 0.7), x, sigmas, noise)[0].x)


@pytest.mark.parametrize("name", ["lms", "ipndm", "plms", "deis", "dpm++2m", "dpm++3m", "unipc"])
def test_a_run_goes_on_from_its_own_history(name: str) -> None:
    noise, x = start(1, 2)
    sigmas, points = fall(9), []

    def kept(x: Tensor, sigma: float) -> Denoised:
        answer = bent(x, sigma)
        points.append(Point(x.clone(), answer.x0, sigma))
        return answer

    whole = run(name, kept, x, sigmas, noise)
    past = [point for point in points[:1] + points[1 + int(name == "plms") :] if point.sigma > sigmas[5]]
    later = run(name, bent, whole[4].x, sigmas[5:], noise, past)
    assert torch.equal(later[-1].x, whole[-1].x)
    forgotten = run(name, bent, whole[4].x, sigmas[5:], noise)
    assert not torch.equal(forgotten[-1].x, whole[-1].x)
    assert later[0].evaluations == 1


@NAMES
def test_a_batch_equals_its_singles_bit_for_bit(name: str) -> None:
    if name == "dpm_adaptive":
        pytest.skip("the worst picture of a batch sets the step")
    seeds, sigmas = (3, 1, 4, 1), np.append(fall(8), 0.0)
    options = {"eta": 1.0} if "eta" in ENTRIES[name].options else {}
    noise, x = start(*seeds)
    together = run(name, bent, x.float(), sigmas, noise, **options)
    for row, seed in enumerate(seeds):
        alone, x = start(seed)
        for a, b in zip(together, run(name, bent, x.float(), sigmas, alone, **options), strict=True):
            assert torch.equal(a.x[row : row + 1], b.x)


@NAMES
def test_two_runs_of_one_noise_do_not_meet(name: str) -> None:
    noise, x = start(7)
    sigmas = np.append(fall(6), 0.0)
    expected = [step.x for step in run(name, bent, x, sigmas, noise)]
    for one, two, exact in zip(
        sample(name, bent, x, sigmas, noise), sample(name, bent, 2 * x, sigmas, noise), expected, strict=True
    ):
        assert torch.equal(one.x, exact)
        assert not torch.equal(two.x, exact) or one.sigma == 0


def test_a_run_can_be_left_between_steps() -> None:
    calls = []

    def watched(x: Tensor, sigma: float) -> Denoised:
        calls.append(sigma)
        return Denoised(x)

    next(sample("euler", watched, torch.zeros(1, 1, 1, 1), np.array([3.0, 2.0, 1.0]), None))
    assert calls == [3.0]


@NAMES
def test_latents_are_written_into_again(name: str) -> None:
    """However many the steps, the results lie in as many places as the memory needs."""
    noise, x = start(1)
    places = {step.x.data_ptr() for step in sample(name, bent, x, fall(30), noise)}
    assert len(places) <= (31 if name == "dpm_adaptive" else 7)


@NAMES
def test_nothing_given_is_written_into(name: str) -> None:
    noise, x = start(1)
    given: list[tuple[Tensor, Tensor]] = [(x, x.clone())]

    def watched(x: Tensor, sigma: float) -> Denoised:
        answer = bent(x, sigma)
        given.append((answer.x0, answer.x0.clone()))
        return answer

    run(name, watched, x, np.append(fall(8), 0.0), noise)
    assert all(torch.equal(now, before) for now, before in given)


@NAMES
def test_a_denoiser_that_tracks_gradients_or_answers_in_another_type_is_welcome(name: str) -> None:
    weight = torch.ones(1, dtype=torch.float32, requires_grad=True)
    noise, x = start(1)

    def learning(x: Tensor, sigma: float) -> Denoised:
        return Denoised(weight * bent(x, sigma).x0.float())

    for step in sample(name, learning, x, np.append(fall(5), 0.0), noise):
        assert step.x.dtype == step.x0.dtype == torch.float64
        assert not step.x.requires_grad


@NAMES
def test_an_anchor_at_x0_changes_nothing_and_one_beside_it_does(name: str) -> None:
    noise, x = start(1, 2)
    sigmas = np.append(fall(6), 0.0)

    def anchored(away: float) -> list[Step]:
        def denoise(x: Tensor, sigma: float) -> Denoised:
            x0 = bent(x, sigma).x0
            return Denoised(x0, anchor=x0 + away)

        return run(name, denoise, x, sigmas, noise)

    plain = run(name, bent, x, sigmas, noise)
    torch.testing.assert_close(anchored(0.0)[-1].x, plain[-1].x, rtol=1e-12, atol=1e-12)
    if name not in ("lcm", "langevin", "predictor_corrector"):
        assert (anchored(0.5)[0].x - plain[0].x).abs().max() > 1e-3


def test_noise_is_taken_relative_to_the_anchor() -> None:
    """CFG++'s step (Chung et al. 2024, algorithm 2): x0 + s'/s (x - anchor)."""
    _, x = start(1)
    x0, anchor = torch.full_like(x, 0.4), torch.full_like(x, -0.2)
    (step,) = run("euler", lambda x, sigma: Denoised(x0, anchor), x, np.array([9.0, 4.0]), None)
    torch.testing.assert_close(step.x, x0 + 4 / 9 * (x - anchor))


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++3m", "unipc"])
def test_rules_on_x0_step_from_the_anchor_as_euler_where_x0_stays(name: str) -> None:
    _, x = start(1)
    answer = Denoised(torch.full_like(x, 0.4), torch.full_like(x, -0.2))
    ends = [run(each, lambda x, sigma: answer, x, fall(6), None)[-1].x for each in (name, "euler")]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_spare_latent_is_none_that_is_needed() -> None:
    walk, x = Walk(bent, fall(3), None), torch.zeros(1, 1, 1, 1)
    walk.enter(0, 9.0, 4.0, x)
    first = walk.spare()
    assert walk.spare() is first
    walk.remember(first, 2)
    walk.held = second = walk.spare()
    third = walk.spare()
    assert third is not second
    assert walk.spare(third) is not third
    walk.enter(1, 4.0, 1.0, third)
    assert all(walk.spare() is not taken for taken in (x, first, second, third))
    walk.forget(0)
    assert walk.spare() is first


@pytest.mark.parametrize("name", ENTRIES)
def test_a_denoiser_may_return_its_input(name: str) -> None:
    noise, x = start(7)
    same, copied = (run(name, denoise, x, fall(6), noise) for denoise in (
        lambda x, sigma: Denoised(x), lambda x, sigma: Denoised(x.clone())))  # fmt: skip
    for a, b in zip(same, copied, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x0, b.x0)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.stochastic])
def test_a_flow_from_its_cap_arrives_in_float32(name: str) -> None:
    """The exact flow takes unit noise at infinity to mean + std * noise."""
    noise = PictureNoise([1, 2, 3], SHAPE)
    sigmas = space("uniform", NoiseSchedule("flow"), 100)
    last = run(name, gaussian(0.3, 0.5), noise.initial() * float(sigmas[0]), sigmas, None)[-1]
    assert last.x.dtype == torch.float32
    torch.testing.assert_close(last.x, 0.3 + 0.5 * noise.initial(), atol=0.02, rtol=0)


def test_inversion_goes_up_the_flow_and_down_again() -> None:
    _, x = start(1, 2)
    up = np.geomspace(0.02, 9.0, 401)
    x = 0.3 + 0.05 * x
    *_, top = invert(gaussian(0.3, 0.7), x, up)
    assert top.sigma == 9.0
    torch.testing.assert_close(top.x, gaussian_path(x, 0.3, 0.7, 0.02, 9.0), rtol=0.02, atol=0.02)
    *_, back = follow(ENTRIES["euler"], gaussian(0.3, 0.7), top.x.clone(), up[::-1].copy(), None)
    torch.testing.assert_close(back.x, x, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("sigmas", [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
def test_inversion_refuses_what_does_not_rise_from_above_zero(sigmas: list[float]) -> None:
    with pytest.raises(InputError, match="rising sigmas that begin above 0"):
        invert(bent, torch.zeros(1, 1, 1, 1), np.array(sigmas))


def test_the_pictures_noise_is_what_samplers_ask_for() -> None:
    assert isinstance(PictureNoise([1], SHAPE), Noise)
