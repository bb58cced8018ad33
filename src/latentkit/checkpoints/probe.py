"""Whether a network predicts noise or v, asked of the network itself where its file does not say so."""

import logging

import torch

from latentkit.diffusion.noise import keyed_normal
from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import predicting

BOTH = ("sd1.5", "sd2.1-base", "sdxl")
"""Presets of whose shapes there are networks of either prediction."""

LIKENESS = 0.5
"""Share of the noise in the answer that tells the two apart: 1 for noise, about 1 / sigma for v."""


@torch.no_grad()
def probed_prediction(denoiser: Denoiser, conditioning: Conditioning, channels: int, cells: int = 16) -> str:
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


def settle(model: LatentDiffusion, what: str) -> None:
    """Make the model predict what its network does, and say on stderr what that is; `what` is its file."""
    found = probed_prediction(model.denoiser, model.condition({}, 1), model.first_stage.latent_channels)
    model.architecture = predicting(model.architecture, found)
    model.denoiser.prediction = PREDICTIONS[found]
    height, width = model.architecture.size
    logging.getLogger("latentkit").warning(
        f"{what} does not say what its network predicts; asked, the network predicts {found}: taken as such, at "
        f"{width}x{height} px"
    )
