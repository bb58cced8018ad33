"""The objective of the first stage: reconstruct, keep what people see, please a critic, and keep latents in order."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from latentkit.diffusion.noise import keyed_batch, keyed_uniform
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.bottleneck import exact, straight_through
from latentkit.nets.critics import PatchCritic
from latentkit.nets.perceptual import PerceptualDistance
from latentkit.training import collapse
from latentkit.training.first_stage import adversarial, codebook
from latentkit.training.first_stage.adversarial import Adversarial, Adversary
from latentkit.training.first_stage.codebook import CodebookLoss
from latentkit.training.first_stage.equivariance import change_of, changed
from latentkit.training.first_stage.losses import focal_frequency, high_bands_l1, pyramid_l1, structure
from latentkit.training.first_stage.perceptual import Perceptual

Shared = dict[str, Tensor]
ATTEMPT = 1_000_000_007
"""What a roll-back adds to the seed."""
RUNNING = 0.99
"""Decay of the latents' running mean and mean square by channel."""


class ReconstructionLoss(BaseModel):
    """Weights of the parts of the loss, each a mean over pixels (or latent elements)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    pyramid: float = Field(default=0.5, ge=0)
    structure: float = Field(default=0.1, ge=0)
    wavelet: float = Field(default=0.0, ge=0)
    frequency: float = Field(default=0.0, ge=0)
    perceptual: Perceptual | None = None
    output_variance: bool = False
    """Learn the variance of pixels about their reconstruction, which divides all parts above (Rombach 2022, G)."""
    kl: float = Field(default=1e-4, ge=0)
    """Of the KL bottleneck. The published 1e-6 is of sums: times latent elements over picture elements here."""
    codebook: CodebookLoss = CodebookLoss()
    adversarial: Adversarial | None = None
    equivariance: float = Field(default=0.0, ge=0)
    """Of the parts above but the perceptual one, between what scaled and turned latents decode to and such pictures."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Largest deviation of noise added to latents before they are decoded, in deviations of their channel."""


DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda a, b: (a - b).abs().mean(),
    "l2": lambda a, b: (a - b).square().mean(),
    "pyramid": pyramid_l1,
    "structure": structure,
    "wavelet": high_bands_l1,
    "frequency": focal_frequency,
}


