"""What samplers cost beside the network: time per step against diffusers' scheduler of the same name, in one run.

Both sides get the network's answer and their random numbers for free, at latents of 8 pictures, 4x128x128. The answer
is x0, which the peer takes as `prediction_type="sample"`; three of its schedulers know only the noise and make x0 of it
themselves, and DDIM is faster so. Trajectories alternate, and the fastest of each side counts. The bar is a ratio of 2
for every sampler.

    python benchmarks/samplers.py [--steps 20] [--rounds 15]
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoised, sample

BAR = 2.0
SHAPE = (8, 4, 128, 128)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X0, NOISE = {**SD, "prediction_type": "sample"}, {**SD, "prediction_type": "epsilon"}
SDE = {**X0, "algorithm_type": "sde-dpmsolver++"}
PAIRS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("ddpm", "DDPMScheduler", {**X0, "clip_sample": False}, {}),
    ("ddim", "DDIMScheduler", {**NOISE, "clip_sample": False}, {}),
    ("plms", "PNDMScheduler", {**NOISE, "skip_prk_steps": True}, {}),
    ("euler", "EulerDiscreteScheduler", X0, {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", NOISE, {}),
    ("heun", "HeunDiscreteScheduler", X0, {}),
    ("dpm2", "KDPM2DiscreteScheduler", NOISE, {}),
    ("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", NOISE, {}),
    ("dpm++2s_ancestral", "DPMSolverSinglestepScheduler", {**X0, "solver_order": 2}, {"eta": 0.0}),
    ("dpm++2m", "DPMSolverMultistepScheduler", {**X0, "solver_order": 2}, {}),
    ("dpm++3m", "DPMSolverMultistepScheduler", {**X0, "solver_order": 3}, {}),
    ("dpm++2m_sde", "DPMSolverMultistepScheduler", {**SDE, "solver_order": 2}, {}),
    ("dpm++3m_sde", "DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, {}),
    ("unipc", "UniPCMultistepScheduler", {**X0, "solver_order": 3}, {}),
    ("deis", "DEISMultistepScheduler", {**X0, "solver_order": 3}, {}),
    ("ipndm", "IPNDMScheduler", {}, {}),
    ("lcm", "LCMScheduler", X0, {}),
]


class Given:
    """Noise that costs nothing."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """The same numbers always."""
        return self.noise

    def between(self, sigma: float, after: float) -> Tensor:
        """The same numbers always."""
        return self.noise


def theirs(name: str, config: dict[str, Any], steps: int, free: Tensor, noise: Tensor) -> Callable[[Tensor], int]:
    """A run of the peer's scheduler from x, which returns its number of calls."""
    module = importlib.import_module("diffusers")
    cls = getattr(module, name)
    home = sys.modules[cls.__module__]
    if hasattr(home, "randn_tensor"):
        home.randn_tensor = lambda *_, **__: noise  # type: ignore[attr-defined]
    scheduler = cls(**config)

    def run(x: Tensor) -> int:
        scheduler.set_timesteps(steps)
        scheduler.is_scale_input_called = True
        start = time.perf_counter()
        for t in scheduler.timesteps:
            x = scheduler.step(free, t, x).prev_sample
        run.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
        return steps

    return run


def ours(
    name: str, options: dict[str, Any], sigmas: np.ndarray, free: Tensor, noise: Tensor
) -> Callable[[Tensor], int]:
    """A run of our sampler from x."""

    answer = Denoised(free)

    def run(x: Tensor) -> int:
        start = time.perf_counter()
        for _ in sample(name, lambda x, sigma: answer, x, sigmas, Given(noise), **options):
            pass
        run.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
        return len(sigmas) - 1

    return run


def main() -> None:
    """Print the table; exit code 1 where a ratio is below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    x, free, noise = (torch.randn(SHAPE) for _ in range(3))
    sigmas = np.append(np.geomspace(14.6, 0.03, asked.steps), 0.0)
    below = []
    print(f"{'sampler':20} {'diffusers ms':>13} {'latentkit ms':>13} {'ratio':>6}")
    for name, peer, config, options in PAIRS:
        sides = [theirs(peer, config, asked.steps, free, noise), ours(name, options, sigmas, free, noise)]
        best = [float("inf")] * 2
        with torch.inference_mode():
            for _ in range(asked.rounds):
                for k, run in enumerate(sides):
                    count = run(x)
                    best[k] = min(best[k], run.seconds / count * 1e3)  # type: ignore[attr-defined]
        ratio = best[0] / best[1]
        below += [name] if ratio < BAR else []
        print(f"{name:20} {best[0]:13.3f} {best[1]:13.3f} {ratio:6.2f}", flush=True)
    print(f"bar: a ratio of {BAR}; below it: {', '.join(below) or 'none'}")
    sys.exit(bool(below))


if __name__ == "__main__":
    main()
