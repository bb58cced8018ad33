"""Plan: a batch of requests prepared for the sampler, and what every application prepares alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from latentkit.applications.request import Request, known
from latentkit.diffusion.guidance import classifier_free
from latentkit.diffusion.noise import PictureNoise
from latentkit.diffusion.samplers.driver import Denoise
from latentkit.diffusion.spacing import space
from latentkit.model.conditioning import Conditioning
from latentkit.model.latent_diffusion import LatentDiffusion


class Plan(NamedTuple):
    """What the loop runs: `x` `b c h w` at `sigmas[0]`, down `sigmas` with `denoise`, to pixels by `finish`."""

    x: Tensor
    sigmas: np.ndarray
    denoise: Denoise
    finish: Callable[[Tensor], Tensor]


Prepare = Callable[[LatentDiffusion, Sequence[Request], PictureNoise], Plan]
"""An application: resolved requests that differ only in words, seeds and pictures, to their plan."""


def sigmas_of(network: LatentDiffusion, request: Request) -> np.ndarray:
    """The noise levels of a resolved request."""
    return space(known(request.spacing), network.architecture.schedule, known(request.steps))


def guided(network: LatentDiffusion, requests: Sequence[Request]) -> Denoise:
    """The model told what the requests say, led away from their negatives."""
    count, first = len(requests), requests[0]
    prompts, labels = [request.prompt or "" for request in requests], [request.label for request in requests]
    positive = network.condition({"text": prompts, "label": labels}, count)
    alone, scale = network.denoiser.bind(positive), known(first.guidance_scale)
    if scale == 1:
        return alone
    negative = network.condition({"text": [request.negative for request in requests]}, count)
    both = network.denoiser.bind(Conditioning.cat([negative, positive]))
    return classifier_free(both, alone, scale, (known(first.guidance_low), known(first.guidance_high)))


def from_noise(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """Text-to-image, class-to-image and unconditional drawing: pure noise and the whole path."""
    sigmas = sigmas_of(network, requests[0])
    device = network.first_stage.latent_mean.device
    start = noise.initial().to(device) * network.architecture.schedule.initial_std(float(sigmas[0]))
    return Plan(start, sigmas, guided(network, requests), network.first_stage.decode)
