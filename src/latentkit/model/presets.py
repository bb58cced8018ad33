"""Presets: the architectures of released models, Stable Diffusion's family and those of 2021, by name.

Sources: the configs of CompVis/latent-diffusion, CompVis/stable-diffusion, Stability-AI/stablediffusion and
generative-models. Heads are those that the weights were trained with: of the 2021 models cin256, text2img256 and
layout2img-openimages256 the last released code would take others, without an error.
"""

from dataclasses import replace
from typing import NamedTuple, cast

from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError, nearest
from latentkit.model.conditioners.clip import REFINER_TEXT, SD1_TEXT, SD2_TEXT, SDXL_TEXT
from latentkit.model.conditioners.image import UNCLIP_H_IMAGE, UNCLIP_L_IMAGE
from latentkit.model.conditioners.label import CIN256_LABEL, CIN256_V2_LABEL
from latentkit.model.conditioners.map import MapConfig
from latentkit.model.conditioners.numbers import REFINER_NUMBERS, SDXL_NUMBERS, UPSCALER_NUMBERS
from latentkit.model.denoiser import PredictionName
from latentkit.model.latent_diffusion import Architecture
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.towers import BertTextConfig
from latentkit.nets.unet import UNetConfig

KL_F8 = AutoencoderConfig(
    picture_channels=3, latent_channels=4, channels=128, multipliers=(1, 2, 4, 4), blocks=2, stem=1, attention=True
)
"""Stable Diffusion's autoencoder, all versions (Rombach et al. 2022, table 8: kl-f8)."""
KL_F4 = replace(KL_F8, latent_channels=3, multipliers=(1, 2, 4))
VQ_F4 = replace(KL_F4, codes=8192)
VQ_F8 = replace(KL_F8, multipliers=(1, 2, 2, 4), attention_levels=1, codes=16384)
_F16 = replace(KL_F8, multipliers=(1, 1, 2, 2, 4), attention_levels=1)

FIRST_STAGES = {
    "kl-f4": KL_F4,
    "kl-f8": KL_F8,
    "kl-f16": replace(_F16, latent_channels=16),
    "kl-f32": replace(KL_F8, multipliers=(1, 1, 2, 2, 4, 4), latent_channels=64, attention_levels=2),
    "vq-f4": VQ_F4,
    "vq-f4-noattn": replace(VQ_F4, attention=False),
    "vq-f8": VQ_F8,
    "vq-f8-n256": replace(VQ_F8, codes=256),
    "vq-f16": replace(_F16, latent_channels=8, codes=16384),
    "x4-upscaler": replace(KL_F4, latent_channels=4),
}
"""The first stages of the paper's zoo (table 8), and the x4 upscaler's."""

