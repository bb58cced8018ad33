"""Image-to-image: noise is added to a picture up to the noise level that `strength` names, and taken away again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkit.applications.plan import Plan, covered, encoded, guided, path_of, refined
from latentkit.applications.request import Request, known
from latentkit.data.pictures import to_tensor
from latentkit.diffusion.noise import PictureNoise
from latentkit.model.latent_diffusion import LatentDiffusion


def prepare(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """The encoded pictures under noise, and the last `strength` of the path (SDEdit, Meng et al. 2022, algorithm 1)."""
    first, device = requests[0], network.first_stage.latent_mean.device
    pictures = torch.stack([picture(request, network.first_stage.picture_channels) for request in requests])
    z = encoded(network, pictures.to(device))
    sigmas = path_of(network, first)
    start = z + noise.initial().to(device) * float(sigmas[0])
    return Plan(start, sigmas, guided(network, requests), network.first_stage.decode, refined(network, requests))


def picture(request: Request, channels: int) -> Tensor:
    """The request's picture `c h w`, scaled to cover the size asked for and cut to it about the middle."""
    x = to_tensor(known(known(request.init).picture), channels)
    return covered(x, known(request.height), known(request.width), alpha=channels in (2, 4))
