"""A feature network of our own: fixed random convolutions, the same weights on every machine, no download.

Random multi-scale filters see colour, edges, texture and coarse layout, not meaning. Figures made with it compare only
with figures of the same `NETWORK`, so that name goes with each of them.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.diffusion.noise import keyed_normal

NETWORK = "latentkit-random-conv-v1"
SIDE = 64
WIDTHS = (32, 64, 128, 128)
GRID = 2
WIDTH = sum(WIDTHS) * (GRID * GRID + 1)
CHUNK = 64


def features(pictures: Iterable[Tensor]) -> Tensor:
    """Features `n d` (float32, CPU) of pictures `c h w` in [-1, 1] of any sizes and one number of channels.

    Each picture is resampled to 64x64 (antialiased), brought to three channels, and passes four random 3x3
    convolutions with ReLU, each followed by 2x2 means; features are every filter's means in four quadrants and its
    deviation over the picture.
    """
    rows: list[Tensor] = []
    waiting: list[Tensor] = []
    weights: list[Tensor] = []
    projection = torch.empty(0)
    with torch.inference_mode():
        for picture in pictures:
            if not weights:
                projection, weights = _projection(picture.shape[0]), _weights()
            waiting.append(_seen(picture, projection))
            if len(waiting) == CHUNK:
                rows.append(_forward(waiting, weights))
                waiting = []
        if waiting:
            rows.append(_forward(waiting, weights))
    return torch.cat(rows) if rows else torch.empty(0, WIDTH)


def _seen(picture: Tensor, projection: Tensor) -> Tensor:
    """The picture as the network sees it, `3 64 64`."""
    x = picture.float().cpu()[None]
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return torch.einsum("oc,chw->ohw", projection, x[0])


@cache
def _projection(channels: int) -> Tensor:
    """Three mixtures of `channels`, `3 c`: themselves for RGB, three copies of gray, else fixed random ones."""
    if channels == 3:
        return torch.eye(3)
    if channels == 1:
        return torch.ones(3, 1)
    mixtures = keyed_normal((3, channels), NETWORK, "projection", channels)
    return F.normalize(mixtures, dim=1)


@cache
def _weights() -> list[Tensor]:
    """The filters of each convolution, `o i 3 3`, scaled so that the size of activations stays (He et al. 2015)."""
    shapes = zip(WIDTHS, (3, *WIDTHS), strict=False)
    return [
        keyed_normal((out, into, 3, 3), NETWORK, "filters", layer) * (2 / (9 * into)) ** 0.5
        for layer, (out, into) in enumerate(shapes)
    ]


def _forward(pictures: Sequence[Tensor], weights: list[Tensor]) -> Tensor:
    """Features `b d` of pictures `3 64 64`."""
    x = torch.stack(list(pictures))
    found = []
    for weight in weights:
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight))
        found.append(F.adaptive_avg_pool2d(x, GRID).flatten(1))
        found.append(x.flatten(2).std(2))
        x = F.avg_pool2d(x, 2)
    return torch.cat(found, 1)
