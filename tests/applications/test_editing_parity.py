"""Inpainting and ControlNets in whole drawings against diffusers' pipelines: the same seed, latents and pictures."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentkit.applications.attachment import Attachment, WeightsFile
from latentkit.applications.generate import Progress, Result, generate
from latentkit.applications.request import Inpainting, Request, TextToImage
from latentkit.applications.tasks import upscale
from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.files import Model, load
from latentkit.checkpoints.ldm_file import write_single
from latentkit.diffusion.noise import keyed_normal
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.numbers import UPSCALER_NUMBERS
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.model.presets import PRESETS, Preset
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.clip import ClipTextConfig
from latentkit.nets.lora import Change
from latentkit.nets.unet import UNetConfig

pytestmark = pytest.mark.parity
SIZE, STEPS, SEED, SCALE = 64, 8, 7, 4.0
PROMPT = "a slice of pizza"
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS = {
    "DDIM": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"},
        {"sampler": "ddim", "spacing": "leading:offset=1"},
    ),
    "DPM++(2M)": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing"},
        {"sampler": "dpm++2m", "spacing": "trailing"},
    ),
}
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
UNET = UNetConfig(
    channels=32, multipliers=(1, 2), blocks=1, depth=(1, 0), heads=4, context_width=32, linear_projection=False
)
KL = AutoencoderConfig(channels=32, multipliers=(1, 1, 1, 1), blocks=1)


def made(folder: Path, beside: int = 0, stage: AutoencoderConfig = KL, **fields: Any) -> Model:
    """A random model of Stable Diffusion 1's layout, `beside` channels in its concat slot, saved for diffusers."""
    architecture = Architecture(
        replace(UNET, channels_in=4 + beside, classes=1000 if fields else None),
        first_stage=stage,
        size=(SIZE, SIZE),
        schedule=NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012),
        prediction="eps",
        clip=ClipConfig((ClipTextConfig(width=32, layers=2, heads=2),)),
        concat_channels=beside,
        **fields,
    )
    network = LatentDiffusion(architecture, {})
    for index, (name, one) in enumerate(network.named_parameters()):
        drawn = keyed_normal(one.shape, 1, index, name)
        one.data = drawn * one[0].numel() ** -0.5 if one.ndim > 1 else 0.1 * drawn + float(name.endswith("weight"))
    network.first_stage.latent_std.fill_(1 / (0.08333 if fields else 0.18215))
    network.eval().requires_grad_(False)
    write_folder(folder, network)
    return Model(network, {}, "random")


@pytest.fixture(scope="module", params=[0, 5], ids=["4 channels", "9 channels"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model, bool]:
    import diffusers

    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    model = made(folder, request.param)
    pipe: Any = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    # The peer draws from the posterior; its mean makes both start from one latent, and leaves the seed to the noise.
    pipe._encode_vae_image = lambda image, generator: pipe.vae.encode(image).latent_dist.mode() * 0.18215
    return pipe, model, bool(request.param)


def picture(folder: Path, name: str, pixels: Tensor) -> tuple[Image.Image, Attachment]:
    image = Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().numpy().astype(np.uint8).squeeze())
    image.save(folder / name)
    return image, Attachment.read(folder / name)


def ours(model: Model, asked: Request) -> tuple[Tensor, Tensor]:
    """The last latent and the picture, 0 to 1."""
    latent = drawn = torch.zeros(0)
    for event in generate(model, asked):
        if isinstance(event, Progress):
            latent = event.x0[0].clone()
        elif isinstance(event, Result):
            drawn = (event.picture + 1) / 2
    return latent, drawn


def theirs(pipe: Any, **asked: Any) -> tuple[Tensor, Tensor]:
    latent, drawn = (
        pipe(
            prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, output_type=kind,
            generator=torch.Generator("cpu").manual_seed(SEED), **asked,
        ).images[0]
        for kind in ("latent", "pt")
    )  # fmt: skip
    return latent, drawn


def agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert other[0].std() > 0.1
    assert (one[0] - other[0]).abs().max() < 1e-4
    assert (one[1] - other[1]).abs().max() < 1 / 255


def scheduled(pipe: Any, kind: str) -> dict[str, Any]:
    """Gives the pipeline the scheduler, and the fields of ours that ask for the same path."""
    import diffusers

    name, fields, same = SCHEDULERS[kind]
    pipe.scheduler = getattr(diffusers, name)(**NOISE, **fields)
    return {"steps": STEPS, "seed": SEED, "guidance_scale": SCALE, "prompt": PROMPT, **same}


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_inpainting(kind: str, strength: float, pair: tuple[Any, Model, bool], tmp_path: Path) -> None:
    pipe, model, sees = pair
    if strength == 1 and not sees:
        pytest.skip("the peer then starts from pure noise, and we from the picture under it")
    image, init = picture(tmp_path, "init.png", torch.rand(3, SIZE, SIZE))
    holes = torch.zeros(1, SIZE, SIZE)
    holes[:, 16:48, 24:] = 1
    cover, mask = picture(tmp_path, "mask.png", holes)
    fields = scheduled(pipe, kind)
    asked = Inpainting(init, mask, strength=strength, paste=False, **fields)
    agree(ours(model, asked), theirs(pipe, image=image, mask_image=cover, strength=strength, height=SIZE, width=SIZE))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_two_controlnets(kind: str, tmp_path: Path) -> None:
    import diffusers

    model, nets, hints, entries = made(tmp_path / "saved"), [], [], []
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    for number, weight in enumerate((0.8, -0.5)):
        net = diffusers.ControlNetModel.from_unet(pipe.unet)
        for index, (name, one) in enumerate(net.named_parameters()):
            if name.startswith("controlnet"):
                one.data = keyed_normal(one.shape, number, index, name) * (
                    one[0].numel() ** -0.5 if one.ndim > 1 else 0.1
                )
        net.save_pretrained(tmp_path / f"net{number}")
        image, hint = picture(tmp_path, f"{number}.png", torch.rand(3, SIZE, SIZE))
        nets.append(net)
        hints.append(image)
        entries.append([WeightsFile.read(tmp_path / f"net{number}"), hint, weight])
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    fields = scheduled(pipe, kind)
    other = theirs(pipe, image=hints, controlnet_conditioning_scale=[0.8, -0.5])
    agree(ours(model, TextToImage(control=entries, **fields)), other)
    plain, _ = ours(model, TextToImage(**fields))
    assert (plain - other[0]).abs().max() > 0.05


