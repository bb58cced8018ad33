"""What no tensor's shape shows and a file does not say, asked of the network: eps or v, and how many heads it has."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.files import Shapes
from latentkit.diffusion.noise import keyed_normal, keyed_uniform
from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import Denoiser
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, predicting
from latentkit.nets.unet import UNetConfig

BOTH = ("sd1.5", "sd2.1-base", "sdxl")
"""Presets of whose shapes there are networks of either prediction."""

LIKENESS = 0.5
"""Share of the noise in the answer that tells the two apart: 1 for noise, about 1 / sigma for v."""
CELLS = 8
"""A side of the noise: the least that every level can halve, as what is asked costs what the weights' reading costs."""

HEADS = ("cin256", "cin256-v2", "text2img256", "layout2img-openimages256")
"""Presets of whose shapes there are networks of other heads: later code makes other ones of their released configs."""
OTHER_WIDTH = 32
"""Channels of one head in those; released are networks of one head in all."""
ROWS, DISCS = 12, 40
SIDE = 32
"""Latent cells of the pictures that heads are tried on."""
USEFUL = 0.9
"""Error, as a share of the noise, above which a network knows too little to be asked."""
SURE, MARGIN = 4.0, 1.03
"""Standard errors, and ratio of errors, by which one of two numbers of heads must be the better one."""


def doubtful(name: str, says_prediction: bool) -> bool:
    """Whether a network of the preset's shapes must be asked."""
    return name in HEADS or (name in BOTH and not says_prediction)


@torch.no_grad()
def probed_prediction(denoiser: Denoiser, conditioning: Conditioning, channels: int) -> str:
    """ "eps" or "v", by one evaluation on `CELLS` of noise at the highest noise level, for one row of conditioning.

    There nearly all of the input is noise: a network that predicts noise gives its input back, one that predicts v
    gives minus its guess of the picture. `channels` are the latent's; conditioning has its concat slot filled.
    """
    device = denoiser.unet.conv_in.weight.device
    noise = keyed_normal((1, channels, CELLS, CELLS), 0, 0, "probe").to(device)
    sigma = torch.tensor([denoiser.schedule.sigma_max], dtype=torch.float64)
    answer = denoiser.network(noise * float(sigma), sigma, conditioning)
    share = (answer.double() * noise.double()).sum() / noise.double().square().sum()
    return "eps" if float(share) > LIKENESS else "v"


class Compared(NamedTuple):
    """Mean errors, as shares of the noise, and by how many standard errors the second's is above the first's."""

    errors: tuple[float, float]
    apart: float

    @property
    def second(self) -> bool | None:
        """Whether the second is right; None where it cannot be told."""
        low, high = sorted(self.errors)
        if low > USEFUL or high < MARGIN * low or abs(self.apart) < SURE:
            return None
        return self.apart < 0


