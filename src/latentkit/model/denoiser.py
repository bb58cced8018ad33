"""Denoiser: the U-Net inside its preconditioning; the only place where precisions meet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentkit.diffusion.prediction import PREDICTIONS, consistency
from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError, nearest
from latentkit.model.conditioning import Conditioning
from latentkit.nets.controlnet import Control, residuals
from latentkit.nets.layers import sinusoids
from latentkit.nets.unet import UNet, UNetConfig

PredictionName = Literal["eps", "v", "x0", "flow", "edm", "score"]
NOISE_ALONE = ("eps", "score")
GUIDANCE = "guidance"
"""What the guidance scale is called in `Conditioning.extras`."""


@dataclass(frozen=True)
class ConsistencyConfig:
    """A latent consistency model: it goes to x0 in one step from any noise level (Luo et al. 2023)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    scale: float = 10.0
    """What a timestep is multiplied with in the scalings that make x0 the latent itself at timestep 0."""
    guidance_width: int | None = None
    """Width of the waves in which it is told a guidance scale; None: it is told none."""


class Denoiser(nn.Module):
    """x0 = c_skip x + c_out F(c_in x, timestep, conditioning), float32 outside, the U-Net's own type inside."""

    def __init__(
        self,
        config: UNetConfig,
        schedule: NoiseSchedule,
        prediction: str,
        learned_variance: bool = False,
        consistent: ConsistencyConfig | None = None,
    ) -> None:
        """With `learned_variance` the U-Net's output has the latent's channels twice (Nichol & Dhariwal 2021).

        `consistent` makes it a consistency model, distilled from one of this prediction.
        """
        super().__init__()
        if prediction not in PREDICTIONS:
            raise InputError(f"prediction {prediction!r} is unknown; {nearest(prediction, PREDICTIONS)}")
        if prediction in NOISE_ALONE and schedule.sigma_max >= SIGMA_CAP:
            raise InputError(
                f"prediction {prediction!r} says nothing of the picture in the pure noise at which this noise schedule "
                "ends; take prediction 'v', 'x0', 'flow' or 'edm', or a schedule that ends at a finite sigma"
            )
        self.unet = UNet(config)
        self.schedule = schedule
        self.prediction = PREDICTIONS[prediction]
        self.learned_variance = learned_variance
        self.guidance_embedding = None
        if consistent is not None:
            self.prediction = consistency(self.prediction, schedule, scale=consistent.scale)
            if consistent.guidance_width:
                self.guidance_embedding = nn.Linear(consistent.guidance_width, config.channels, bias=False)

    def network(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
        perturbed: bool = False,
        controls: Sequence[Control] = (),
    ) -> Float[Tensor, "b o h w"]:
        """The U-Net's output at the noise levels `sigma` `b` (on the CPU), float32: F, or what `parts` takes apart.

        `controls` are ControlNets, whose hints lie in `conditioning.extras`, as the guidance scale `b` does that a
        consistency model is told.
        """
        timestep = torch.from_numpy(self.schedule.to_timestep(sigma.double().numpy())).to(x.device, torch.float32)
        scaled = x.float() * self.prediction.c_in(sigma).to(x.device, torch.float32)[:, None, None, None]
        dtype = self.unet.conv_in.weight.dtype
        context = None if conditioning.context is None else conditioning.context.to(dtype)
        # The vector stays as it is: a row of a table of classes is a number that bfloat16 would round.
        told = timestep, context, conditioning.vector, conditioning.mask
        added = {}
        if controls:
            added = {"residuals": residuals(controls, conditioning.extras, scaled.to(dtype), *told)}
        if conditioning.concat is not None:
            scaled = torch.cat([scaled, conditioning.concat.to(scaled)], dim=1)
        if self.guidance_embedding is not None and GUIDANCE in conditioning.extras:
            waves = guidance_waves(conditioning.extras[GUIDANCE], self.guidance_embedding.in_features)
            beside = self.guidance_embedding(waves.to(self.guidance_embedding.weight))
            told = sinusoids(timestep, self.unet.config.channels).to(dtype) + beside, *told[1:]
        return self.unet(scaled.to(dtype), *told, perturbed=perturbed, **added).float()

    def parts(self, output: Float[Tensor, "b o h w"]) -> tuple[Tensor, Tensor | None]:
        """F `b c h w`, which the training loss compares with the target, and `Denoised.log_variance` if learned."""
        if not self.learned_variance:
            return output, None
        f, v = output.chunk(2, dim=1)
        return f, (v + 1) / 2

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
        perturbed: bool = False,
        controls: Sequence[Control] = (),
    ) -> Float[Tensor, "b o h w"]:
        """The estimate of x0, and behind its channels `Denoised.log_variance` if learned."""
        rows = sigma.double()[:, None, None, None]
        skip, out = (f(rows).to(x.device, torch.float32) for f in (self.prediction.c_skip, self.prediction.c_out))
        f, share = self.parts(self.network(x, sigma, conditioning, perturbed, controls))
        x0 = skip * x + out * f
        return x0 if share is None else torch.cat([x0, share], dim=1)

    def bind(self, conditioning: Conditioning, perturbed: bool = False, controls: Sequence[Control] = ()) -> Denoise:
        """The denoiser that samplers call, its conditioning fixed; `perturbed` as in `UNet`."""

        def denoise(x: Tensor, sigma: float) -> Denoised:
            working = [control for control in controls if control.low < sigma <= control.high]
            answer = self(x, torch.full((len(x),), sigma, dtype=torch.float64), conditioning, perturbed, working)
            x0, *share = answer.split(x.shape[1], dim=1)
            return Denoised(x0, log_variance=share[0] if share else None)

        return denoise


def guidance_waves(scale: Float[Tensor, " b"], width: int) -> Float[Tensor, "b d"]:
    """Sines and then cosines of 1000 (scale - 1), of periods 2 pi to 2 pi 1e4 both included, float32.

    Source: Luo et al. 2023, section 4.2, by the embedding of Kingma et al. 2021 (its code).
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * (-math.log(1e4) / (half - 1)))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