def test_a_lora_on_network_and_text_tower(tmp_path: Path) -> None:
    import diffusers

    pytest.importorskip("peft")
    model = made(tmp_path / "saved")
    state, changes = model.network.state_dict(), {}
    block = "denoiser.unet.down.0.blocks.0.transformer.blocks.0"
    tower = "conditioners.text.towers.0.blocks.0.attention"
    for name in (f"{block}.self_attention.q", f"{block}.cross_attention.v", f"{tower}.q", f"{tower}.v"):
        rows, columns = state[f"{name}.weight"].shape
        down, up = keyed_normal((3, columns), 1, name, "down"), keyed_normal((rows, 3), 1, name, "up")
        changes[f"{name}.weight"] = Change(down * columns**-0.5, up, 2.0)
    write_lora(tmp_path / "style.safetensors", model.network, changes, "diffusers")
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "style.safetensors")
    fields = scheduled(pipe, "DDIM")
    file = WeightsFile.read(tmp_path / "style.safetensors")
    other = theirs(pipe, cross_attention_kwargs={"scale": 0.7})
    agree(ours(model, TextToImage(lora=[[file, 0.7]], **fields)), other)
    plain, _ = ours(model, TextToImage(**fields))
    assert (plain - other[0]).abs().max() > 0.05


def opened(form: str, folder: Path, model: Model, scale: float) -> Model:
    """The same model from diffusers' folder, or from a single file of the released layout.

    The file is what `convert --to ldm` writes (whose names are proven in tests/checkpoints), without its description:
    it says what it predicts, as released ones may, and is known by its shapes.
    """
    if form == "folder":
        return load(folder, "cpu")
    file, architecture = folder.with_suffix(".safetensors"), model.network.architecture
    write_single(file, model.network, "single")
    save_file(load_file(file), file, {"modelspec.prediction_type": "epsilon"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", Preset(architecture, scale))
        found = load(file, "cpu")
    assert found.network.architecture == architecture
    return found


FORMS = ["folder", "single file"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_depth(kind: str, form: str, tmp_path: Path) -> None:
    import diffusers

    model = opened(form, tmp_path / "saved", made(tmp_path / "saved", 1), 0.18215)
    parts = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None).components
    kept = {name: parts[name] for name in (*PARTS, "feature_extractor")}
    pipe: Any = diffusers.StableDiffusionDepth2ImgPipeline(**kept, depth_estimator=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.prepare_latents = partial(_from_the_mean, pipe)
    fields = scheduled(pipe, kind)
    near = torch.rand(1, SIZE, SIZE)
    image, init = picture(tmp_path, "init.png", torch.rand(3, SIZE, SIZE))
    _, depth = picture(tmp_path, "depth.png", near)
    other = theirs(pipe, image=image, depth_map=near.mul(255).round(), strength=0.5)
    agree(ours(model, Request(init=init, depth=depth, strength=0.5, **fields)), other)


def _from_the_mean(pipe: Any, image: Tensor, timestep: Any, *told: Any, **how: Any) -> Tensor:
    """The peer's start of image-to-image, from the posterior's mean."""
    z = pipe.vae.encode(image).latent_dist.mode() * 0.18215
    noise = torch.randn(z.shape, generator=torch.Generator("cpu").manual_seed(SEED))
    start: Tensor = pipe.scheduler.add_noise(z, noise, timestep)
    return start


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_upscaling(kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    stage = replace(KL, multipliers=(1, 1, 1))
    model = made(tmp_path / "saved", 3, stage, numbers=UPSCALER_NUMBERS)
    model = opened(form, tmp_path / "saved", model, 0.08333)
    parts = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None).components
    kept = {name: parts[name] for name in PARTS}
    low = diffusers.DDPMScheduler(**{name: value for name, value in NOISE.items() if name != "steps_offset"})
    pipe: Any = diffusers.StableDiffusionUpscalePipeline(**kept, low_res_scheduler=low)
    pipe.set_progress_bar_config(disable=True)
    fields = scheduled(pipe, kind)
    image, init = picture(tmp_path, "init.png", torch.rand(3, 16, 16))

    def first_draw(shape: Any, *key: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(SEED))

    monkeypatch.setattr(upscale, "keyed_normal", first_draw)
    start = torch.randn((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(SEED))
    asked = Request(init=init, noise_level=150, **fields)
    agree(ours(model, asked), theirs(pipe, image=image, noise_level=150, latents=start))
