"""Spacings and schedules against diffusers' schedulers: every way that they lay sigmas, at many step counts.

Their sigmas are float32; before, their alpha-bars are replaced by the same numbers in float64, so that what is compared
is the spacing. ComfyUI's and A1111's own are written out from their definitions.
"""

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.diffusion.spacing import beta_quantile, space

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]
SD = NoiseSchedule("scaled_linear")
COSINE = NoiseSchedule("cosine")
BETAS = {
    SD: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    COSINE: {"beta_schedule": "squaredcos_cap_v2"},
}
COUNTS = (1, 2, 7, 20, 27, 50, 111)
TOLERANCE = 1e-5
"""Between two levels their timesteps are float32; on levels all agree to 1e-6."""

SINGLE = ("Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral")
"""Schedulers that lay as many timesteps as there are steps, not rounded."""
MULTISTEP = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver")
"""Schedulers that lay one more, rounded, and leave the last out."""
INDEXED = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "CogVideoXDDIM", "CogVideoXDPM", "PNDM")
"""Schedulers that know timesteps alone, whole ones."""
DISTILLED = ("LCM", "TCD")
"""Schedulers that take some of 50 timesteps, whatever spacing they are told."""
FAMILIES = {
    SINGLE: {"leading": "leading:offset=1", "trailing": "trailing", "linspace": "linspace"},
    MULTISTEP: {
        "leading": "leading:offset=1,drop=1", "trailing": "trailing", "linspace": "linspace:drop=1,whole=1",
    },
    INDEXED: {"leading": "leading:offset=1", "trailing": "trailing", "linspace": "linspace:whole=1"},
    DISTILLED: dict.fromkeys(("leading", "trailing", "linspace"), "lcm"),
}  # fmt: skip
CLASSES = [(name, family) for family in FAMILIES for name in family]
OVER_SIGMAS = (*SINGLE[:1], *SINGLE[2:], *MULTISTEP, "DPMSolverSinglestep")
"""Those that lay Karras', exponential or beta sigmas too."""
UNCOVERED = {
    "LMSDiscrete": "needs scipy, which is not installed; as Euler by its code",
    "DDIMInverse": "climbs",
    "DPMSolverMultistepInverse": "climbs",
    "FlowMatchEulerDiscrete": "its karras, exponential and beta are laid over t, as if t were sigma; the rest is below",
    "FlowMatchLCM": "as FlowMatchEulerDiscrete",
}
"""Schedulers with such options that are not compared with, and why."""


def peer(name: str, schedule: NoiseSchedule, **options: Any) -> Any:
    """A scheduler with the alpha-bars of `schedule` in float64."""
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, f"{name}Scheduler", None) or getattr(diffusers, f"{name}DiscreteScheduler")
    if name == "PNDM":
        options["skip_prk_steps"] = True
    scheduler = kind(**BETAS[schedule], **options)
    scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + schedule.sigmas**2))
    return scheduler


def sigmas(scheduler: Any, schedule: NoiseSchedule, ours: np.ndarray) -> np.ndarray:
    """The sigmas that it visits, its end left out; each once."""
    scheduler.set_timesteps(len(ours) - 1)
    if not hasattr(scheduler, "sigmas"):
        return schedule.sigmas[np.unique(np.asarray(scheduler.timesteps))[::-1]]
    values = np.asarray(scheduler.sigmas, np.float64)[:-1]
    values = values[np.append(True, np.diff(values) != 0)]
    if "KDPM2" in type(scheduler).__name__:  # its midpoints stand between
        values = values[np.isclose(values[:, None], ours[:-1], rtol=TOLERANCE).any(1)]
    return values


def agree(theirs: np.ndarray, ours: np.ndarray) -> None:
    assert theirs.shape == ours[:-1].shape
    np.testing.assert_allclose(ours[:-1], theirs, rtol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "family"), CLASSES, ids=[name for name, _ in CLASSES])