TINY = {"taesd": TinyConfig((1, 3, 3, 3)), "taesd3": TinyConfig((1, 3, 3, 3), latent_channels=16)}
"""Tiny autoencoders (Bohan 2023): of Stable Diffusion 1, 2 and XL, and of those with 16 latent channels."""

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
SD2 = replace(SD1, heads=None, head_width=64, context_width=1024, linear_projection=True)
X4_UPSCALER = replace(
    SD1,
    channels_in=7,
    channels=256,
    multipliers=(1, 2, 2, 4),
    depth=(0, 1, 1, 1),
    context_width=1024,
    linear_projection=True,
    cross_only=3,
    classes=1000,
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
REFINER = replace(
    SDXL,
    channels=384,
    multipliers=(1, 2, 4, 4),
    depth=(0, 4, 4, 0),
    middle_depth=4,
    context_width=1280,
    vector_width=2560,
)

FACES = UNetConfig(
    channels_in=3,
    channels_out=3,
    channels=224,
    multipliers=(1, 2, 3, 4),
    depth=(0, 1, 1, 1),
    heads=None,
    head_width=32,
    plain_attention=True,
)
"""celeba256, ffhq256 and lsun_beds256 (Rombach et al. 2022, table 12)."""
CHURCHES = UNetConfig(
    channels=192,
    multipliers=(1, 2, 2, 4, 4),
    depth=(1, 1, 1, 1, 0),
    plain_attention=True,
    scale_shift=True,
    residual_resampling=True,
)
CLASSES_F4 = UNetConfig(
    channels_in=3,
    channels_out=3,
    channels=192,
    multipliers=(1, 2, 3, 5),
    depth=(0, 1, 1, 1),
    heads=1,
    context_width=512,
    linear_projection=False,
)
CLASSES_F8 = replace(CLASSES_F4, channels_in=4, channels_out=4, channels=256, multipliers=(1, 2, 4), depth=(1, 1, 1))
LAYOUT = replace(CLASSES_F4, channels=128, multipliers=(1, 2, 3, 4), depth=(0, 3, 3, 3), middle_depth=3)
SEMANTIC = UNetConfig(
    channels_in=6, channels_out=3, channels=128, multipliers=(1, 4, 8), depth=(0, 0, 0), plain_attention=True
)
INPAINTING = replace(FACES, channels_in=7, channels=256, heads=8, head_width=None, residual_resampling=True)
SUPER_RESOLUTION = replace(FACES, channels_in=6, channels=160, multipliers=(1, 2, 2, 4), depth=(0, 0, 0, 1))


class Preset(NamedTuple):
    """A released model's architecture, and what its raw latents are multiplied with."""

    architecture: Architecture
    latent_scale: float = 0.18215


def _sd(network: UNetConfig, size: int, **fields: object) -> Architecture:
    made = {"first_stage": KL_F8, "schedule": SCHEDULE, "prediction": "eps", **fields}
    return Architecture(network, size=(size, size), **made)  # type: ignore[arg-type]


def _of_2021(
    network: UNetConfig, end: float, first_stage: AutoencoderConfig = VQ_F4, size: int = 256, **fields: object
) -> Architecture:
    made = {"schedule": NoiseSchedule(kind="scaled_linear", beta_start=0.0015, beta_end=end), **fields}
    return _sd(network, size, **{"first_stage": first_stage, **made})


_V1 = _sd(SD1, 512, clip=SD1_TEXT)
_V2 = _sd(SD2, 512, clip=SD2_TEXT)
_V2_768 = replace(_V2, size=(768, 768), prediction="v")
_XL = _sd(SDXL, 1024, clip=SDXL_TEXT, numbers=SDXL_NUMBERS)
_FACES = _of_2021(FACES, 0.0195)


def _concat(architecture: Architecture, channels: int) -> Architecture:
    network = replace(architecture.network, channels_in=architecture.network.channels_in + channels)
    return replace(architecture, network=network, concat_channels=channels)


def _vector(architecture: Architecture, **fields: object) -> Architecture:
    made = replace(architecture, **fields)  # type: ignore[arg-type]
    width = sum(part.vector_width for part in made.conditions().values())
    return replace(made, network=replace(made.network, vector_width=width))


PRESETS = {
    "sd1.5": Preset(_V1),
    "sd1.5-inpainting": Preset(_concat(_V1, 5)),
    "sd2.1-base": Preset(_V2),
    "sd2.1": Preset(_V2_768),
    "sd2-inpainting": Preset(_concat(_V2, 5)),
    "sd2-depth": Preset(_concat(_V2, 1)),
    "sd2.1-unclip-h": Preset(_vector(_V2_768, image=UNCLIP_H_IMAGE)),
    "sd2.1-unclip-l": Preset(_vector(_V2_768, image=UNCLIP_L_IMAGE)),
    "x4-upscaler": Preset(
        _sd(
            X4_UPSCALER,
            512,
            clip=SD2_TEXT,
            numbers=UPSCALER_NUMBERS,
            first_stage=FIRST_STAGES["x4-upscaler"],
            schedule=NoiseSchedule(kind="scaled_linear", beta_start=0.0001, beta_end=0.02),
            prediction="v",
            concat_channels=3,
        ),
        0.08333,
    ),
    "sdxl": Preset(_XL, 0.13025),
    "sdxl-inpainting": Preset(_concat(_XL, 5), 0.13025),
    "sdxl-refiner": Preset(_sd(REFINER, 1024, clip=REFINER_TEXT, numbers=REFINER_NUMBERS), 0.13025),
    "celeba256": Preset(_FACES, 1.0),
    "ffhq256": Preset(_FACES, 1.0),
    "lsun_beds256": Preset(_FACES, 1.0),
    "lsun_churches256": Preset(_of_2021(CHURCHES, 0.0155, KL_F8), 1.0),
    "cin256": Preset(_of_2021(CLASSES_F8, 0.0195, VQ_F8, label=CIN256_LABEL), 1.0),
    "cin256-v2": Preset(_of_2021(CLASSES_F4, 0.0195, label=CIN256_V2_LABEL), 1.0),
    "text2img256": Preset(
        _of_2021(replace(CLASSES_F4, context_width=640), 0.0195, bert=BertTextConfig(width=640)), 1.0
    ),
    "txt2img-1p4B": Preset(_sd(replace(SD1, context_width=1280), 256, bert=BertTextConfig())),
    "layout2img-openimages256": Preset(
        _of_2021(LAYOUT, 0.0205, layout=BertTextConfig(vocabulary=8192, length=92, width=512, layers=16)), 1.0
    ),
    "semantic_synthesis256": Preset(_of_2021(SEMANTIC, 0.0205, map=MapConfig()), 1.0),
    "semantic_synthesis512": Preset(_of_2021(SEMANTIC, 0.0205, map=MapConfig(), size=512), 1.0),
    "inpainting_big": Preset(_of_2021(INPAINTING, 0.0205, FIRST_STAGES["vq-f4-noattn"], concat_channels=4), 1.0),
    "bsr_sr": Preset(_of_2021(SUPER_RESOLUTION, 0.0155, concat_channels=3), 1.0),
}
"""churches' latents are scaled by a number that its file holds."""


def preset(name: str) -> Architecture:
    """The architecture called `name`; InputError with the nearest names otherwise."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; {nearest(name, PRESETS)}", exit_code=2)
    return PRESETS[name].architecture


def predicting(architecture: Architecture, prediction: str) -> Architecture:
    """The same with another prediction: the preset that is so, with its own size, where there is one."""
    changed = replace(architecture, prediction=cast(PredictionName, prediction))
    own = (known.architecture for known in PRESETS.values())
    return next((one for one in own if replace(one, size=architecture.size) == changed), changed)
