"""unCLIP and the x4 upscaler with what they put noise on conditions with: statistics, schedulers, image tower."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.ldm_file import read_single, write_single
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioners.image import ImageConfig
from latentkit.model.conditioners.numbers import UPSCALER_NUMBERS
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.nets.clip import ClipImageConfig

TOWER = ClipImageConfig(size=28, patch=14, width=32, layers=2, heads=2, activation="gelu", projection=24)
_V2 = family.ARCHITECTURES["SD 2"]
UNCLIP = replace(_V2, network=replace(_V2.network, vector_width=48), image=ImageConfig(TOWER))
UPSCALER = replace(
    _V2,
    network=replace(_V2.network, channels_in=7, classes=1000, heads=4, head_width=None),
    numbers=UPSCALER_NUMBERS,
    concat_channels=3,
)


def made(architecture: Architecture) -> LatentDiffusion:
    torch.manual_seed(0)
    model = LatentDiffusion(architecture, {})
    model.first_stage.latent_std.fill_(1 / (0.08333 if architecture.network.classes else 0.18215))
    if architecture.image:
        for buffer in ("mean", "std"):
            model.get_submodule("conditioners.image").get_buffer(buffer).uniform_(0.1, 2)
    return model.eval().requires_grad_(False)


def the_same(ours: LatentDiffusion, other: LatentDiffusion) -> None:
    assert ours.architecture == other.architecture
    one, two = ours.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_a_single_file_holds_the_statistics_of_embeddings(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", made(UNCLIP)
    write_single(path, model, "test")
    tensors, metadata = load_file(path), read_archive(path).metadata
    assert tensors["noise_augmentor.data_mean"].shape == (1, 24)
    the_same(model, read_single(path)[0])
    save_file(tensors | {"noise_augmentor.data_std": torch.ones(1, 23)}, path, metadata)
    with pytest.raises(InputError, match=r"noise_augmentor\.data_std is of another shape"):
        read_single(path)
    save_file(tensors | {"noise_augmentor.data_std": torch.full((1, 24), torch.nan)}, path, metadata)
    with pytest.raises(InputError, match=r"noise_augmentor\.data_std"):
        read_single(path)


@pytest.mark.parametrize("noise", [NoiseSchedule(kind="cosine"), replace(family.SCHEDULE, steps=500)])
def test_a_folder_holds_what_puts_noise_on_embeddings(noise: NoiseSchedule, tmp_path: Path) -> None:
    model = made(replace(UNCLIP, image=replace(UNCLIP.image, noise=noise)))
    write_folder(tmp_path / "model", model)
    the_same(model, read_folder(tmp_path / "model"))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["StableUnCLIPImg2ImgPipeline", "StableDiffusionUpscalePipeline"])
def test_diffusers_loads_the_folder_with_all_its_parts(name: str, tmp_path: Path) -> None:
    import diffusers

    model = made(UNCLIP if "UnCLIP" in name else UPSCALER)
    write_folder(tmp_path / "model", model)
    loader: Any = diffusers.DiffusionPipeline
    pipeline = loader.from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(pipeline).__name__ == name
    if "UnCLIP" in name:
        normalizer, ours = pipeline.image_normalizer, model.state_dict()
        assert torch.equal(normalizer.mean, ours["conditioners.image.mean"])
        assert torch.equal(normalizer.std, ours["conditioners.image.std"])
        theirs, schedule = pipeline.image_noising_scheduler, UNCLIP.image.noise if UNCLIP.image else None
        assert schedule is not None
    else:
        theirs, schedule = pipeline.low_res_scheduler, NoiseSchedule("scaled_linear", 0.0001, 0.02)
    alpha_bar = 1 / (1 + torch.from_numpy(schedule.sigmas.copy()) ** 2)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=1e-6)
    x, timestep = torch.randn(2, pipeline.unet.config.in_channels, 8, 8), torch.tensor([3.0, 951.0])
    context = torch.randn(2, 5, 48)
    vector = torch.randn(2, 48) if "UnCLIP" in name else torch.tensor([[3.0], [41.0]])
    labels = vector if "UnCLIP" in name else torch.tensor([3, 41])
    with torch.no_grad():
        expected = pipeline.unet(x, timestep, context, class_labels=labels).sample
        torch.testing.assert_close(model.denoiser.unet(x, timestep, context, vector), expected, rtol=1e-5, atol=1e-5)
        if "UnCLIP" in name:
            tower, pixels = model.get_submodule("conditioners.image.tower"), torch.randn(1, 3, 28, 28)
            seen = pipeline.image_encoder(pixels).image_embeds
            torch.testing.assert_close(tower(pixels), seen, rtol=1e-5, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "theirs")
    the_same(model, read_folder(tmp_path / "theirs"))
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index.keys() >= {"unet", "vae", "scheduler"}
