"""Upscaling: a small picture, with a little noise, stands beside the latent of the large one that is drawn."""

from collections.abc import Sequence

import torch

from latentkit.applications.plan import Plan, fitted, guided, sigmas_of
from latentkit.applications.request import Request, known
from latentkit.data.pictures import to_tensor
from latentkit.diffusion.noise import PictureNoise, keyed_normal
from latentkit.model.conditioning import Conditioning
from latentkit.model.latent_diffusion import LatentDiffusion


def prepare(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """Pure noise, and the small pictures, whose pixels are its cells (Rombach et al. 2022, section 4.4; SD x4).

    Noise is put on them for a model that is told its level.
    """
    first, schedule = requests[0], network.architecture.schedule
    channels, (_, height, width) = network.first_stage.picture_channels, noise.shape
    step = network.multiple // network.first_stage.downsampling
    sigma = 0.0 if first.noise_level is None else float(schedule.to_sigma(first.noise_level))
    rows = []
    for request in requests:
        small = to_tensor(known(known(request.init).picture), channels)
        small = fitted(small, height, width, step, alpha=channels in (2, 4))
        rows.append((small + sigma * keyed_normal(small.shape, known(request.seed), "small")) / (1 + sigma**2) ** 0.5)
    device = network.first_stage.latent_mean.device
    denoise = guided(network, requests, Conditioning(concat=torch.stack(rows).to(device)))
    sigmas = sigmas_of(network, first)
    start = noise.initial().to(device) * schedule.initial_std(float(sigmas[0]))
    return Plan(start, sigmas, denoise, network.first_stage.decode)