@torch.no_grad()
def compared(first: Denoiser, second: Denoiser, latents: Tensor, conditioning: Conditioning) -> Compared:
    """One evaluation of each on the same noisy `latents` `b c h w`, at noise levels between a fifth and four fifths.

    A network whose heads are not those that it was trained with makes the larger error in what it predicts.
    """
    count = len(latents)
    times = first.schedule.steps * (0.2 + 0.6 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    sigma = torch.from_numpy(first.schedule.at(times.numpy()))
    rows = sigma[:, None, None, None].to(latents)
    eps = keyed_normal(tuple(latents.shape), 0, 0, "heads").to(latents)
    target = first.prediction.target(latents, eps, rows)
    errors = [
        (denoiser.network(latents + rows * eps, sigma, conditioning) - target).double().square().mean((1, 2, 3)).cpu()
        for denoiser in (first, second)
    ]
    size = target.double().square().mean((1, 2, 3)).cpu()
    one, other = (error / size for error in errors)
    difference = other - one
    deviation = float(difference.std() / count**0.5)
    return Compared((float(one.mean()), float(other.mean())), float(difference.mean()) / max(deviation, 1e-12))


def leaves(count: int, size: int) -> Tensor:
    """Pictures `count 3 size size` in [-1, 1] of discs that hide one another, as photographs' statistics are.

    Source: Lee, Mumford & Huang 2001, "Occlusion models for natural images".
    """
    place = (torch.arange(size) + 0.5) / size
    pictures = torch.zeros(count, 3, size, size)
    for disc in keyed_uniform((count, DISCS, 6), 0, "leaves").unbind(1):
        x, y, radius, *colour = (part[:, None, None] for part in disc.unbind(1))
        covered = (place[None, None] - x) ** 2 + (place[None, :, None] - y) ** 2 < (0.05 / (radius + 0.08)) ** 2
        pictures = torch.where(covered[:, None], torch.stack(colour, 1) * 2 - 1, pictures)
    return pictures


def settle(model: LatentDiffusion, what: str, turn: Callable[[str], None] | None = None) -> None:
    """Make a model of a preset's shapes what its network is, and say on stderr what that is; `what` is its file.

    `turn` brings the child of the model of that name to where it computes, and lets the others rest.
    """
    names = {name for name, known in PRESETS.items() if known.architecture.network == model.architecture.network}
    settled = _settle_heads if names & set(HEADS) else _settle_prediction
    settled(model, what, turn or (lambda child: None))


def _settle_prediction(model: LatentDiffusion, what: str, turn: Callable[[str], None]) -> None:
    turn("conditioners")
    conditioning = model.condition({}, 1)
    turn("denoiser")
    found = probed_prediction(model.denoiser, conditioning, model.first_stage.latent_channels)
    model.architecture = predicting(model.architecture, found)
    model.denoiser.prediction = PREDICTIONS[found]
    height, width = model.architecture.size
    logging.getLogger("latentkit").warning(
        f"{what} does not say what its network predicts; asked, the network predicts {found}: taken as such, at "
        f"{width}x{height} px"
    )


def _settle_heads(model: LatentDiffusion, what: str, turn: Callable[[str], None]) -> None:
    first = model.denoiser
    network = replace(first.unet.config, heads=None, head_width=OTHER_WIDTH)
    second = _rebuilt(first, network)
    turn("first_stage")
    device = next(model.first_stage.parameters()).device
    with torch.no_grad():
        latents = model.first_stage.encode(leaves(ROWS, SIDE * model.first_stage.downsampling).to(device))
    turn("conditioners")
    conditioning = _told(model, ROWS)
    turn("denoiser")
    found = compared(first, second, latents, conditioning)
    one, other = (f"{error:.1%} of what it predicts" for error in found.errors)
    usual = "one" if first.unet.config.heads == 1 else str(first.unet.config.heads)
    verdict = {
        True: f"taken with heads {OTHER_WIDTH} wide",
        False: f"taken with {usual}",
        None: f"which does not tell: taken with {usual}, as released",
    }[found.second]
    logging.getLogger("latentkit").warning(
        f"{what} does not say how many attention heads its network has; asked, it errs by {one} with {usual} and by "
        f"{other} with heads {OTHER_WIDTH} wide: {verdict}"
    )
    if found.second:
        model.denoiser = second
        model.architecture = replace(model.architecture, network=network)


def _told(model: LatentDiffusion, count: int) -> Conditioning:
    """Rows for `count` pictures of which nothing is said, or where a model must be told something, the first."""
    values: dict[str, list[Any]] = {}
    architecture = model.architecture
    if architecture.label and not architecture.label.null:
        values["label"] = model.state()["label"]["classes"][:1] * count
    if architecture.bert:
        values["text"] = [[0] * architecture.bert.length] * count
    with torch.no_grad():
        return model.condition(values, count)


def _rebuilt(denoiser: Denoiser, network: UNetConfig) -> Denoiser:
    """The same weights, not copied, in another network."""
    with torch.device("meta"), Shapes():
        other = Denoiser(network, denoiser.schedule, denoiser.prediction.name)
    other.load_state_dict(denoiser.state_dict(keep_vars=True), assign=True)
    return other.eval().requires_grad_(False)
