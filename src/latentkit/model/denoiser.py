"""Denoiser: the U-Net inside its preconditioning; the only place where precisions meet."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentkit.diffusion.prediction import PREDICTIONS
from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.diffusion.schedule import SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError, nearest
from latentkit.model.conditioning import Conditioning
from latentkit.nets.unet import UNet, UNetConfig

PredictionName = Literal["eps", "v", "x0", "flow"]


class Denoiser(nn.Module):
    """x0 = c_skip x + c_out F(c_in x, timestep, conditioning), float32 outside, the U-Net's own type inside."""

    def __init__(self, config: UNetConfig, schedule: NoiseSchedule, prediction: str) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise InputError(f"prediction {prediction!r} is unknown; {nearest(prediction, PREDICTIONS)}")
        if prediction == "eps" and schedule.sigma_max >= SIGMA_CAP:
            raise InputError(
                "prediction 'eps' says nothing of the picture in the pure noise at which this noise schedule ends; "
                "take prediction 'v', 'x0' or 'flow', or a schedule that ends at a finite sigma"
            )
        self.unet = UNet(config)
        self.schedule = schedule
        self.prediction = PREDICTIONS[prediction]

    def network(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
        perturbed: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """F at the noise levels `sigma` `b` (on the CPU), float32: what the training loss compares with the target."""
        timestep = torch.from_numpy(self.schedule.to_timestep(sigma.double().numpy())).to(x.device, torch.float32)
        scaled = x.float() * self.prediction.c_in(sigma).to(x.device, torch.float32)[:, None, None, None]
        if conditioning.concat is not None:
            scaled = torch.cat([scaled, conditioning.concat.to(scaled)], dim=1)
        dtype = self.unet.conv_in.weight.dtype
        context, vector = conditioning.context, conditioning.vector
        return self.unet(
            scaled.to(dtype),
            timestep,
            None if context is None else context.to(dtype),
            None if vector is None else vector.to(dtype),
            conditioning.mask,
            perturbed=perturbed,
        ).float()

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        conditioning: Conditioning,
        perturbed: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """The estimate of x0."""
        rows = sigma.double()[:, None, None, None]
        skip, out = (f(rows).to(x.device, torch.float32) for f in (self.prediction.c_skip, self.prediction.c_out))
        return skip * x + out * self.network(x, sigma, conditioning, perturbed)

    def bind(self, conditioning: Conditioning, perturbed: bool = False) -> Denoise:
        """The denoiser that samplers call, its conditioning fixed; `perturbed` as in `UNet`."""

        def denoise(x: Tensor, sigma: float) -> Denoised:
            return Denoised(self(x, torch.full((len(x),), sigma, dtype=torch.float64), conditioning, perturbed))

        return denoise
