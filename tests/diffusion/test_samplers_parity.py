"""Samplers against diffusers' schedulers: whole trajectories in float64, for every spacing, prediction and ending.

`schedulers.Case` runs both from one start along the peer's own ladder. Relative differences stay below 1e-9 where the
mathematics is the same, and below 1e-5 where an infinite sigma has a finite stand-in. What of the peer is not compared
is listed with its reason, and a class, option or value that is new in the peer fails until it is compared or listed.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from cases import SD, cases, label
from schedulers import NOISE, PEERS, START, Case, Recorded, network, scheduler_class, widened

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import invert, sample

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", PEERS)
def test_trajectories_are_those_of(name: str) -> None:
    found = {label(case): case.run().difference() / case.tolerance for case in cases() if case.peer == name}
    assert found
    assert not {key: value for key, value in found.items() if not value < 1}


ELSEWHERE = {
    "CosineDPMSolverMultistepScheduler": "EDMDPMSolverMultistep's SDE form over torchsde's noise, for one audio model",
    "DDIMParallelScheduler": "DDIM's rule, for several timesteps at once",
    "DDPMParallelScheduler": "DDPM's rule, for several timesteps at once",
    "UnCLIPScheduler": "DDPM's rule with a learned variance",
    "DDPMWuerstchenScheduler": "DDPM's rule on a schedule of one model",
    "FlowMatchLCMScheduler": "FlowMatchEuler's stochastic form, with enlargement between steps",
    "FlowMatchHeunDiscreteScheduler": "Heun in the flow's time; ours is Heun in sigma on every schedule",
    "DPMSolverMultistepInverseScheduler": "inversion by a rule with memory: ours inverts by Euler alone",
    "SASolverScheduler": "a sampler that is not ours",
    "TCDScheduler": "a sampler that is not ours",
    "CMStochasticIterativeScheduler": "LCM's rule down to a smallest sigma, for consistency models of pixels",
    "SCMScheduler": "LCM's rule on a trigonometric path, for one model",
    "RePaintScheduler": "an application (inpainting), not a sampler",
    "CogVideoXDDIMScheduler": "DDIM's rule for one video model",
    "CogVideoXDPMScheduler": "a rule of one video model",
    "LTXEulerAncestralRFScheduler": "a rule of one video model",
    "HeliosScheduler": "a rule of one video model",
    "HeliosDMDScheduler": "a rule of one video model",
    "PiflowScheduler": "a network that draws whole paths",
    "FlowMapEulerDiscreteScheduler": "a network that maps between two times",
    "MiniMaxH3Scheduler": "a rule of one model",
    "RFD4ProteinaScheduler": "a rule of one model of proteins",
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "VQDiffusionScheduler": "discrete tokens",
}
"""Classes of the peer's that no sampler of ours is compared with, and why."""
TESTED_BELOW = ("DDIMInverseScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler")