@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.usefixtures("unchecked")
def test_timestep_spacings(name: str, family: tuple[str, ...], spacing: str) -> None:
    for schedule in (SD, COSINE):
        scheduler = peer(name, schedule, timestep_spacing=spacing, steps_offset=1)
        for steps in (n for n in COUNTS if not (name in DISTILLED and n > 50)):
            ours = space(FAMILIES[family][spacing], schedule, steps)
            agree(sigmas(scheduler, schedule, ours), ours)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("option", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", OVER_SIGMAS)
@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.usefixtures("unchecked")
def test_sigma_spacings(name: str, option: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The single-step ones lay them from the first to the last sigma of their timestep spacing."""
    options: dict[str, Any] = {f"use_{option}_sigmas": True}
    if name != "DPMSolverSinglestep":
        options["timestep_spacing"] = spacing
    module = importlib.import_module(type(peer(name, SD)).__module__)
    beta = SimpleNamespace(ppf=lambda p, a, b: beta_quantile(np.asarray(p), a))
    monkeypatch.setattr(module, "scipy", SimpleNamespace(stats=SimpleNamespace(beta=beta)), raising=False)
    monkeypatch.setattr(module, "is_scipy_available", lambda: True)
    ours_named = {"beta": "beta_sigma"}.get(option, option)
    scheduler = peer(name, SD, **options)
    for steps in COUNTS[1:-1]:
        ends = ""
        if name in SINGLE:
            first, *_, last = space(FAMILIES[SINGLE][spacing].partition(":")[0], SD, steps)[:-1]
            ends = f":high={first:.17g},low={last:.17g}"
        ours = space(ours_named + ends, SD, steps)
        agree(sigmas(scheduler, SD, ours), ours)


def test_lus_lambdas_are_the_exponential_spacing() -> None:
    scheduler = peer("DPMSolverMultistep", SD, use_lu_lambdas=True)
    for steps in COUNTS[1:]:
        ours = space("exponential", SD, steps)
        agree(sigmas(scheduler, SD, ours), ours)


@pytest.mark.parametrize(
    ("name", "spacing"), [("Euler", "leading:offset=1"), ("DPMSolverMultistep", "leading:offset=1,drop=1")]
)
def test_the_end_at_sigma_min(name: str, spacing: str) -> None:
    scheduler = peer(name, SD, timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min")
    ours = space(f"{spacing},end=sigma_min", SD, 20)
    agree(sigmas(scheduler, SD, ours), ours)
    assert float(scheduler.sigmas[-1]) == pytest.approx(ours[-1], rel=TOLERANCE)


@pytest.mark.parametrize("name", ["DDIM", "PNDM"])
def test_the_end_at_the_first_alpha_bar(name: str) -> None:
    """set_alpha_to_one false, as Stable Diffusion's scheduler files have it."""
    scheduler = peer(name, SD, steps_offset=1, set_alpha_to_one=False)
    ours = space("ddim_uniform:end=sigma_min", SD, 20)
    assert 1 / (1 + ours[-1] ** 2) == pytest.approx(float(scheduler.final_alpha_cumprod), rel=1e-6)


@pytest.mark.parametrize("name", ["Euler", "DDIM", "DPMSolverMultistep"])
def test_zero_terminal_snr_with_trailing_timesteps(name: str) -> None:
    schedule = NoiseSchedule("scaled_linear", zero_terminal=True)
    BETAS[schedule] = BETAS[SD]
    scheduler = peer(name, schedule, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    for steps in (n for n in COUNTS):
        ours = space("trailing", schedule, steps)
        assert ours[0] == SIGMA_CAP
        agree(sigmas(scheduler, schedule, ours), ours)


@pytest.mark.parametrize("steps", COUNTS[1:])
def test_flow(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    for shift in (1.0, 3.0):
        schedule = NoiseSchedule("flow", shift=shift)
        given = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        given.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as the pipelines of Flux and its kin give them
        np.testing.assert_allclose(
            schedule.to_timestep(space("uniform", schedule, steps)[:-1]), given.timesteps.numpy(), rtol=TOLERANCE
        )
    own = diffusers.FlowMatchEulerDiscreteScheduler()
    own.set_timesteps(steps)
    flow = NoiseSchedule("flow")
    np.testing.assert_allclose(
        flow.to_timestep(space("linspace", flow, steps)[:-1]), own.timesteps.numpy(), rtol=TOLERANCE
    )
    twice = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    twice.set_timesteps(steps)  # left to itself it shifts the last t and then all of them, the last one a second time
    once = schedule.to_timestep(space("linspace", schedule, steps)[:-1]) / 1000
    assert float(twice.sigmas[-2]) == pytest.approx(3 * once[-1] / (1 + 2 * once[-1]), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm(name: str, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = NoiseSchedule("edm")
    scheduler = getattr(diffusers, f"{name}Scheduler")(sigma_min=0.002, sigma_max=80.0, sigma_schedule=spacing)
    for steps in COUNTS[1:]:
        scheduler.set_timesteps(steps)
        ours = space(spacing, schedule, steps)
        agree(scheduler.sigmas[:-1].double().numpy(), ours)
        np.testing.assert_allclose(
            schedule.to_timestep(ours[:-1]), scheduler.timesteps.double().numpy(), rtol=TOLERANCE, atol=1e-6
        )


def test_every_scheduler_with_a_spacing_is_compared_with_or_named() -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    found = set()
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        if options & set(inspect.signature(getattr(diffusers, name).__init__).parameters):
            found.add(name.removesuffix("Scheduler"))
    covered = {name for name, _ in CLASSES} | set(OVER_SIGMAS)
    left = {name for name in found if name not in covered and name.removesuffix("Discrete") not in covered}
    for name in sorted(left):
        print(f"not compared: {name}: {UNCOVERED.get(name)}")
    assert left | {"LMSDiscrete"} == set(UNCOVERED)


def test_comfyuis_simple_normal_sgm_uniform_and_ddim_uniform() -> None:
    table, last = SD.sigmas, 999.0
    for steps in (1, 5, 8, 20, 25, 40, 50):
        simple = [table[-(1 + int(k * (1000 / steps)))] for k in range(steps)]
        np.testing.assert_allclose(space("simple", SD, steps)[:-1], simple)
        np.testing.assert_allclose(space("normal", SD, steps)[:-1], SD.to_sigma(np.linspace(last, 0, steps)))
        sgm = SD.to_sigma(np.linspace(last, 0, steps + 1)[:-1])
        np.testing.assert_allclose(space("sgm_uniform", SD, steps)[:-1], sgm)
        ddim = table[1 :: max(1000 // steps, 1)][::-1]
        assert len(ddim) == steps  # for other counts it takes more steps than it is asked for
        np.testing.assert_allclose(space("ddim_uniform", SD, steps)[:-1], ddim)
        quantiles = np.rint(beta_quantile(1 - np.linspace(0, 1, steps, endpoint=False)) * 999).astype(int)
        np.testing.assert_allclose(space("beta", SD, steps)[:-1], table[quantiles])
