"""What lies between encoder and decoder: a posterior pulled towards N(0, I), a codebook, levels, or nothing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEARLY_NOTHING = -30.0
"""The log-variance of a latent that is certain."""
EDGE = 0.001
"""How far beyond the outermost level a bounded latent can come, in levels: there it has a gradient still."""


class Posterior(NamedTuple):
    """A diagonal Gaussian over raw latents, `mean` and `log_variance` each `b c h w`."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, `b c h w`."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL(posterior || N(0, I)) in nats per latent element, averaged over the batch (Kingma & Welling, B)."""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance).mean()


def exact(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def posterior(moments: Tensor) -> Posterior:
    """Split `b 2c h w` into a posterior, computed in float32 at least, log-variance clamped to [-30, 20]."""
    mean, log_variance = exact(moments).chunk(2, dim=1)
    return Posterior(mean, torch.clamp(log_variance, NEARLY_NOTHING, 20.0))


def certain(latents: Tensor) -> Posterior:
    """The posterior of latents without noise, float32 at least."""
    mean = exact(latents)
    return Posterior(mean, torch.full_like(mean, NEARLY_NOTHING))


class Codebook(nn.Module):
    """Rounds each latent cell to the nearest of `codes` vectors (van den Oord et al. 2017, eq. 1 and 2)."""

    ROWS = 4096
    """Cells that are compared with all codes at a time."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes))

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code of each cell: `b c h w -> b h w`."""
        cells, vectors = exact(z.detach().movedim(1, -1).flatten(0, 2)), exact(self.vectors.detach())
        size = vectors.square().sum(1)
        found = [(size - 2 * rows @ vectors.T).argmin(1) for rows in cells.split(self.ROWS)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Tensor:
        """The codes themselves, `b c h w -> b c h w`; their gradient goes to `z` as it is."""
        return straight_through(z, self.vectors[self.nearest(z)].movedim(-1, 1))

    def errors(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared distance of latents to their codes, twice: its gradient goes to the codes, or to the latents."""
        codes = F.embedding(index, self.vectors).movedim(-1, 1)
        return (codes - z.detach()).square().mean(), (z - codes.detach()).square().mean()


class Levels(nn.Module):
    """Rounds channel i of a latent in [-1, 1] to `levels[i]` values (finite scalar quantisation, Mentzer et al. 2023).

    An even number has one value more below zero than above.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels

    def bound(self, z: Tensor) -> Tensor:
        """Any latents `b c h w` to within the outermost values, zero to zero (section 3 there)."""
        half, shift = self._measures(z)
        edge = half + EDGE
        return (torch.tanh(z + torch.atanh(shift / edge)) * edge - shift) / (half + shift)

    def forward(self, z: Tensor) -> Tensor:
        """The nearest values, `b c h w -> b c h w`; their gradient goes to `z` as it is."""
        half, shift = self._measures(z)
        scale = half + shift
        return straight_through(z, torch.clamp((z * scale).round(), -scale, half - shift) / scale)

    def nearest(self, z: Tensor) -> Tensor:
        """Number of the values of each cell, 0 to the product of `levels` - 1, the last channel's first to change.

        `b c h w -> b h w`.
        """
        number = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        for count, values in zip(self.levels, self(z.detach()).unbind(1), strict=True):
            number = number * count + ((values + 1) * (count // 2)).round().long()
        return number

    def _measures(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Half the distance of the outermost values, in levels, and how far below 0 its middle is: `c 1 1` each."""
        counts = torch.tensor(self.levels, dtype=like.dtype, device=like.device)[:, None, None]
        return (counts - 1) / 2, (counts % 2 == 0) * 0.5


def straight_through(z: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `z` (Bengio et al. 2013)."""
    return rounded.detach() + (z - z.detach()) if z.requires_grad else rounded
