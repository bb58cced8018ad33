"""What we write, diffusers loads without a key too many or too few, and computes the same; and the other way round."""

from pathlib import Path
from typing import Any

import family
import pytest
import torch

from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.names.diffusers_configs import autoencoder_json, unet_json
from latentkit.checkpoints.names.diffusers_names import autoencoder_pairs, unet_pairs
from latentkit.checkpoints.names.rename import given
from latentkit.model.conditioning import Conditioning
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import FIRST_STAGES, PRESETS, preset
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.unet import UNet

pytestmark = pytest.mark.parity

FAMILIES = ["SD 1", "SD 1 inpainting", "SD 2", "XL", "refiner"]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compute_the_same(model: LatentDiffusion, pipeline: Any) -> None:
    """U-Net, autoencoder and text towers of a pipeline against ours."""
    unet, network = pipeline.unet, model.denoiser.unet
    x, timestep = torch.randn(2, network.config.channels_in, 16, 16), torch.tensor([3.0, 951.0])
    prompts = ["a red heart", "two cats, (smiling)"]
    told = model.condition({"text": [prompt.replace("(", r"\(").replace(")", r"\)") for prompt in prompts]}, 2)
    tokens = [
        tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None))
        if tokenizer is not None
    ]
    added = None
    if getattr(pipeline, "text_encoder_2", None) is None:
        context = pipeline.text_encoder(tokens[0])[0]
    else:
        towers = [tower for tower in (pipeline.text_encoder, pipeline.text_encoder_2) if tower is not None]
        states = [tower(ids, output_hidden_states=True) for tower, ids in zip(towers, tokens, strict=True)]
        context = torch.cat([state.hidden_states[-2] for state in states], -1)
        ids = torch.tensor([model.architecture.numbers.default] * 2) if model.architecture.numbers else None
        added = {"text_embeds": states[-1][0], "time_ids": ids}
    assert told.context is not None
    assert distance(told.context, context) < 1e-5
    expected = unet(x, timestep, context, added_cond_kwargs=added).sample
    assert expected.std() > 0.05
    assert distance(network(x, timestep, told.context, told.vector), expected) < 1e-5
    pixels = torch.randn(1, 3, 32, 32)
    raw = pipeline.vae.encode(pixels).latent_dist.mean
    z = raw * pipeline.vae.config.scaling_factor
    assert distance(model.first_stage.encode(pixels), z) < 1e-5
    drawn = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    assert distance(model.first_stage.decode(z), drawn) < 1e-5
    assert isinstance(told, Conditioning)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folder_is_a_pipeline_and_a_pipeline_saved_is_our_model(name: str, tmp_path: Path) -> None:
    import diffusers

    model = family.model(name)
    write_folder(tmp_path / "ours", model)
    kinds: Any = (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL))
    for part, kind in kinds:
        _, found = kind.from_pretrained(tmp_path / "ours" / part, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    loader: Any = diffusers.DiffusionPipeline
    pipeline = loader.from_pretrained(tmp_path / "ours", local_files_only=True)
    compute_the_same(model, pipeline)
    pipeline.save_pretrained(tmp_path / "theirs")
    again = read_folder(tmp_path / "theirs")
    compute_the_same(again, pipeline)
    one, two = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_single_file_is_a_pipeline(name: str, tmp_path: Path) -> None:
    import diffusers

    model = family.model(name)
    write_folder(tmp_path / "config", model)
    write_single(tmp_path / "model.safetensors", model, "test")
    kinds = {"XL": "XL", "SD 1 inpainting": "Inpaint", "refiner": "XLImg2Img"}
    kind: Any = getattr(diffusers, f"StableDiffusion{kinds.get(name, '')}Pipeline")
    weights = list((tmp_path / "config").rglob("*.safetensors"))
    for file in weights:  # nothing but configs and tokenizers may come from there
        file.unlink()
    pipeline = kind.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    compute_the_same(model, pipeline)


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


WHOLE = [
    "sd1.5", "sd1.5-inpainting", "sd2.1", "sd2-depth", "sd2.1-unclip-h", "sd2.1-unclip-l", "x4-upscaler", "sdxl",
    "sdxl-inpainting", "sdxl-refiner", "celeba256", "bsr_sr", "txt2img-1p4B", "cin256-v2",
    "sd2-inpainting", "cin256", "text2img256", "layout2img-openimages256", "semantic_synthesis256",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_every_key_of_the_full_size_unet_is_mapped_once(name: str) -> None:
    import diffusers

    config = preset(name).network
    place = "class_embedding" if "unclip" in name else "add_embedding"
    kind: Any = diffusers.UNet2DModel if config.plain_attention else diffusers.UNet2DConditionModel
    with torch.device("meta"), Shapes():
        ours, theirs = UNet(config), kind.from_config(unet_json(config, 64, place))
    assert shapes(given(unet_pairs(ours, place), ours.state_dict())) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_key_of_the_full_size_first_stage_is_mapped_once(name: str) -> None:
    import diffusers

    config = FIRST_STAGES[name]
    kind: Any = diffusers.VQModel if config.codes else diffusers.AutoencoderKL
    with torch.device("meta"), Shapes():
        ours, theirs = Autoencoder(config), kind.from_config(autoencoder_json(config, 256, 0.18215))
    assert shapes(given(autoencoder_pairs(ours), ours.state_dict())) == shapes(theirs.state_dict())


def test_what_is_not_compared_at_full_size_is_known() -> None:
    """Same shapes as one that is, or heads that diffusers cannot say."""
    assert set(PRESETS) - set(WHOLE) == {
        "sd2.1-base", "ffhq256", "lsun_beds256", "lsun_churches256", "semantic_synthesis512", "inpainting_big",
    }  # fmt: skip
