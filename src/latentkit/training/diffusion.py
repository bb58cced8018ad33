"""The objective of the second stage: match the network's target at random noise levels."""

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from latentkit.diffusion import likelihood
from latentkit.diffusion.noise import keyed_batch, keyed_uniform
from latentkit.diffusion.prediction import WEIGHTS, step_divergence
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.diffusion.spacing import space
from latentkit.model.latent_diffusion import LatentDiffusion

GOLDEN = (math.sqrt(5) - 1) / 2
BOUND_LEVELS, BOUND_PICTURES = 24, 16
"""Noise levels and pictures that `DiffusionObjective.bound` sees."""
BOUND_SHARE = 0.001
"""Weight of the variational bound beside the squared error (Nichol & Dhariwal 2021, equation 16)."""


class SigmaSampling(BaseModel):
    """Which noise levels are trained: log-normal sigmas (a flow's logit-normal t), or uniform timesteps.

    ln sigma has `mean` and `std` (EDM: -1.2 and 1.2); a flow's shift moves them with its levels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def sigmas(self, draws: Tensor, schedule: NoiseSchedule, seed: int) -> Tensor:
        """One sigma per draw, float64, a pure function of (seed, draw).

        Draws walk the golden-ratio sequence, so that the levels of every batch cover the distribution evenly.
        """
        start = float(keyed_uniform((1,), seed, "sigma")[0])
        u = ((draws.cpu().numpy().astype(np.float64) * GOLDEN + start) % 1.0).clip(1e-6, 1 - 1e-6)
        if self.distribution == "uniform":
            sigmas = torch.from_numpy(schedule.at(u * (schedule.top + 1) - 1))
        else:
            sigmas = schedule.shift * torch.exp(self.mean + self.std * torch.special.ndtri(torch.from_numpy(u)))
        return sigmas.clamp(schedule.sigma_min, schedule.sigma_max)


class DiffusionLoss(BaseModel):
    """How noise levels are drawn and weighted, and how often the condition is dropped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma: SigmaSampling = SigmaSampling()
    weight: Literal["uniform", "min_snr", "edm"] = "uniform"
    condition_dropout: float = Field(default=0.1, ge=0, le=1)


class DiffusionObjective:
    """One turn: noise the cached latents, predict, compare. Conditioners train jointly with the U-Net."""

    def __init__(self, model: LatentDiffusion, settings: DiffusionLoss, seed: int) -> None:
        self.model = model
        self.module: nn.Module = nn.ModuleDict({"denoiser": model.denoiser, "conditioners": model.conditioners})
        self.settings = settings
        self.seed = seed
        self.elementwise = (
            "denoiser.unet.conv_in", "denoiser.unet.conv_out", "denoiser.unet.time_embedding",
            "conditioners.text.encoder.position_embedding",
        )  # fmt: skip

    def turns(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """U-Net and conditioners, one optimiser."""
        return {"diffusion": list(self.module.named_parameters())}

    def conditions(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """What each conditioner is told, some of it dropped (keyed by draw)."""
        values: dict[str, list[Any]] = {}
        for name in self.model.conditioners:
            conditioner = self.model.conditioner(name)
            absent = conditioner.absent(1)[0]
            given = conditioner.from_batch(batch)
            share = self.settings.condition_dropout
            dropped = [
                float(keyed_uniform((1,), self.seed, "dropout", name, int(draw))[0]) < share for draw in batch["draw"]
            ]
            values[name] = [absent if drop else value for value, drop in zip(given, dropped, strict=True)]
        return values

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Clean model latents: cached moments sampled anew, or pixels for the identity first stage."""
        if "pixels" in batch:
            pixels: Tensor = batch["pixels"]
            return pixels.float()
        moments = batch["moments"]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = keyed_batch(batch["draw"], shape, self.seed, "posterior").to(moments.device)
        return self.model.first_stage.from_moments(moments, noise)

    def errors(self, x0: Tensor, sigma: Tensor, eps: Tensor, values: dict[str, list[Any]]) -> Tensor:
        """Weighted squared error of each picture, `b`; `sigma` is float64 on the CPU."""
        denoiser = self.model.denoiser
        rows = sigma[:, None, None, None].to(x0.device, torch.float32)
        x = (x0 + rows * eps).contiguous(memory_format=torch.channels_last)
        predicted, share = denoiser.parts(denoiser.network(x, sigma, self.model.condition(values, len(x0))))
        target = denoiser.prediction.target(x0, eps, rows)
        weight = WEIGHTS[self.settings.weight](denoiser.prediction, sigma).to(x0.device, torch.float32)
        errors = weight * (predicted - target).square().flatten(1).mean(1)
        if share is None:
            return errors
        out = denoiser.prediction.c_out(sigma)[:, None, None, None].to(x0.device, torch.float32)
        return errors + BOUND_SHARE * self._bound(share, out * (predicted - target).detach(), sigma)

    def _bound(self, share: Tensor, error: Tensor, sigma: Tensor) -> Tensor:
        """The variational bound, bits per element, estimated from one step: that from `sigma` to a level below.

        Steps below the first level are the decoder's, which has no learned variance, and count nothing.
        """
        schedule = self.model.denoiser.schedule
        position = schedule.position(sigma.numpy())
        inner = position >= 1
        after = np.where(inner, schedule.at(np.maximum(position - 1, 0)), sigma.numpy() / 2)
        rows = [torch.as_tensor(v)[:, None, None, None].to(share.device, torch.float32) for v in (sigma, after, inner)]
        divergence = step_divergence(share, error, rows[0], rows[1]) * rows[2]
        return schedule.steps * divergence.flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bound(self, batch: dict[str, Any]) -> dict[str, float]:
        """The variational bound of the batch's first clean latents, nats per element: whole, and by tens of sigma.

        It is one of latents, not of pictures (for those: `evaluation/likelihood.py`).
        """
        batch = {k: v[:BOUND_PICTURES] for k, v in batch.items() if isinstance(v, Tensor | list)}
        x0 = self.latents(batch)
        told = {name: list(self.model.conditioner(name).from_batch(batch)) for name in self.model.conditioners}
        denoise = self.model.denoiser.bind(self.model.condition(told, len(x0)))
        sigmas = space("exponential", self.model.denoiser.schedule, BOUND_LEVELS)

        def draw(level: int) -> Tensor:
            return keyed_batch(batch["draw"], x0.shape[1:], level, "bound").to(x0.device)

        found = likelihood.bound(denoise, x0, sigmas, draw, 0.5)
        values = {"bound": float(found.total().mean())}
        values |= {f"bound_from_sigma_{sigma:g}": value for sigma, value in found.decades(sigmas).items()}
        return {name: value / x0[0].numel() for name, value in values.items()}

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch; sigma, noise and dropout are keyed by (seed, draw)."""
        x0 = self.latents(batch)
        sigma = self.settings.sigma.sigmas(batch["draw"], self.model.denoiser.schedule, self.seed)
        eps = keyed_batch(batch["draw"], x0.shape[1:], self.seed, "noise").to(x0.device)
        return self.errors(x0, sigma, eps, self.conditions(batch)).mean(), {}
