"""The adversarial part of the first stage: when it counts, how much, and what the critic learns from."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentkit.nets.bottleneck import exact
from latentkit.nets.critics import CriticConfig, PatchCritic
from latentkit.training.optimizers import Optimiser

ANCHOR = 0.99
"""Decay of LeCam's running verdicts."""
SUMS = ("pictures", "slope_difference", "slope_verdict", "verdict_real", "verdict_fake")


class Adversarial(BaseModel):
    """Settings of the critic's part; the published ones differ in `most`, `warmup`, `ramp` and `r1`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(ge=0)
    """The step from which the critic's verdict counts."""
    warmup: int = Field(default=500, ge=0)
    """Steps before `start` in which the critic alone learns."""
    ramp: int = Field(default=500, ge=1)
    """Steps from `start` over which the verdict comes to count in full."""
    weight: float = Field(default=0.5, ge=0)
    most: float = Field(default=1.0, gt=0)
    """Largest adaptive weight, which `weight` multiplies."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    lecam: float = Field(default=0.0, ge=0)
    """Weight that keeps verdicts near the other side's running verdict (Tseng et al. 2021)."""
    r1: float = Field(default=0.1, ge=0)
    """Weight of the squared slope of verdicts at real pictures (Mescheder et al. 2018)."""
    network: CriticConfig = CriticConfig()
    optimiser: Optimiser = Optimiser(lr=5e-4, betas=(0.5, 0.9))

    def share(self, step: int) -> float:
        """How much of its weight the verdict has at a step, 0 to 1."""
        return min(1.0, max(0.0, (step - self.start + 1) / self.ramp))

    def learning(self, step: int) -> bool:
        """Whether the critic learns at a step."""
        return step >= self.start - self.warmup

    def measuring(self, step: int) -> bool:
        """Whether the adaptive weight of the next step is measured at this one."""
        return step >= self.start - 1


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss on verdicts (Lim & Ye 2017), halved as in taming-transformers."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's cross-entropy on verdicts (Goodfellow et al. 2014), halved as in taming-transformers."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


LOSSES = {"hinge": hinge, "vanilla": vanilla}


def adaptive_weight(by_difference: Tensor, by_verdict: Tensor, most: float) -> Tensor:
    """|gradient of the difference| / (|gradient of the verdict| + 1e-4), at most `most` (Esser et al. 2021, eq. 7)."""
    return torch.clamp(torch.linalg.vector_norm(by_difference) / (torch.linalg.vector_norm(by_verdict) + 1e-4), 0, most)


def slope_penalty(critic: PatchCritic, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Verdicts on real pictures, and R1: half the squared slope of their sum by pixels, per verdict and picture."""
    pixels = pixels.detach().requires_grad_()
    verdicts = critic(pixels)
    (slope,) = torch.autograd.grad(verdicts.sum(), pixels, create_graph=True)
    return verdicts, 0.5 * slope.square().sum() / verdicts.numel()


class Adversary:
    """The critic at work: its own loss, and what the decoder's loss takes from it."""

    def __init__(self, critic: PatchCritic, settings: Adversarial) -> None:
        self.critic = critic
        self.settings = settings

    def weight(self, step: int, attempt: int, shared: dict[str, Tensor]) -> Tensor:
        """What the verdict is multiplied by: halved at each roll-back; 0 before the first measurement."""
        share = self.settings.share(step) * self.settings.weight * 0.5**attempt
        return share * shared.get("adaptive_weight", torch.zeros(()))

    def loss(self, pixels: Tensor, shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss on pictures and on what was decoded from them."""
        settings, count = self.settings, len(pixels)
        if settings.r1:
            real, penalty = slope_penalty(self.critic, pixels)
            real, fake = exact(real), exact(self.critic(shared["decoded"]))
        else:
            real, fake = exact(self.critic(torch.cat([pixels, shared["decoded"]]))).chunk(2)
            penalty = real.new_zeros(())
        loss = LOSSES[settings.loss](real, fake) + settings.r1 * penalty
        if settings.lecam and "anchor_real" in shared:
            near = (real - shared["anchor_fake"]).square().mean() + (fake - shared["anchor_real"]).square().mean()
            loss = loss + settings.lecam * near
        shared["pictures"] = real.new_tensor(float(count))
        shared["verdict_real"], shared["verdict_fake"] = real.mean() * count, fake.mean() * count
        told = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return loss, {"real": real.mean(), "fake": fake.mean(), "told_apart": told}

    def settle_critic(self, sums: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Move LeCam's running verdicts."""
        for side in ("real", "fake"):
            mean = sums[f"verdict_{side}"] / sums["pictures"]
            shared[f"anchor_{side}"] = torch.lerp(mean, shared.get(f"anchor_{side}", mean), ANCHOR)

    def settle_decoder(self, sums: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, float]:
        """Take the adaptive weight of the next step from the gradients of this one, over the global batch."""
        difference, verdict = (sums[f"slope_{name}"] / sums["pictures"] for name in ("difference", "verdict"))
        shared["adaptive_weight"] = adaptive_weight(difference, verdict, self.settings.most)
        return {"adaptive_weight": float(shared["adaptive_weight"])}
