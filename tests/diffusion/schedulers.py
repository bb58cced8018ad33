"""diffusers' schedulers as trajectories in our space, computed in float64 throughout.

Many schedulers cast to float32 inside. Here their module's `torch.float32` and `np.float32` name float64, and torch's
default type is float64 while they are made and run, so that what is left of a difference is mathematics. Their noise
is what our sampler drew, in the same order; fresh noise afterwards, which a right rule multiplies by 0.
"""

import contextlib
import importlib
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.prediction import PREDICTIONS, Prediction, to_x0
from latentkit.diffusion.samplers.driver import Denoised, sample
from latentkit.diffusion.schedule import SIGMA_CAP

MIX = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
START = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NOISE = PictureNoise([1, 2], (3, 2, 2))
OURS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


def network(x: Tensor) -> Tensor:
    """A smooth nonlinear function that mixes channels: what both sides take for the trained network."""
    return torch.tanh(torch.einsum("oc,bchw->bohw", MIX, x)) + 0.3 * x.cos()


class Recorded:
    """Our noise with a memory: what it gave, in order."""

    def __init__(self, noise: Any) -> None:
        self.noise = noise
        self.drawn: list[Tensor] = []

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """The noise of one step."""
        return self._kept(self.noise.step(step, purpose))

    def between(self, high: float, low: float) -> Tensor:
        """The noise of one sigma interval."""
        return self._kept(self.noise.between(high, low))

    def _kept(self, drawn: Tensor) -> Tensor:
        self.drawn.append(drawn.double())
        return self.drawn[-1]


class _Widened:
    """A module in which float32 is float64."""

    def __init__(self, module: types.ModuleType, wide: Any) -> None:
        self._module, self.float32 = module, wide

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _quad(function: Callable[[Any], Any], low: Any, high: Any, **_: Any) -> tuple[float, float]:
    """In the place of scipy's: Gauss-Legendre with 8 points, exact for the polynomials that LMS integrates."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    low, half = float(low), (float(high) - float(low)) / 2
    return half * sum(w * float(function(low + half * (1 + node))) for node, w in zip(nodes, weights)), 0.0


@contextlib.contextmanager
def widened(scheduler_class: type, drawn: list[Tensor]) -> Iterator[None]:
    """While open, the class's module computes in float64 and draws `drawn`, then fresh noise."""
    module = sys.modules[scheduler_class.__module__]
    queue, fresh = list(drawn), torch.Generator().manual_seed(9)

    def randn_tensor(shape: Any, *_: Any, **__: Any) -> Tensor:
        return queue.pop(0) if queue else torch.randn(tuple(shape), dtype=torch.float64, generator=fresh)

    class BrownianTree:
        """In the place of torchsde's path: the increments that ours gave."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __call__(self, sigma: Any, after: Any) -> Tensor:
            return randn_tensor(START.shape)

    replaced = {
        "torch": _Widened(torch, torch.float64),
        "np": _Widened(np, np.float64),
        "randn_tensor": randn_tensor,
        "integrate": types.SimpleNamespace(quad=_quad),
        "BrownianTreeNoiseSampler": BrownianTree,
    }
    before = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    for name, value in replaced.items():
        setattr(module, name, value)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for name in replaced:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)


def scheduler_class(name: str) -> Any:
    """The peer's class, also where a package that only its quadrature or its noise needs is not installed."""
    module = importlib.import_module("diffusers")
    if name in UNEXPORTED:
        with unittest.mock.patch.dict(sys.modules):
            sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
            module = importlib.import_module(f"diffusers.schedulers.scheduling_{UNEXPORTED[name]}")
        sys.modules[module.__name__] = module
    return getattr(module, name)


UNEXPORTED = {"LMSDiscreteScheduler": "lms_discrete", "DPMSolverSDEScheduler": "dpmsolver_sde"}
"""Classes that need scipy or torchsde, and their modules."""

SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ve": np.ones_like,
    "vp": lambda sigma: 1 / np.sqrt(1 + sigma * sigma),
    "flow": lambda sigma: 1 / (1 + sigma),
}
"""What a peer's sample is, over ours: x, x / sqrt(1 + sigma^2), or x / (1 + sigma)."""


def _from_sigmas(scheduler: Any) -> np.ndarray:
    """Its sigmas, or those of a flow's times where it holds these."""
    values = np.asarray(scheduler.sigmas.double())
    if not getattr(scheduler.config, "use_flow_sigmas", "Flow" in type(scheduler).__name__):
        return values
    return np.where(values < 1, values / np.maximum(1 - values, 1e-300), SIGMA_CAP)


def _from_doubled_sigmas(scheduler: Any) -> np.ndarray:
    sigmas = _from_sigmas(scheduler)
    return np.append(sigmas[:1], sigmas[1::2])[: scheduler.num_inference_steps + 1]


def _every_other_sigma(scheduler: Any) -> np.ndarray:
    sigmas = _from_sigmas(scheduler)
    return np.append(sigmas[:-1:2], sigmas[-1])


def _from_betas(scheduler: Any) -> np.ndarray:
    """This peer's betas and alphas are what others call sigmas and the square roots of alpha-bars."""
    return np.asarray(scheduler.betas / scheduler.alphas)


def _from_alphas(scheduler: Any) -> np.ndarray:
    """The sigmas of the trained timesteps that are visited, and of where the last step leads."""
    timesteps = list(dict.fromkeys(int(t) for t in scheduler.timesteps))
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    alphas = np.append(np.asarray(scheduler.alphas_cumprod.double())[timesteps], float(final))
    return np.asarray(np.sqrt((1 - alphas) / np.maximum(alphas, 1e-14)))


