"""How likely a model finds pictures: bits per pixel-dimension, as a bound and, for models of pixels, exactly."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentkit.checkpoints.files import Model
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.source import Source, track
from latentkit.diffusion import likelihood as diffusion
from latentkit.diffusion.noise import PictureNoise, keyed_normal, keyed_uniform
from latentkit.diffusion.samplers.driver import Denoise
from latentkit.diffusion.spacing import space
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.bottleneck import posterior

AT_ONCE = 16
CELLS_AT_ONCE = 1 << 14
"""Pictures, and latent cells, of one batch at most."""
BIN = 2 / 255
"""Distance of neighbouring 8-bit values in [-1, 1]."""


class Mean(NamedTuple):
    """A mean over pictures and its standard error (nothing with one picture)."""

    value: float
    error: float | None


class Likelihood(NamedTuple):
    """Bits for each element of the pictures, 8-bit values dequantised evenly over their width; lower is better.

    `bound` is the variational bound, the sum of `parts`; `exact` is by the probability flow, of models of pixels alone.
    `levels` cut the diffusion part by noise: (from sigma, bits). `decoder_std` is the deviation of the decoder's
    normal density, the one that suits these pictures best (two-stage models).
    """

    bound: Mean
    exact: Mean | None
    parts: dict[str, float]
    levels: list[tuple[float, float]]
    decoder_std: float | None
    pictures: int
    size: tuple[int, int]
    channels: int
    told: tuple[str, ...]
    steps: int
    flow_steps: int

    def document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        means = {name: value and value._asdict() for name, value in (("bound", self.bound), ("exact", self.exact))}
        return {**self._asdict(), **means, "unit": "bits per dimension of 8-bit pixels, dequantised evenly"}


@torch.no_grad()
def likelihood(
    model: Model,
    source: Source,
    *,
    count: int | None = None,
    steps: int = 100,
    flow_steps: int = 40,
    seed: int = 0,
    shown: bool = False,
) -> Likelihood:
    """The likelihood of the first `count` pictures (None: of all), told their captions and classes.

    `steps` noise levels are seen for the bound; `flow_steps` steps of four evaluations make the exact value, whose
    divergence is estimated by one probe; 0 leaves it out. `shown` shows progress on stderr. Errors: InputError for a
    model or pictures without such a number.
    """
    network = model.network
    pictures = _pictures(network, source, count)
    stage, schedule = network.first_stage, network.architecture.schedule
    sigmas = space("exponential", schedule, steps)
    flow = space("exponential", schedule, flow_steps) if flow_steps and stage.autoencoder is None else None
    offset = float(keyed_uniform((1,), seed, "bound")[0])
    _, *cells = network.latent_shape(*network.architecture.size)
    size = max(1, min(AT_ONCE, CELLS_AT_ONCE // math.prod(cells)))
    spans = [range(i, min(i + size, len(pictures))) for i in range(0, len(pictures), size)]
    found: list[dict[str, Tensor]] = []
    for rows in track(spans, len(spans), "likelihood", shown):
        denoise = network.denoiser.bind(network.condition(_told(network, pictures.source, rows), len(rows)))
        pixels = torch.stack([_dequantised(pictures, i, seed) for i in rows]).to(stage.latent_mean.device)
        z, latents = _latents(network, pixels, rows, seed)
        draw = partial(PictureNoise(rows, z.shape[1:]).step, purpose=f"likelihood {seed}")
        bound = diffusion.bound(denoise, z, sigmas, draw, offset)
        row = {"prior": bound.prior, "steps": bound.steps, "last level": bound.decoder, "latents": latents}
        if stage.autoencoder is not None:
            row["error"] = (stage.decode(z.float()) - pixels).double().square().flatten(1).sum(1)
        if flow is not None:
            row["exact"] = latents - _log_density(denoise, z, flow, rows, seed)
        found.append(row)
    nats = {name: torch.cat([row[name] for row in found]).cpu() for name in found[0]}
    return _in_bits(network, nats, sigmas, 0 if flow is None else flow_steps)


def _in_bits(network: LatentDiffusion, nats: dict[str, Tensor], sigmas: np.ndarray, flow_steps: int) -> Likelihood:
    """Nats of pictures as bits of their elements; the decoder's deviation is the one that makes them fewest."""
    height, width = network.architecture.size
    d = height * width * network.architecture.picture_channels
    steps, error, exact = nats.pop("steps"), nats.pop("error", None), nats.pop("exact", None)
    parts = {**nats, "diffusion": steps.sum(1)}
    variance = None
    if error is not None:
        variance = float(error.mean()) / d
        parts["decoder"] = diffusion.normal(error, d, variance)
    decades = diffusion.Bound(nats["prior"], steps, nats["last level"]).decades(sigmas)
    means = {name: float(part.mean()) / (d * math.log(2)) for name, part in parts.items()}
    means["quantisation"] = float(diffusion.bits_per_dimension(torch.zeros(()), d))
    return Likelihood(
        bound=_mean(diffusion.bits_per_dimension(torch.stack(list(parts.values())).sum(0), d)),
        exact=None if exact is None else _mean(diffusion.bits_per_dimension(exact, d)),
        parts=means,
        levels=[(sigma, value / (d * math.log(2))) for sigma, value in decades.items()],
        decoder_std=None if variance is None else variance**0.5,
        pictures=len(steps),
        size=(width, height),
        channels=network.architecture.picture_channels,
        told=tuple(network.conditioners),
        steps=len(sigmas) - 1,
        flow_steps=flow_steps,
    )


