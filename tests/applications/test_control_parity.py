"""Guess mode, shares of the steps, pooled answers, XL's and unions' ControlNets in whole drawings beside diffusers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family import ARCHITECTURES
from test_editing_parity import KL, PROMPT, SCALE, SEED, SIZE, STEPS, agree, made, ours, picture, scheduled

from latentkit.applications.attachment import WeightsFile
from latentkit.applications.request import ImageToImage, TextToImage
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.files import Model
from latentkit.diffusion.noise import keyed_normal
from latentkit.model.latent_diffusion import LatentDiffusion

pytestmark = pytest.mark.parity


def xl(folder: Path) -> Model:
    """A random model of XL's layout, saved for diffusers."""
    architecture = replace(ARCHITECTURES["XL"], first_stage=KL, size=(SIZE, SIZE))
    network = LatentDiffusion(architecture, {})
    for index, (name, one) in enumerate(network.named_parameters()):
        drawn = keyed_normal(one.shape, 1, index, name)
        one.data = drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + float(name.endswith("weight"))
    network.first_stage.latent_std.fill_(1 / 0.13025)
    write_folder(folder, network.eval().requires_grad_(False))
    return Model(network, {}, "random")


def controlled(kind: str, unet: Any, folder: Path, **fields: Any) -> tuple[Any, WeightsFile]:
    """diffusers' ControlNet for its U-Net, none of its weights at zero, and ours of its folder."""
    import diffusers

    net = getattr(diffusers, kind).from_unet(unet)
    if fields:
        net = type(net)(**{**net.config, **fields})
    for index, (name, one) in enumerate(net.named_parameters()):
        drawn = keyed_normal(one.shape, 9, index, name)
        one.data = 0.7 * drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + ("norm" in name)
    net.save_pretrained(folder)
    return net, WeightsFile.read(folder)


def theirs(pipe: Any, **asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    latent, drawn = (
        pipe(
            prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, output_type=kind, height=SIZE, width=SIZE,
            generator=torch.Generator("cpu").manual_seed(SEED), **asked,
        ).images[0]
        for kind in ("latent", "pt")
    )  # fmt: skip
    return latent, drawn


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    import diffusers

    folder = tmp_path_factory.mktemp("sd1") / "saved"
    model = made(folder)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe._encode_vae_image = lambda image, generator: pipe.vae.encode(image).latent_dist.mode() * 0.18215
    return pipe, model


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    import diffusers

    folder = tmp_path_factory.mktemp("xl") / "saved"
    model = xl(folder)
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False), model


WAYS = [
    ({"guess": True}, {"guess_mode": True}, {}),
    ({"start": 0.2, "end": 0.7}, {"control_guidance_start": 0.2, "control_guidance_end": 0.7}, {}),
    ({"start": 0.5, "guess": True}, {"control_guidance_start": 0.5, "guess_mode": True}, {}),
    ({}, {}, {"global_pool_conditions": True}),
]


@pytest.mark.parametrize(("terms", "same", "fields"), WAYS, ids=["guess", "share", "share guess", "pooled"])
def test_terms(
    terms: dict[str, Any], same: dict[str, Any], fields: dict[str, Any], sd1: tuple[Any, Model], tmp_path: Path
) -> None:
    import diffusers

    pipe, model = sd1
    net, file = controlled("ControlNetModel", pipe.unet, tmp_path / "net", **fields)
    image, hint = picture(tmp_path, "hint.png", torch.rand(3, SIZE, SIZE))
    asked = scheduled(pipe, "DDIM")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    entry = [file, hint, 0.8, *([terms] if terms else [])]
    other = theirs(pipe, image=image, controlnet_conditioning_scale=0.8, **same)
    agree(ours(model, TextToImage(control=[entry], **asked)), other)
    plain, _ = ours(model, TextToImage(control=[[file, hint, 0.8]], **asked))
    assert fields or (plain - other[0]).abs().max() > 1e-2


