"""What is compared with diffusers' schedulers: each one's options, predictions, spacings and endings."""

import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from schedulers import OURS, Case

from latentkit.diffusion.prediction import EDM, FLOW, PREDICTIONS, consistency
from latentkit.diffusion.schedule import NoiseSchedule

Config = dict[str, Any]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SMALL = {"num_train_timesteps": 200}
"""For peers that convert all their timesteps, one by one, when they are made."""

SPACED: list[Config] = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]
WHOLE: list[Config] = [{"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}]
"""Spacings that end at the first trained level."""
WARPED: list[Config] = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
EPS_V: list[Config] = [{"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}]
ALL: list[Config] = [*EPS_V, {"prediction_type": "sample"}]
ENDS: list[Config] = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}]
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
ALPHA_ENDS: list[Config] = [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]
FLOWS: list[Config] = [
    {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"} for shift in (1.0, 3.0)
]


def whole_third_order(scheduler: Any) -> None:
    """Give the peer's third order the integral's own weight of the second derivative.

    Its D2 is half of h^2 times that derivative, and is weighed as if it were all of it: twice is right. In the SDE
    form a sign is wrong besides. `test_the_peers_third_order_is_of_second_order` measures the first.
    """
    changes = {"D2 = (1.0 /": "D2 = (2.0 /"}
    if "EDM" not in type(scheduler).__name__:
        changes |= {"h) / (2.0 * h) ** 2 - 0.5)) * D2": "h) / (2.0 * h) ** 2 + 0.5)) * D2"}
    replaced(scheduler, "multistep_dpm_solver_third_order_update", changes)


def replaced(scheduler: Any, method: str, changes: dict[str, str]) -> None:
    """Change expressions in a method of the peer's."""
    cls = type(scheduler)
    source = textwrap.dedent(inspect.getsource(getattr(cls, method)))
    for old, new in changes.items():
        assert source.count(old) == 1, f"{method} has no single {old!r}"
        source = source.replace(old, new)
    scope = dict(vars(sys.modules[cls.__module__]))
    exec("from __future__ import annotations\n" + source, scope)
    setattr(scheduler, method, scope[method].__get__(scheduler))


def from_the_second(scheduler: Any) -> None:
    """Leave out the first point, an infinite sigma, which our rule keeps out of the history and the peer does not."""
    for name in ("betas", "alphas", "timesteps"):
        setattr(scheduler, name, getattr(scheduler, name)[1:])


def halved(scheduler: Any) -> None:
    """Put the peer's every second sigma, where it evaluates in between, into the middle of log sigma as ours does."""
    flow = scheduler.config.use_flow_sigmas
    sigmas = scheduler.sigmas / (1 - scheduler.sigmas) if flow else scheduler.sigmas
    sigmas[1:-1:2] = (sigmas[0:-2:2] * sigmas[2::2]).sqrt()
    scheduler.sigmas = sigmas / (1 + sigmas) if flow else sigmas


SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTISTEP_RULES: list[tuple[str, Config, Config, Any]] = [
    ("euler", {"solver_order": 1}, {}, None),
    ("dpm++2m", {"solver_order": 2}, {}, None),
    ("dpm++2m_sde_heun", {"solver_order": 2, "solver_type": "heun"}, {"eta": 0.0}, None),
    ("dpm++3m", {"solver_order": 3}, {}, whole_third_order),
    ("dpm++2m_sde", SDE | {"solver_order": 2}, {}, None),
    ("dpm++2m_sde_heun", SDE | {"solver_order": 2, "solver_type": "heun"}, {}, None),
    ("dpm++3m_sde", SDE | {"solver_order": 3}, {}, whole_third_order),
]
"""Our sampler, the peer's options, our options, and what is put right in the peer."""
OPPOSITE = EDM._replace(c_out=lambda sigma: -EDM.c_out(sigma))
EDM_PREDICTIONS = {"epsilon": EDM, "v_prediction": OPPOSITE}
EDM_SPACED: list[Config] = [{"sigma_schedule": "karras"}, {"sigma_schedule": "exponential"}]
EDM_ENDS: list[Config] = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
FLOW_LADDERS: list[Config] = [
    {},
    {"shift": 3.0},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]


def crossed(fixed: Config, *axes: list[Config]) -> Iterator[Config]:
    """Every choice of one config per axis, over the fixed part."""
    for chosen in itertools.product(*axes):
        merged = dict(fixed)
        for part in chosen:
            merged |= part
        yield merged


def one_step_peers() -> Iterator[Case]:
    """The k-diffusion family: no memory beyond the interval."""
    ends = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
    for config in (*crossed(SD, ALL, [*SPACED, *WARPED], ends), ZERO_SNR):
        yield Case("EulerDiscreteScheduler", "euler", config)
    yield Case("EulerDiscreteScheduler", "euler", SD | {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0})
    for config in (*crossed(SD, EPS_V, SPACED), ZERO_SNR):
        yield Case("EulerAncestralDiscreteScheduler", "euler_ancestral", config)
    for config in crossed(SD | SMALL, ALL, [*SPACED, *WARPED]):
        yield Case("HeunDiscreteScheduler", "heun", config)
    for config in crossed(SD | SMALL, EPS_V, [*SPACED, *WARPED]):
        yield Case("KDPM2DiscreteScheduler", "dpm2", config)
        yield Case("KDPM2AncestralDiscreteScheduler", "dpm2_ancestral", config)
        yield Case("DPMSolverSDEScheduler", "dpm++sde", config)


def trained_step_peers() -> Iterator[Case]:
    """DDPM, DDIM: rules on trained indices. Their `linspace` is not a path: see `test_where_the_peer_is_wrong`."""
    plain = SD | {"clip_sample": False}
    for config in crossed(plain, ALL, SPACED):
        yield Case("DDPMScheduler", "ddpm", config)
    for variance in ("fixed_small_log", "fixed_large"):
        options = {"variance": "large"} if variance == "fixed_large" else {}
        yield Case("DDPMScheduler", "ddpm", plain | {"variance_type": variance}, options)
    for config in crossed(plain | {"variance_type": "learned_range"}, ALL, WHOLE):
        yield Case("DDPMScheduler", "ddpm", config, variance=lambda scaled: torch.sin(3 * scaled))
    yield Case("DDPMScheduler", "ddpm", plain | ZERO_SNR, tolerance=1e-5)
    for eta in (0.0, 0.4, 1.0):
        for config in crossed(plain, ALL, SPACED[1:], ALPHA_ENDS):
            yield Case("DDIMScheduler", "ddim", config, {"eta": eta}, {"eta": eta}, 10)
        yield Case("DDIMScheduler", "ddim", plain | ZERO_SNR, {"eta": eta}, {"eta": eta}, 10, 1e-5)


def multistep_peers() -> Iterator[Case]:
    """Rules with a memory, on the variance-preserving side and on flows."""
    spaced = [*SPACED, *WARPED, {"use_lu_lambdas": True}]
    for ours, rule, options, refine in MULTISTEP_RULES:
        for config in (*crossed(SD | rule, ALL, spaced, ENDS), *crossed(rule, FLOWS, ENDS), rule | ZERO_SNR):
            yield Case("DPMSolverMultistepScheduler", ours, config, options, refine=refine)
        for config in (*crossed(SD | rule, EPS_V, SPACED[:1], ENDS), SD | rule | {"euler_at_final": True}):
            yield Case("DPMSolverMultistepScheduler", ours, config, options, steps=18, refine=refine)
        if ours == "dpm++3m_sde":  # where the peer forgets the noise
            continue
        for kind, prediction in EDM_PREDICTIONS.items():
            for config in crossed(rule | {"prediction_type": kind}, EDM_SPACED, [*ENDS, {"euler_at_final": True}]):
                case = Case("EDMDPMSolverMultistepScheduler", ours, config, options, refine=refine)
                yield case._replace(prediction=prediction)
    for order in (2, 3):
        for kind in ("bh1", "bh2"):
            rule = {"solver_order": order, "solver_type": kind}
            for config in (*crossed(SD, ALL, [*SPACED, *WARPED]), *crossed({}, FLOWS), ZERO_SNR):
                yield Case("UniPCMultistepScheduler", "unipc", config | rule, {"order": order, "variant": kind})
        for config in (*crossed(SD, ALL, [*SPACED, *WARPED]), *crossed({}, FLOWS)):
            rule = {"solver_order": order, "lower_order_final": False}
            yield Case("DEISMultistepScheduler", "deis", config | rule, {"order": order})
        yield Case("DEISMultistepScheduler", "deis", SD | {"solver_order": order}, {"order": order}, steps=16)
    for config in crossed(SD | SMALL, ALL, [*SPACED, *WARPED]):
        yield Case("LMSDiscreteScheduler", "lms", config)
    for config in crossed(SD | {"skip_prk_steps": True}, SPACED[1:], ALPHA_ENDS):
        yield Case("PNDMScheduler", "plms", config, steps=10)
    yield Case("IPNDMScheduler", "ipndm", {}, refine=from_the_second, prediction=PREDICTIONS["v"])
    for config in (*crossed(SD, ALL, [*WARPED, {}]), *crossed({}, FLOWS)):
        yield Case("DPMSolverSinglestepScheduler", "dpm++2s_ancestral", config, {"eta": 0.0}, refine=halved, steps=11)


def other_peers() -> Iterator[Case]:
    """Consistency models, EDM's own scalings, flows."""
    for inner in ("epsilon", "v_prediction"):
        prediction = consistency(PREDICTIONS[OURS[inner]], NoiseSchedule("scaled_linear"))
        for steps in (1, 4, 8):
            yield Case("LCMScheduler", "lcm", SD | {"prediction_type": inner}, steps=steps, prediction=prediction)
    for kind, prediction in EDM_PREDICTIONS.items():
        for config in crossed({"prediction_type": kind}, EDM_SPACED, EDM_ENDS):
            yield Case("EDMEulerScheduler", "euler", config, prediction=prediction)
    for config in FLOW_LADDERS:
        yield Case("FlowMatchEulerDiscreteScheduler", "euler", config, prediction=FLOW, tolerance=1e-5)
    config = {"stochastic_sampling": True}
    yield Case("FlowMatchEulerDiscreteScheduler", "lcm", config, prediction=FLOW, tolerance=1e-5)


def cases() -> list[Case]:
    """Every case."""
    return [*one_step_peers(), *trained_step_peers(), *multistep_peers(), *other_peers()]


def label(case: Case) -> str:
    told = {key: value for key, value in (case.config | case.options).items() if key not in SD}
    return f"{case.peer.removesuffix('Scheduler')}-{case.ours}-" + ",".join(f"{k}={v}" for k, v in told.items())
