"""The objective of the first stage: reconstruct, keep structure at several scales, and pull latents to N(0, I)."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from latentkit.diffusion.noise import keyed_batch
from latentkit.nets.autoencoder import Autoencoder
from latentkit.training.losses import pyramid_l1, structure


class ReconstructionLoss(BaseModel):
    """Weights of the parts of the loss, each a mean over pixels (or latent elements)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    l1: float = Field(default=1.0, ge=0)
    pyramid: float = Field(default=0.5, ge=0)
    structure: float = Field(default=0.1, ge=0)
    kl: float = Field(default=1e-4, ge=0)


class AutoencoderObjective:
    """One turn: encode, sample the posterior, decode, compare."""

    elementwise = ("encoder.conv_in", "to_moments", "from_latent", "decoder.conv_out")

    def __init__(self, autoencoder: Autoencoder, weights: ReconstructionLoss, seed: int) -> None:
        self.module: nn.Module = autoencoder
        self.autoencoder = autoencoder
        self.weights = weights
        self.seed = seed

    def turns(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """All parameters, one optimiser."""
        return {"autoencoder": list(self.autoencoder.named_parameters())}

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts, and each part; posterior noise is keyed by (seed, draw)."""
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        posterior = self.autoencoder.encode(pixels)
        noise = keyed_batch(batch["draw"], posterior.mean.shape[1:], self.seed, "posterior").to(pixels.device)
        decoded = self.autoencoder.decode(posterior.sample(noise)).float()
        parts = {
            "l1": (decoded - pixels).abs().mean(),
            "pyramid": pyramid_l1(decoded, pixels),
            "structure": structure(decoded, pixels),
            "kl": posterior.kl(),
        }
        loss = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        error = ((decoded.detach().clamp(-1, 1) - pixels) / 2).square().flatten(1).mean(1)
        logs = {name: value.detach() for name, value in parts.items()}
        return loss, logs | {"psnr": (-10 * torch.log10(error.clamp_min(1e-10))).mean()}