def test_a_share_of_the_steps_of_image_to_image(
    sd1: tuple[Any, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    pipe, model = sd1
    net, file = controlled("ControlNetModel", pipe.unet, tmp_path / "net")
    image, hint = picture(tmp_path, "hint.png", torch.rand(3, SIZE, SIZE))
    start, init = picture(tmp_path, "init.png", torch.rand(3, SIZE, SIZE))
    asked = scheduled(pipe, "DPM++(2M)")
    pipe = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=net)
    from diffusers.pipelines.controlnet import pipeline_controlnet_img2img as module

    monkeypatch.setattr(module, "retrieve_latents", lambda found, **_: found.latent_dist.mode())
    terms = {"start": 0.25, "end": 0.8, "guess": True}
    other = theirs(
        pipe, image=start, control_image=image, strength=0.5, controlnet_conditioning_scale=0.8, guess_mode=True,
        control_guidance_start=0.25, control_guidance_end=0.8,
    )  # fmt: skip
    agree(ours(model, ImageToImage(init, strength=0.5, control=[[file, hint, 0.8, terms]], **asked)), other)
    plain, _ = ours(model, ImageToImage(init, strength=0.5, **asked))
    assert (plain - other[0]).abs().max() > 1e-2


@pytest.mark.parametrize("terms", [{}, {"guess": True, "end": 0.6}], ids=["plain", "guess"])
def test_xl(terms: dict[str, Any], sdxl: tuple[Any, Model], tmp_path: Path) -> None:
    import diffusers

    pipe, model = sdxl
    net, file = controlled("ControlNetModel", pipe.unet, tmp_path / "net")
    image, hint = picture(tmp_path, "hint.png", torch.rand(3, SIZE, SIZE))
    asked = scheduled(pipe, "DDIM")
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=net, add_watermarker=False)
    same = {"guess_mode": True, "control_guidance_end": 0.6} if terms else {}
    other = theirs(pipe, image=image, controlnet_conditioning_scale=0.8, **same)
    agree(ours(model, TextToImage(control=[[file, hint, 0.8, *([terms] if terms else [])]], **asked)), other)
    plain, _ = ours(model, TextToImage(**asked))
    assert (plain - other[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kinds", [["canny"], ["depth", "5"]], ids=["one", "two"])
def test_a_union(kinds: list[str], sdxl: tuple[Any, Model], tmp_path: Path) -> None:
    import diffusers

    pipe, model = sdxl
    numbers = {"canny": 3, "depth": 1, "5": 5}
    fields = {"num_trans_channel": 32, "num_proj_channel": 32, "addition_time_embed_dim": 8}
    union: Any = diffusers.ControlNetUnionModel
    net = union(**{**union.from_unet(pipe.unet).config, **fields})
    net.control_type_proj.num_channels = 256  # the released width; this pipeline's sizes have narrower waves
    net.control_add_embedding = diffusers.models.embeddings.TimestepEmbedding(256 * 6, 128)
    for index, (name, one) in enumerate(net.named_parameters()):
        drawn = keyed_normal(one.shape, 9, index, name)
        one.data = 0.7 * drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + ("norm" in name)
    net.save_pretrained(tmp_path / "net")
    file = WeightsFile.read(tmp_path / "net")
    images, entries = [], []
    for number, kind in enumerate(kinds):
        image, hint = picture(tmp_path, f"{number}.png", torch.rand(3, SIZE, SIZE))
        images.append(image)
        entries.append([file, hint, 0.8 - 0.3 * number, {"kind": kind}])
    asked = scheduled(pipe, "DDIM")
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline.from_pipe(pipe, controlnet=net, add_watermarker=False)
    scales = [entry[2] for entry in entries]
    other = theirs(
        pipe, control_image=images, control_mode=[numbers[kind] for kind in kinds],
        controlnet_conditioning_scale=scales,
    )  # fmt: skip
    agree(ours(model, TextToImage(control=entries, **asked)), other)