SPACING = "which sigmas are visited: test_spacing_parity.py"
WRAPPER = "changes x0: with us a wrapper of the denoiser, test_guidance.py"
UNUSED = "the peer takes it and does not read it"
REASONS: dict[str, str] = {
    **dict.fromkeys(("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"), SPACING),
    **dict.fromkeys(("rho", "sigma_data", "sigma_min", "sigma_max", "lambda_min_clipped", "timestep_type"), SPACING),
    **dict.fromkeys(("use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"), SPACING),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len", "original_inference_steps"), SPACING),
    **dict.fromkeys(("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"), WRAPPER),
    "sample_max_value": WRAPPER,
    "use_beta_sigmas": f"needs scipy; {SPACING}",
    "interpolation_type": "log_linear lays one sigma more than there are timesteps, so that the peer never arrives",
    "noise_sampler_seed": "both sides get the same noise",
    "invert_sigmas": "for models whose time runs the other way",
    "disable_corrector": "leaves UniPC's corrector out of chosen steps: not ours",
    "solver_p": "another scheduler as UniPC's predictor: not ours",
    "predict_x0": "False is UniPC on the noise instead of x0: not ours",
    "timestep_scaling": "a constant of LCM's boundary: test_prediction.py",
    "skip_prk_steps": "False begins by Runge-Kutta over halves of whole timesteps: not ours",
}
"""Options of which not every value is compared, and why."""
REASONS_OF: dict[tuple[str, str], str] = {
    **{("LCMScheduler", option): UNUSED for option in ("timestep_spacing", "steps_offset", "set_alpha_to_one")},
    ("LCMScheduler", "rescale_betas_zero_snr"): SPACING,
    ("DPMSolverSinglestepScheduler", "solver_order"): "3 has no sampler of ours",
    ("DPMSolverSinglestepScheduler", "solver_type"): "heun takes the slope's whole integral: not ours in one step",
    ("DPMSolverSinglestepScheduler", "final_sigmas_type"): "sigma_min lays no whole number of pairs",
    ("DPMSolverSinglestepScheduler", "lower_order_final"): "the peer itself makes it True where sigmas end at 0",
    ("UniPCMultistepScheduler", "final_sigmas_type"): "sigma_min ends by evaluating once more for the corrector",
    ("UniPCMultistepScheduler", "lower_order_final"): "False divides by 0 in the step to 0",
    ("UniPCMultistepScheduler", "shift_terminal"): SPACING,
}
VALUES: dict[tuple[str, str, Any], str] = {
    ("", "algorithm_type", "dpmsolver"): "the first solver, in the noise; deprecated by the peer",
    ("", "algorithm_type", "sde-dpmsolver"): "the first solver, in the noise; deprecated by the peer",
    ("DPMSolverSinglestepScheduler", "algorithm_type", "sde-dpmsolver++"): "draws noise between its two evaluations",
    ("", "variance_type", "fixed_large_log"): "takes the root of a negative logarithm: the peer returns no number",
    ("DDPMScheduler", "variance_type", "learned"): "a variance without a range",
    ("", "variance_type", "learned"): "the peer reads none: it drops all channels beyond three",
    ("DPMSolverMultistepScheduler", "variance_type", "learned_range"): "the peer drops all channels beyond three",
    ("DPMSolverSinglestepScheduler", "variance_type", "learned_range"): "the peer drops all channels beyond three",
    ("DDIMScheduler", "timestep_spacing", "linspace"): "steps by a whole ratio that is not this spacing's: no path",
    ("PNDMScheduler", "timestep_spacing", "linspace"): "steps by a whole ratio that is not this spacing's: no path",
    ("PNDMScheduler", "prediction_type", "v_prediction"): "extrapolates v and converts it at one end: of first order",
    ("EDMDPMSolverMultistepScheduler", "prediction_type", "sample"): "the peer refuses it",
    ("DPMSolverSDEScheduler", "prediction_type", "sample"): "the peer refuses it",
}
"""Values that are not compared, for one class or for every one, and why."""


COMBINATIONS: list[tuple[str, str, str, str]] = [
    ("DDPMScheduler", "variance_type, timestep_spacing", "learned_range, trailing", "draws noise in its last step"),
    ("DDPMScheduler", "variance_type, steps_offset", "learned_range, 1", "draws noise in its last step"),
    ("DEISMultistepScheduler", "lower_order_final, steps", "True, below 15", "ends in first order above sigma 0"),
    ("DPMSolverMultistepScheduler", "lower_order_final, final_sigmas_type", "True, sigma_min", "as DEIS"),
    ("DPMSolverMultistepScheduler", "euler_at_final, final_sigmas_type", "True, sigma_min", "as DEIS"),
    ("EulerDiscreteScheduler", "s_churn of step", "above 0", "evaluates before it adds the noise: not EDM's rule"),
    ("EDMDPMSolverMultistepScheduler", "solver_order, algorithm_type", "3, sde-dpmsolver++", "forgets the noise"),
    ("EDMEulerScheduler", "s_churn of step", "above 0", "evaluates before it adds the noise: not EDM's rule"),
]
"""What is left out of options that are varied one by one, and why."""


def literals(annotation: Any) -> list[Any]:
    """The values that an annotation allows, where it says so."""
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in literals(part)]


