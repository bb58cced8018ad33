"""Whether a network predicts noise or v, asked of the network itself where its file does not say so."""

import torch

from latentkit.diffusion.noise import keyed_normal
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser

LIKENESS = 0.5
"""Share of the noise in the answer that tells the two apart: 1 for noise, about 1 / sigma for v."""


@torch.no_grad()
def probed_prediction(denoiser: Denoiser, conditioning: Conditioning, channels: int, cells: int = 32) -> str:
    """ "eps" or "v", by one evaluation on noise at the highest noise level, for one row of conditioning.

    There nearly all of the input is noise: a network that predicts noise gives its input back, one that predicts v
    gives minus its guess of the picture. `channels` are the latent's; conditioning has its concat slot filled.
    """
    device = denoiser.unet.conv_in.weight.device
    noise = keyed_normal((1, channels, cells, cells), 0, 0, "probe").to(device)
    sigma = torch.tensor([denoiser.schedule.sigma_max], dtype=torch.float64)
    answer = denoiser.network(noise * float(sigma), sigma, conditioning)
    share = (answer.double() * noise.double()).sum() / noise.double().square().sum()
    return "eps" if float(share) > LIKENESS else "v"
