"""Image-to-image: noise is added to a picture up to the noise level that `strength` names, and taken away again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkit.applications.plan import Plan, guided, sigmas_of
from latentkit.applications.request import Request, known
from latentkit.data.pictures import resize, to_tensor
from latentkit.diffusion.noise import PictureNoise
from latentkit.model.latent_diffusion import LatentDiffusion


def prepare(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """The encoded pictures under noise, and the last `strength` of the path (SDEdit, Meng et al. 2022, algorithm 1)."""
    first, device = requests[0], network.first_stage.latent_mean.device
    pictures = torch.stack([picture(request, network.first_stage.picture_channels) for request in requests])
    z = torch.cat([network.first_stage.encode(one[None].to(device)) for one in pictures])
    sigmas = sigmas_of(network, first)
    steps = len(sigmas) - 1
    sigmas = sigmas[steps - max(1, round(steps * known(first.strength))) :]
    start = z + noise.initial().to(device) * float(sigmas[0])
    return Plan(start, sigmas, guided(network, requests), network.first_stage.decode)


def picture(request: Request, channels: int) -> Tensor:
    """The request's picture `c h w`, scaled to cover the size asked for and cut to it about the middle."""
    height, width = known(request.height), known(request.width)
    x = to_tensor(known(known(request.init).picture), channels)
    scale = max(height / x.shape[1], width / x.shape[2])
    scaled = (max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale)))
    x = resize(x, *scaled, alpha=channels in (2, 4))
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]