def classes() -> list[str]:
    """Every scheduler that the peer exports."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


def uncovered() -> Iterator[tuple[str, str, str, str]]:
    """(class, option, value, reason) of all that is not compared; the reason is empty where there is none."""
    for name in classes():
        if name not in PEERS and name not in TESTED_BELOW:
            yield name, "", "", ELSEWHERE.get(name, "")
    configs = [(case.peer, case.config) for case in cases()]
    for name in PEERS:
        for option, parameter in list(inspect.signature(scheduler_class(name).__init__).parameters.items())[1:]:
            used = [config.get(option, parameter.default) for peer, config in configs if peer == name]
            allowed = literals(parameter.annotation)
            missed = [value for value in allowed if value not in used]
            if not allowed and all(value == used[0] for value in used):
                missed = [f"other than {used[0]}"]
            for value in missed:
                whole = REASONS_OF.get((name, option), REASONS.get(option, ""))
                one = VALUES.get((name, option, value), VALUES.get(("", option, value), whole))
                yield name, option, str(value), one


def test_what_is_not_compared_is_listed_with_its_reason() -> None:
    rows = [*uncovered(), *COMBINATIONS]
    for row in rows:
        print(*row, sep=" | ")
    assert not [row for row in rows if not row[3]]
    assert set(ELSEWHERE) <= set(classes())


def test_inversion_is_that_of_the_peer() -> None:
    cls = scheduler_class("DDIMInverseScheduler")
    with widened(cls, []):
        scheduler = cls(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(10)
        alphas = np.asarray(scheduler.alphas_cumprod)[[0, *scheduler.timesteps]]
        sigmas = np.sqrt((1 - alphas) / alphas)
        x, theirs = START / float(np.hypot(1, sigmas[0])), []
        for t, after in zip(scheduler.timesteps, sigmas[1:]):
            x = scheduler.step(network(x), t, x).prev_sample
            theirs.append(x * float(np.hypot(1, after)))
    ours = [step.x.clone() for step in invert(Case("", "", {}).denoise, START.clone(), sigmas)]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_predictor_and_corrector_are_those_of_the_peer() -> None:
    """For one picture: the peer's corrector takes the mean of norms over the batch, so that neighbours matter there.

    Its pipeline corrects before it predicts; here each is called on its own, at the level where it stands.
    """
    cls, count, snr = scheduler_class("ScoreSdeVeScheduler"), 9, 0.16
    case, recorded = Case("", "predictor_corrector", {}), Recorded(PictureNoise([1], (3, 2, 2)))
    with widened(cls, []):
        scheduler = cls(num_train_timesteps=count, sigma_min=0.2, sigma_max=30.0, snr=snr)
        sigmas = scheduler.discrete_sigmas.double().numpy()[::-1].copy()
    x = start = START[:1] * float(sigmas[0])
    ours = [step.x.clone() for step in sample(case.ours, case.denoise, start, sigmas, recorded, snr=snr)]
    assert len(recorded.drawn) == 2 * (count - 1)
    with widened(cls, recorded.drawn):
        for i, (sigma, after) in enumerate(itertools.pairwise(map(float, sigmas))):
            score = (case.denoise(x, sigma).x0 - x) / sigma**2
            x = scheduler.step_pred(score, (count - 1 - i + 0.01) / (count - 1), x).prev_sample
            score = (case.denoise(x, after).x0 - x) / after**2
            x = scheduler.step_correct(score, x).prev_sample
            torch.testing.assert_close(x, ours[i], rtol=1e-9, atol=1e-9)


def test_churn_is_karras_ve() -> None:
    """EDM's algorithm 2, which the peer's pipeline drives by hand; its own sigmas."""
    cls = scheduler_class("KarrasVeScheduler")
    with widened(cls, []):
        scheduler = cls(s_noise=1.0, s_churn=3.0, sigma_min=0.1, sigma_max=9.0)
        scheduler.set_timesteps(9)
    case, recorded = Case("", "edm", {}), Recorded(NOISE)
    sigmas = np.append(np.asarray(scheduler.schedule.double())[[int(t) for t in scheduler.timesteps]], 0.0)
    start = START * float(sigmas[0])
    ours = [step.x.clone() for step in sample("edm", case.denoise, start, sigmas, recorded, churn=3.0)]
    kept = list(recorded.drawn)
    drawn = [kept.pop(0) if 0.05 <= sigma <= 50 else torch.zeros_like(START) for sigma in sigmas[:-1]]
    assert 0 < len(recorded.drawn) < 9
    assert not kept
    x = start
    with widened(cls, drawn):
        for i, (sigma, after) in enumerate(itertools.pairwise(map(float, sigmas))):
            raised, level = scheduler.add_noise_to_input(x, sigma)
            score = (case.denoise(raised, level).x0 - raised) / level
            step = scheduler.step(score, level, after, raised)
            x = step.prev_sample
            if after:
                score = (case.denoise(x, after).x0 - x) / after
                x = scheduler.step_correct(score, level, after, raised, x, step.derivative).prev_sample
            torch.testing.assert_close(x, ours[i], rtol=1e-9, atol=1e-9)
