"""Masking: a denoiser that draws inside a mask and knows what is outside of it. Mask 1 = repaint, 0 = keep."""

import torch
from torch import Tensor

from latentkit.diffusion.samplers.driver import Denoise, Denoised


def blended(denoise: Denoise, clean: Tensor, repaint: Tensor, eps: Tensor) -> Denoise:
    """`denoise` where `repaint` `b 1 h w` is true; elsewhere x0 is `clean`, and x is `clean` under the noise `eps`.

    `clean` and `eps` are `b c h w`. With a sampler of one step's memory this is putting the kept part back under its
    noise after each step. Source: Lugmayr et al. 2022 (RePaint), equation 8, with one noise for all steps.
    """

    def inside(x: Tensor, sigma: float) -> Denoised:
        x0, anchor, log_variance = denoise(torch.where(repaint, x, clean + sigma * eps), sigma)
        if anchor is not None:
            anchor = torch.where(repaint, anchor, clean)
        return Denoised(torch.where(repaint, x0, clean), anchor, log_variance)

    return inside