def _mean(values: Tensor) -> Mean:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(float(values.mean()), error)


def _pictures(network: LatentDiffusion, source: Source, count: int | None) -> Pictures:
    """The pictures as the model takes them; InputError where there is no likelihood of them."""
    height, width = network.architecture.size
    if height != width:
        raise InputError(f"this model draws {width}x{height} pixels; a likelihood is counted for square models alone")
    first = network.architecture.first_stage
    if first is not None and first.codes is not None:
        raise InputError("this model's first stage rounds to a codebook: its latents have no density to count bits of")
    chosen = source if count is None else source.subset(range(min(count, len(source))))
    if not len(chosen):
        raise InputError("there are no pictures to count the likelihood of", exit_code=2)
    deep = [item.key for item in chosen.items if item.depth != "uint8"]
    if deep:
        raise InputError(f"{deep[0]} has more than 8 bits a sample; bits are counted of 8-bit pictures alone")
    return Pictures(chosen, Transform(size=height, channels=network.architecture.picture_channels), 0)


def _told(network: LatentDiffusion, source: Source, rows: range) -> dict[str, list[Any]]:
    """What the model is told of each picture: its caption and its class."""
    said = {"text": [source.items[i].caption for i in rows], "label": [source.items[i].label for i in rows]}
    values = {}
    for name in network.conditioners.keys() & said.keys():
        absent = network.conditioner(name).absent(len(rows))
        values[name] = [other if value is None else value for value, other in zip(said[name], absent)]
    return values


def _dequantised(pictures: Pictures, index: int, seed: int) -> Tensor:
    """The picture with noise as wide as one of its 256 values."""
    x = pictures.sample(index, index)
    return x + (keyed_uniform(x.shape, seed, "dequantise", index) - 0.5) * BIN


def _latents(network: LatentDiffusion, pixels: Tensor, rows: range, seed: int) -> tuple[Tensor, Tensor]:
    """Model latents drawn from the posterior, and minus its entropy (of pixels: what their scale adds), nats `b`."""
    stage = network.first_stage
    if stage.autoencoder is None:
        z = stage.standardise(pixels)
        return z, stage.latent_std.double().log().sum().expand(len(z)) * z[0, 0].numel()
    moments = stage.moments(pixels)
    raw = posterior(moments)
    eps = torch.stack([keyed_normal(raw.mean.shape[1:], seed, "posterior", i) for i in rows]).to(raw.mean)
    entropy = 0.5 * (math.log(2 * math.pi * math.e) + raw.log_variance.double()).flatten(1).sum(1)
    scaled = stage.latent_std.double().log().sum() * raw.mean[0, 0].numel()
    return stage.from_moments(moments, eps), scaled - entropy


def _log_density(denoise: Denoise, z: Tensor, sigmas: np.ndarray, rows: range, seed: int) -> Tensor:
    """log p of each picture by the probability flow, with one probe of its own."""
    probes = torch.stack([keyed_normal(z.shape[1:], seed, "probe", i) for i in rows]).sign()
    return diffusion.log_density(denoise, z, sigmas, probes[None].to(z.device))


def lines(found: Likelihood) -> Iterator[str]:
    """What a person reads."""
    told = " and ".join(found.told) or "nothing"
    yield f"{found.pictures} pictures of {found.size[0]}x{found.size[1]}x{found.channels}, the model told: {told}"
    for name, mean in (("at most", found.bound), ("exactly", found.exact)):
        if mean is not None:
            error = "" if mean.error is None else f" +- {mean.error:.4f}"
            yield f"{name:9}{mean.value:8.4f}{error} bits per dimension (8-bit pixels, dequantised evenly)"
    for name, value in found.parts.items():
        yield f"  {name:14}{value:9.4f}"
    for sigma, value in found.levels:
        yield f"    sigma from {sigma:<7g}{value:9.4f}"
    if found.decoder_std is not None:
        yield f"  the decoder's deviation is {found.decoder_std:.4f}, which suits these pictures best"
