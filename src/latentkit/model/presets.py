"""Presets: named architectures of released models (their text encoders apart)."""

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError, nearest
from latentkit.model.latent_diffusion import Architecture
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.unet import UNetConfig

KL_F8 = AutoencoderConfig(
    picture_channels=3, latent_channels=4, channels=128, multipliers=(1, 2, 4, 4), blocks=2, stem=1, attention=True
)
"""Stable Diffusion's autoencoder, all versions (Rombach et al. 2022, table 8: kl-f8)."""

SCHEDULE = NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
"""Stable Diffusion's noise, all versions."""

SD1 = UNetConfig(
    channels=320,
    multipliers=(1, 2, 4, 4),
    depth=(1, 1, 1, 0),
    middle_depth=1,
    heads=8,
    context_width=768,
    linear_projection=False,
)
SD2 = UNetConfig(
    channels=320,
    multipliers=(1, 2, 4, 4),
    depth=(1, 1, 1, 0),
    middle_depth=1,
    heads=None,
    head_width=64,
    context_width=1024,
)
SDXL = UNetConfig(
    channels=320,
    multipliers=(1, 2, 4),
    depth=(0, 2, 10),
    middle_depth=10,
    heads=None,
    head_width=64,
    context_width=2048,
    vector_width=2816,
)
"""The vector is the pooled text (1280) beside six sizes and crops as waves of 256."""

PRESETS = {
    "sd1.5": Architecture(SD1, KL_F8, size=(512, 512), schedule=SCHEDULE, prediction="eps"),
    "sd2.1-base": Architecture(SD2, KL_F8, size=(512, 512), schedule=SCHEDULE, prediction="eps"),
    "sd2.1": Architecture(SD2, KL_F8, size=(768, 768), schedule=SCHEDULE, prediction="v"),
    "sdxl": Architecture(SDXL, KL_F8, size=(1024, 1024), schedule=SCHEDULE, prediction="eps"),
}


def preset(name: str) -> Architecture:
    """The architecture called `name`; InputError with the nearest names otherwise."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; {nearest(name, PRESETS)}", exit_code=2)
    return PRESETS[name]
