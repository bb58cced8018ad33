"""Where diffusers' schedulers and the mathematics differ: what each does, and that it is not a matter of taste."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import whole_third_order
from convergence import LOG, fitted
from ideal import problems
from schedulers import START, network, scheduler_class, widened

from latentkit.diffusion.prediction import EDM, to_x0

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_linspace_of_the_peers_indexed_schedulers_is_no_path(name: str) -> None:
    scheduler = scheduler_class(name)(timestep_spacing="linspace")
    scheduler.set_timesteps(12)
    visited = sorted({int(t) for t in scheduler.timesteps[-8:]}, reverse=True)
    assert visited[1] != visited[0] - scheduler.config.num_train_timesteps // 12


def test_the_peers_churn_evaluates_before_it_adds_the_noise() -> None:
    """Its x0 is not the network's at the noisier latent and level, which EDM's algorithm 2 evaluates."""
    cls = scheduler_class("EDMEulerScheduler")
    with widened(cls, [torch.ones_like(START)]):
        scheduler = cls()
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(5)
        scaled = scheduler.scale_model_input(START, scheduler.timesteps[5])
        found = scheduler.step(network(scaled), scheduler.timesteps[5], START, s_churn=9.0).pred_original_sample
        sigma = scheduler.sigmas[5]
    raised, level = START + sigma, sigma * 2**0.5
    right = to_x0(EDM, network(EDM.c_in(level) * raised), raised, level)
    assert (found - to_x0(EDM, network(scaled), raised, level)).abs().max() < 1e-9
    assert (found - right).abs().max() > 0.05


def test_the_peers_learned_range_draws_noise_in_its_last_step() -> None:
    scheduler = scheduler_class("DDPMScheduler")(variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    last = int(scheduler.timesteps[-1])
    assert scheduler._get_variance(last, torch.tensor(1.0)).exp() > 1e-4


def test_the_peers_large_logarithm_is_no_number() -> None:
    scheduler = scheduler_class("DDPMScheduler")(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    assert (scheduler._get_variance(500) ** 0.5).isnan()


def test_the_peers_multistep_rule_on_v_is_of_first_order() -> None:
    """PNDM on the noise is far above it on the same ladders."""

    def run(steps: int, kind: str) -> float:
        cls, problem = scheduler_class("PNDMScheduler"), problems(9.0)[0]
        with widened(cls, []):
            config = {"num_train_timesteps": steps, "trained_betas": levels(steps)}
            scheduler = cls(prediction_type=kind, skip_prk_steps=True, **config)
            scheduler.set_timesteps(steps)
            x = problem.x / float(np.hypot(1, problem.start))
            for t in scheduler.timesteps[:-1]:
                alpha = scheduler.alphas_cumprod[t]
                clean = problem.denoise(x / alpha.sqrt(), float(((1 - alpha) / alpha).sqrt())).x0
                eps = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
                output = eps if kind == "epsilon" else alpha.sqrt() * eps - (1 - alpha).sqrt() * clean
                x = scheduler.step(output, t, x).prev_sample
        return float((x * float(np.hypot(1, 0.5)) - problem.at(0.5)).abs().max())

    def levels(steps: int) -> list[float]:
        alphas = 1 / (1 + np.linspace(0.5, 9.0, steps) ** 2)
        return [*(1 - alphas[:1]), *(1 - alphas[1:] / alphas[:-1])]

    counts = (80, 160, 320)
    assert fitted(counts, [run(n, "epsilon") for n in counts]) > 2.9
    assert fitted(counts, [run(n, "v_prediction") for n in counts]) == pytest.approx(1, abs=0.25)


def test_the_peers_third_order_is_of_second_order() -> None:
    """With its history known: the reason for `whole_third_order`, under which it is of third order."""

    def run(steps: int, refine: Callable[[Any], None]) -> float:
        problem = problems(20.0)[0]
        past, ladder = LOG.lay(steps)
        cls = scheduler_class("DPMSolverMultistepScheduler")
        with widened(cls, []):
            scheduler = cls(solver_order=3, prediction_type="sample", lower_order_final=False)
            scheduler.set_timesteps(steps + 3)
            refine(scheduler)
            scheduler.sigmas = torch.from_numpy(np.append([*past[-2:], *ladder], 0.0))
            scheduler.set_begin_index(2)
            scheduler.lower_order_nums = 2
            known = [problem.denoise(problem.at(sigma), sigma).x0 for sigma in past[-2:]]
            scheduler.model_outputs = [None, *known]
            x = problem.x / float(np.hypot(1, ladder[0]))
            for i, sigma in enumerate(map(float, ladder[:-1])):
                x0 = problem.denoise(x * float(np.hypot(1, sigma)), sigma).x0
                x = scheduler.step(x0, scheduler.timesteps[i], x).prev_sample
        return float((x * float(np.hypot(1, ladder[-1])) - problem.at(LOG.end)).abs().max())

    counts = (160, 320)
    assert fitted(counts, [run(n, lambda scheduler: None) for n in counts]) == pytest.approx(2, abs=0.1)
    assert fitted(counts, [run(n, whole_third_order) for n in counts]) > 2.9
