"""Random pipelines of diffusers' own making, drawings of both programs, and how near they must be."""

from pathlib import Path
from typing import Any

import torch

import latentkit
from latentkit.applications.generate import Progress, Result
from latentkit.checkpoints.storage.vocabulary import Vocabulary, write_clip

SIZE, SEED, STEPS, SCALE = 64, 7, 10, 5.0
PROMPT, NEGATIVE = "a slice of pizza on a table", "blurry, grey"
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDIM": (
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "leading"},
        {"sampler": "ddim", "eta": 0.0, "spacing": "leading:offset=1"},
    ),
    "DPM++(2M)": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing"},
        {"sampler": "dpm++2m", "spacing": "trailing"},
    ),
}


def tower(width: int, layers: int, kind: str, **fields: Any) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=49406,
        eos_token_id=49407,
        **fields,
    )
    return getattr(transformers, kind)(config)


def pipeline(family: str, folder: Path, **unet: Any) -> Any:
    """A random pipeline of diffusers' own making; its weights are large enough that every part has a say.

    `unet` are fields of its U-Net that go before the family's.
    """
    import diffusers as untyped
    import transformers

    diffusers: Any = untyped
    xl, second = family == "XL", family == "SD 2"
    if second:
        unet = {"use_linear_projection": True, "attention_head_dim": (4, 8)} | unet
        unet |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    down = ("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D")
    up = ("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D")
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "attention_head_dim": (4, 8),
    }
    shape = {
        "sample_size": SIZE // 2,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": 64 if xl else 32,
    }
    made: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**shape | (more if xl else {"attention_head_dim": 4}) | unet),
        "vae": diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            latent_channels=4,
            sample_size=SIZE,
            scaling_factor=0.13025 if xl else 0.18215,
        ),
        "text_encoder": tower(32, 3, "CLIPTextModel", hidden_act="gelu" if second else "quick_gelu"),
    }
    pads: dict[str, int | None] = {"tokenizer": 0 if second else None}
    if xl:
        made["text_encoder_2"] = tower(32, 3, "CLIPTextModelWithProjection", hidden_act="gelu", projection_dim=24)
        pads["tokenizer_2"] = 0
    for name, pad in pads.items():
        write_clip(folder / name, Vocabulary(None, pad), 77)
        made[name] = transformers.CLIPTokenizer.from_pretrained(folder / name)
    made["scheduler"] = diffusers.DDIMScheduler(**NOISE, clip_sample=False)
    if xl:
        kind: Any = diffusers.StableDiffusionXLPipeline
        result = kind(**made, add_watermarker=False)
    else:
        kind = diffusers.StableDiffusionPipeline
        result = kind(**made, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    torch.manual_seed(1)
    for part in (result.unet, result.vae):
        for weight in part.parameters():
            if weight.ndim == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    result.set_progress_bar_config(disable=True)
    return result


def scheduler(pipe: Any, kind: str, **more: Any) -> dict[str, Any]:
    """Gives the pipeline the scheduler, `more` in its config, and the fields of ours that ask for the same path."""
    import diffusers

    name, fields, ours = SCHEDULERS[kind]
    pipe.scheduler = getattr(diffusers, name)(**(NOISE | fields | more))
    return ours


def ours(model: latentkit.Model, asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last latent and the picture, 0 to 1."""
    latent = picture = torch.zeros(0)
    for event in latentkit.generate(model, asked):
        if isinstance(event, Progress):
            latent = event.x0[0].clone()
        elif isinstance(event, Result):
            picture = (event.picture + 1) / 2
    return latent, picture


def theirs(pipe: Any, **asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    latent, picture = (
        pipe(generator=torch.Generator("cpu").manual_seed(SEED), output_type=kind, **asked).images[0]
        for kind in ("latent", "pt")
    )
    return latent, picture


def agree(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert (one[0] - other[0]).abs().max() / other[0].std() < 1e-4
    assert (one[1] - other[1]).abs().max() < 1 / 255
    assert other[1].std() > 0.05
