"""Tiny random models in the exact layout of each released family."""

from dataclasses import replace

import torch

from latentkit.diffusion.noise import keyed_normal
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioners.map import MapConfig
from latentkit.model.conditioners.numbers import NumbersConfig
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.clip import ClipTextConfig
from latentkit.nets.towers import BertTextConfig
from latentkit.nets.unet import UNetConfig

SCHEDULE = NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
KL = AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1)
VQ = replace(KL, latent_channels=3, codes=30)
L = ClipTextConfig(width=32, layers=3, heads=2)
H = ClipTextConfig(width=48, layers=2, heads=3, activation="gelu", pad=0)
G = ClipTextConfig(
    width=48, layers=3, heads=3, activation="gelu", projection=40, pad=0, skip=1, final_norm=False
)  # fmt: skip
UNET = UNetConfig(
    channels=32, multipliers=(1, 2, 2), blocks=1, depth=(1, 1, 0), heads=4, context_width=32, linear_projection=False
)
NUMBERS = NumbersConfig((32.0, 32.0, 0.0, 0.0, 32.0, 32.0), width=8)
COMMON = {"first_stage": KL, "size": (32, 32), "schedule": SCHEDULE, "prediction": "eps"}
V2 = replace(UNET, heads=None, head_width=16, context_width=48, linear_projection=True)
ARCHITECTURES = {
    "SD 1": Architecture(UNET, clip=ClipConfig((L,)), **COMMON),  # type: ignore[arg-type]
    "SD 1 inpainting": Architecture(
        replace(UNET, channels_in=9), clip=ClipConfig((L,)), concat_channels=5, **COMMON  # type: ignore[arg-type]
    ),
    "SD 2": Architecture(V2, clip=ClipConfig((H,)), **(COMMON | {"prediction": "v"})),  # type: ignore[arg-type]
    "XL": Architecture(
        replace(V2, depth=(0, 1, 2), middle_depth=2, context_width=80, vector_width=88),
        clip=ClipConfig((replace(L, skip=1, final_norm=False), G), absent="zero"),
        numbers=NUMBERS,
        **COMMON,  # type: ignore[arg-type]
    ),
    "refiner": Architecture(
        replace(V2, depth=(0, 2, 0), middle_depth=2, vector_width=80),
        clip=ClipConfig((G,)),
        numbers=NumbersConfig((32.0, 32.0, 0.0, 0.0, 6.0), width=8),
        **COMMON,  # type: ignore[arg-type]
    ),
    "churches": Architecture(
        UNetConfig(
            channels=32, multipliers=(1, 2, 2), blocks=1, depth=(1, 1, 0), plain_attention=True, scale_shift=True,
            residual_resampling=True,
        ),
        **COMMON,  # type: ignore[arg-type]
    ),
    "classes": Architecture(
        replace(UNET, channels_in=3, channels_out=3, heads=1, context_width=24),
        label=LabelConfig(24, vector=False),
        **(COMMON | {"first_stage": VQ}),  # type: ignore[arg-type]
    ),
    "semantic": Architecture(
        UNetConfig(
            channels_in=6, channels_out=3, channels=32, multipliers=(1, 2), blocks=1, depth=(0, 0), plain_attention=True
        ),
        map=MapConfig(7, 3, 2),
        **(COMMON | {"first_stage": VQ}),  # type: ignore[arg-type]
    ),
    "layout": Architecture(
        replace(UNET, channels_in=3, channels_out=3, heads=1, context_width=24),
        layout=BertTextConfig(40, 14, 24, 2, 2, 8),
        **(COMMON | {"first_stage": VQ}),  # type: ignore[arg-type]
    ),
    "text of 2021": Architecture(
        replace(UNET, context_width=24), bert=BertTextConfig(50, 7, 24, 2, 2, 8), **COMMON  # type: ignore[arg-type]
    ),
}  # fmt: skip


def model(family: str, dtype: torch.dtype = torch.float32, scale: float = 0.18215) -> LatentDiffusion:
    """Always the same, with no weight at zero."""
    made = LatentDiffusion(ARCHITECTURES[family], {"label": {"classes": ["cat", "dog"]}})
    for index, (name, parameter) in enumerate(made.named_parameters()):
        drawn = keyed_normal(parameter.shape, 1, index, name)
        if parameter.ndim > 1:
            parameter.data = drawn * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * drawn + float(name.endswith("weight"))
    made.first_stage.latent_std.fill_(1 / scale)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made.eval().requires_grad_(False)
