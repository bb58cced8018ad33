"""What lies between encoder and decoder: a diagonal Gaussian posterior pulled towards N(0, I), or a codebook."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

NEARLY_NOTHING = -30.0
"""The log-variance of a latent that is certain."""


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


def posterior(moments: Tensor) -> Posterior:
    """Split `b 2c h w` into a posterior, computed in float32, log-variance clamped to [-30, 20]."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return Posterior(mean, torch.clamp(log_variance, NEARLY_NOTHING, 20.0))


def certain(latents: Tensor) -> Posterior:
    """The posterior of latents without noise, float32."""
    mean = latents.float()
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
        exact = torch.promote_types(self.vectors.dtype, torch.float32)
        cells, vectors = z.movedim(1, -1).flatten(0, 2).to(exact), self.vectors.to(exact)
        size = vectors.square().sum(1)
        found = [(size - 2 * rows @ vectors.T).argmin(1) for rows in cells.split(self.ROWS)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Tensor:
        """The codes themselves: `b c h w -> b c h w`."""
        return self.vectors[self.nearest(z)].movedim(-1, 1)
