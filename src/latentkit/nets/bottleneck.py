"""The regulariser between encoder and decoder: a diagonal Gaussian posterior pulled towards N(0, I)."""

from typing import NamedTuple

import torch
from torch import Tensor


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
    return Posterior(mean, torch.clamp(log_variance, -30.0, 20.0))
