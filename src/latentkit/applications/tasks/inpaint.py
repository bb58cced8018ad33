"""Inpainting: what a mask marks is drawn anew and the rest stays; outpainting is that on a larger canvas.

Everywhere mask 1 = repaint, 0 = keep; in a mask picture white is 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.applications.plan import Plan, encoded, fitted, guided, path_of
from latentkit.applications.request import Request, known
from latentkit.applications.rules import fills
from latentkit.data.pictures import to_tensor
from latentkit.diffusion.masking import blended
from latentkit.diffusion.noise import PictureNoise
from latentkit.model.conditioning import Conditioning
from latentkit.model.latent_diffusion import LatentDiffusion

HALF = 0.5
"""Mask from which a pixel is repainted; what lies between 0 and 1 is how much of it shows."""


def prepare(network: LatentDiffusion, requests: Sequence[Request], noise: PictureNoise) -> Plan:
    """The pictures under noise, of which any model repaints the masked cells, and an inpainting model all."""
    first, stage = requests[0], network.first_stage
    made = [canvas(request, network) for request in requests]
    pictures, masks = (torch.stack(each).to(stage.latent_mean.device) for each in zip(*made))
    holes = masks >= HALF
    z, eps = encoded(network, pictures), noise.initial().to(pictures.device)
    sigmas = path_of(network, first)
    start = z + eps * float(sigmas[0])
    if fills(network.architecture) == "mask":
        denoise = guided(network, requests, Conditioning(concat=seen(network, pictures, holes.float())))
        if first.strength == 1:
            start = eps * network.architecture.schedule.initial_std(float(sigmas[0]))
    else:
        cells = F.max_pool2d(holes.float(), stage.downsampling) > 0
        denoise = blended(guided(network, requests), z, cells, eps)

    def finish(x: Tensor) -> Tensor:
        drawn = stage.decode(x)
        return torch.lerp(pictures, drawn.clamp(-1, 1), masks) if first.paste else drawn

    return Plan(start, sigmas, denoise, finish)


def canvas(request: Request, network: LatentDiffusion) -> tuple[Tensor, Tensor]:
    """The request's picture `c h w` in [-1, 1] and mask `1 h w` (1 = repaint), of the size asked for.

    What is added at the sides repeats the picture's edge. A canvas of the size asked for, but for what makes no whole
    latent, loses its edges; another is scaled to cover that size and cut to it about the middle.
    """
    channels = network.first_stage.picture_channels
    x = to_tensor(known(known(request.init).picture), channels)
    left, top, right, bottom = request.extend or (0, 0, 0, 0)
    if request.mask is not None:
        mask = (to_tensor(known(request.mask.picture), 1) + 1) / 2
    else:
        mask = F.pad(torch.zeros_like(x[:1]), (left, right, top, bottom), value=1.0)
    x = F.pad(x[None], (left, right, top, bottom), mode="replicate")[0]
    size = known(request.height), known(request.width)
    x = fitted(x, *size, network.multiple, alpha=channels in (2, 4))
    return x, (fitted(mask * 2 - 1, *size, network.multiple) + 1) / 2


def seen(network: LatentDiffusion, pictures: Tensor, holes: Tensor) -> Tensor:
    """What an inpainting model sees beside the latent: mask and masked picture, `b 1+z h w` in latent cells.

    Stable Diffusion's: the mask (1 = repaint), then the latent of the picture, gray in the holes. The 2021 model's,
    which takes no words: the latent of the picture, black in the holes, then the mask in [-1, 1].
    """
    cell = network.first_stage.downsampling
    mask = holes[:, :, ::cell, ::cell]
    if network.conditioners:
        return torch.cat([mask, encoded(network, pictures * (1 - holes))], dim=1)
    return torch.cat([encoded(network, pictures * (1 - holes) - holes), mask * 2 - 1], dim=1)