class AutoencoderObjective:
    """Encode, sample the posterior or round, decode, compare; with a critic, its own turn after that.

    `perceptual` is the network of that part of the loss. With `frozen_encoder` only the decoder learns.
    """

    elementwise = ("encoder.conv_in", "to_moments", "from_latent", "decoder.conv_out", "codebook")
    shared = (*codebook.STATE, *collapse.STATE, "adaptive_weight", "anchor_real", "anchor_fake", "latent_moments")
    summed = (*codebook.SUMS, *adversarial.SUMS, "psnr", "latent_sums")

    def __init__(
        self,
        autoencoder: Autoencoder,
        weights: ReconstructionLoss,
        seed: int,
        *,
        perceptual: PerceptualDistance | None = None,
        frozen_encoder: bool = False,
    ) -> None:
        assert (perceptual is None) == (weights.perceptual is None), "the loss's perceptual part needs its network"
        self.autoencoder = autoencoder
        self.weights = weights
        self.seed = seed
        self.perceptual = perceptual
        self.frozen_encoder = frozen_encoder
        self.attempt = 0
        self.log_variance = nn.Parameter(torch.zeros(())) if weights.output_variance else None
        self.adversary: Adversary | None = None
        parts: dict[str, nn.Module] = {}
        if weights.adversarial is not None:
            critic = PatchCritic(autoencoder.config.picture_channels, weights.adversarial.network)
            self.adversary, parts["critic"] = Adversary(critic, weights.adversarial), critic
        if self.log_variance is not None:
            parts["output"] = nn.ParameterDict({"log_variance": self.log_variance})
        self.module: nn.Module = nn.ModuleDict({"autoencoder": autoencoder, **parts}) if parts else autoencoder
        if frozen_encoder:
            autoencoder.encoder.requires_grad_(False)
            autoencoder.to_moments.requires_grad_(False)
        if autoencoder.codebook is not None and (weights.codebook.running_mean is not None or frozen_encoder):
            autoencoder.codebook.requires_grad_(False)

    def turns(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """What the autoencoder's optimiser moves, and the critic's."""
        own = [pair for pair in self.autoencoder.named_parameters() if pair[1].requires_grad]
        if self.log_variance is not None:
            own.append(("log_variance", self.log_variance))
        turns = {"autoencoder": own}
        if self.adversary is not None:
            turns["critic"] = list(self.adversary.critic.named_parameters())
        return turns

    def active(self, turn: str, step: int) -> bool:
        """Whether a turn learns at a step."""
        return turn != "critic" or self.weights.adversarial is None or self.weights.adversarial.learning(step)

    def doubtful(self, shared: Shared) -> bool:
        """Whether the present weights are not worth a checkpoint."""
        return self.adversary is not None and collapse.doubtful(shared)

    def loss(self, turn: str, batch: dict[str, Any], shared: Shared) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts, and each part; randomness is keyed by (seed, draw) or (seed, step)."""
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        if turn == "critic":
            assert self.adversary is not None
            return self.adversary.loss(pixels, shared)
        z, rounded, loss, logs = self._latents(pixels, batch["draw"], shared)
        decoded = exact(self.autoencoder.decode_rounded(rounded))
        difference, parts = self._by_pixels(decoded, pixels, int(batch.get("step", 0)), shared)
        loss = loss + difference
        change = change_of(int(batch["step"]), self._key) if self.weights.equivariance else None
        if change is not None:
            moved = exact(self.autoencoder.decode(changed(z, *change, 1)))
            target = changed(pixels, *change, self.autoencoder.config.downsampling)
            parts["equivariance"] = self._difference(moved, target)[0]
            loss = loss + self.weights.equivariance * parts["equivariance"]
        error = ((decoded.detach().clamp(-1, 1) - pixels) / 2).square().flatten(1).mean(1)
        psnr = -10 * torch.log10(error.clamp_min(1e-10))
        shared["psnr"], shared["pictures"] = psnr.sum(), torch.tensor(float(len(pixels)), device=pixels.device)
        return loss, logs | {name: value.detach() for name, value in parts.items()} | {"psnr": psnr.mean()}

    def settle(self, turn: str, step: int, sums: Shared, shared: Shared) -> dict[str, float]:
        """Take the sums over the global batch into what is kept from step to step; raises Collapse."""
        if turn == "critic":
            assert self.adversary is not None
            self.adversary.settle_critic(sums, shared)
            return {}
        logs: dict[str, float] = {}
        moments = sums["latent_sums"][:-1].view(2, -1) / sums["latent_sums"][-1]  # mean and mean square
        shared["latent_moments"] = torch.lerp(moments, shared.get("latent_moments", moments), RUNNING)
        if self.autoencoder.codebook is not None and not self.frozen_encoder:
            logs |= codebook.settle(self.autoencoder.codebook, self.weights.codebook, sums, shared, self._key, step)
        elif "codebook_chosen" in sums:
            logs |= codebook.followed(sums["codebook_chosen"], shared)
        if self.adversary is not None:
            if "slope_verdict" in sums:
                logs |= self.adversary.settle_decoder(sums, shared)
            collapse.watch(sums["psnr"] / sums["pictures"], shared, counts="adaptive_weight" in shared)
        return logs

    @property
    def _key(self) -> int:
        return self.seed + ATTEMPT * self.attempt

    def _latents(
        self, pixels: Tensor, draws: Tensor, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Latents before rounding, after it, their own part of the loss, and what to log of it."""
        with torch.set_grad_enabled(not self.frozen_encoder and torch.is_grad_enabled()):
            found = self.autoencoder.encode(pixels)
        shape, weights, logs = found.mean.shape[1:], self.weights, {}
        loss, z = found.mean.new_zeros(()), found.mean
        if self.autoencoder.config.has_posterior:
            z = found.sample(keyed_batch(draws, shape, self._key, "posterior").to(z))
            if not self.frozen_encoder:
                logs["kl"] = found.kl()
                loss = weights.kl * logs["kl"]
        shared["latent_sums"] = _sums(z)
        decodable = z
        if weights.latent_noise and "latent_moments" in shared:
            mean, square = shared["latent_moments"]
            sizes = torch.cat([keyed_uniform((1,), self._key, "latent size", int(draw)) for draw in draws]).to(z)
            noise = keyed_batch(draws, shape, self._key, "latent noise").to(z)
            deviation = (square - mean.square()).clamp_min(0).sqrt()[:, None, None]
            decodable = z + weights.latent_noise * sizes[:, None, None, None] * deviation * noise
        book = self.autoencoder.codebook
        if book is None:
            levels = self.autoencoder.levels
            if levels is not None:
                shared |= codebook.counted(levels, decodable)
            return z, decodable if levels is None else levels(decodable), loss, _detached(logs)
        index = book.nearest(decodable)
        rounded = straight_through(decodable, book.vectors[index].movedim(-1, 1))
        if not self.frozen_encoder:
            logs["codes"], logs["commitment"] = book.errors(decodable, index)
            loss = loss + weights.codebook.commitment * logs["commitment"]
            if weights.codebook.running_mean is None:
                loss = loss + weights.codebook.codes * logs["codes"]
            shared |= codebook.chosen(book, decodable, index, draws, self._key)
        return z, rounded, loss, _detached(logs)

    def _by_pixels(
        self, decoded: Tensor, pixels: Tensor, step: int, shared: Shared
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All parts that compare pixels, and the critic's verdict with its weight.

        Each part's gradient by the decoded pixels is taken once, and serves both the adaptive weight and the decoder.
        """
        shared["decoded"] = decoded.detach()
        shown = decoded.detach().requires_grad_()
        difference, parts = self._difference(shown, pixels)
        if self.perceptual is not None and self.weights.perceptual is not None:  # both or none
            with torch.autocast(pixels.device.type, enabled=False):
                parts["perceptual"] = self.perceptual(shown, pixels).mean()
            difference = difference + self.weights.perceptual.weight * parts["perceptual"]
        (slope,) = torch.autograd.grad(difference, shown)
        loss = difference.detach()
        if self.log_variance is not None:
            parts["log_variance"] = self.log_variance
            loss = loss * (-self.log_variance).exp() + self.log_variance
            slope = slope * (-self.log_variance.detach()).exp()
        if self.adversary is not None and self.adversary.settings.measuring(step):
            verdict = -exact(self.adversary.critic(shown)).mean()
            (by_verdict,) = torch.autograd.grad(verdict, shown)
            last, count = self.autoencoder.decoder.conv_out.weight, len(pixels)
            for name, part in (("slope_difference", slope), ("slope_verdict", by_verdict)):
                shared[name] = count * torch.autograd.grad(decoded, last, part, retain_graph=True)[0]
            weight = self.adversary.weight(step, self.attempt, shared).to(verdict)
            parts["verdict"] = verdict
            loss, slope = loss + weight * verdict.detach(), slope + weight * by_verdict
        carried = (decoded * slope).sum()
        return loss + (carried - carried.detach()), _detached(parts)

    def _difference(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts that need no network, and each."""
        weighted = {name: weight for name in DIFFERENCES if (weight := getattr(self.weights, name))}
        parts = {name: DIFFERENCES[name](a, b) for name in weighted}
        total = [weight * parts[name] for name, weight in weighted.items()]
        return torch.stack(total).sum() if total else a.sum() * 0, parts


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parts.items()}


def _sums(z: Tensor) -> Tensor:
    """Sum and sum of squares of each channel of `b c h w`, and how many they are of, as one row."""
    rows = z.detach().float().movedim(1, 0).flatten(1)
    return torch.cat([rows.sum(1), rows.square().sum(1), rows.new_tensor([rows.shape[1]])])