class Peer(NamedTuple):
    """How to read a class of the peer's: its ladder, its space, and after which calls an interval is complete."""

    ladder: Callable[[Any], np.ndarray]
    space: str
    complete: Callable[[int], list[int]] = lambda calls: list(range(calls))


def _every_second(calls: int) -> list[int]:
    return [*range(1, calls, 2), *([calls - 1] if calls % 2 else [])]


def _after_the_first(calls: int) -> list[int]:
    return list(range(1, calls))


PEERS: dict[str, Peer] = {
    "DDPMScheduler": Peer(_from_alphas, "vp"),
    "DDIMScheduler": Peer(_from_alphas, "vp"),
    "PNDMScheduler": Peer(_from_alphas, "vp", _after_the_first),
    "LCMScheduler": Peer(_from_alphas, "vp"),
    "EulerDiscreteScheduler": Peer(_from_sigmas, "ve"),
    "EulerAncestralDiscreteScheduler": Peer(_from_sigmas, "ve"),
    "EDMEulerScheduler": Peer(_from_sigmas, "ve"),
    "EDMDPMSolverMultistepScheduler": Peer(_from_sigmas, "ve"),
    "LMSDiscreteScheduler": Peer(_from_sigmas, "ve"),
    "HeunDiscreteScheduler": Peer(_from_doubled_sigmas, "ve", _every_second),
    "KDPM2DiscreteScheduler": Peer(_from_doubled_sigmas, "ve", _every_second),
    "KDPM2AncestralDiscreteScheduler": Peer(_from_doubled_sigmas, "ve", _every_second),
    "DPMSolverSDEScheduler": Peer(_from_doubled_sigmas, "ve", _every_second),
    "DPMSolverMultistepScheduler": Peer(_from_sigmas, "vp"),
    "DPMSolverSinglestepScheduler": Peer(_every_other_sigma, "vp", _every_second),
    "UniPCMultistepScheduler": Peer(_from_sigmas, "vp"),
    "DEISMultistepScheduler": Peer(_from_sigmas, "vp"),
    "IPNDMScheduler": Peer(_from_betas, "vp"),
    "FlowMatchEulerDiscreteScheduler": Peer(_from_sigmas, "flow"),
}


class Pair(NamedTuple):
    """Two trajectories from the same start along the same sigmas, in our space, after each interval."""

    sigmas: np.ndarray
    theirs: list[Tensor]
    ours: list[Tensor]

    def difference(self) -> float:
        """The largest relative difference over the trajectory."""
        assert len(self.theirs) == len(self.ours) == len(self.sigmas) - 1
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(self.theirs, self.ours))


def _falling(sigmas: np.ndarray) -> np.ndarray:
    """Without the null intervals that some peers end with."""
    still = np.flatnonzero(np.diff(sigmas) >= 0)
    return sigmas[: still[0] + 1] if len(still) else sigmas


class Case(NamedTuple):
    """One comparison: the peer's class and options, our sampler and its options.

    `step` are options of the peer's own step; `refine` may change the scheduler that was made; `prediction` goes
    before the one that the config names; `variance` is the learned part of the network's output, from -1 to 1.
    """

    peer: str
    ours: str
    config: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012
    step: dict[str, Any] = {}  # noqa: RUF012
    steps: int = 8
    tolerance: float = 1e-9
    refine: Callable[[Any], None] | None = None
    prediction: Prediction | None = None
    variance: Callable[[Tensor], Tensor] | None = None

    def denoise(self, x: Tensor, sigma: float) -> Denoised:
        """The network as a denoiser, by its prediction's own scalings."""
        prediction = self.prediction or PREDICTIONS[OURS[self.config.get("prediction_type", "epsilon")]]
        level = torch.tensor(sigma, dtype=torch.float64)
        scaled = prediction.c_in(level) * x
        x0 = to_x0(prediction, network(scaled), x, level)
        return Denoised(x0, log_variance=None if self.variance is None else (self.variance(scaled) + 1) / 2)

    def scheduler(self) -> Any:
        """The peer, ready to step."""
        made = scheduler_class(self.peer)(**self.config)
        made.set_timesteps(self.steps)
        if self.refine is not None:
            self.refine(made)
        return made

    def run(self) -> Pair:
        """Both trajectories."""
        cls, peer = scheduler_class(self.peer), PEERS[self.peer]
        if self.config.get("use_flow_sigmas"):
            peer = peer._replace(space="flow")
        with widened(cls, []):
            scheduler = self.scheduler()
            sigmas = _falling(peer.ladder(scheduler))
        scale = SCALES[peer.space](sigmas)
        recorded, start = Recorded(NOISE), START * float(np.hypot(1, sigmas[0]))
        steps = sample(self.ours, self.denoise, start, sigmas, recorded, **self.options)
        ours = [step.x.clone() for step in steps]
        complete = peer.complete(len(scheduler.timesteps))[: len(sigmas) - 1]
        theirs: list[Tensor] = []
        x = start * float(scale[0])
        with widened(cls, recorded.drawn):
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            for call, t in enumerate(scheduler.timesteps[: complete[-1] + 1]):
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                output = network(scaled)
                if self.variance is not None:
                    output = torch.cat([output, self.variance(scaled)], dim=1)
                x = scheduler.step(output, t, x, **self.step).prev_sample
                if call in complete:
                    theirs.append(x / float(scale[len(theirs) + 1]))
        return Pair(sigmas, theirs, ours)
