"""XL's sizes and refiner, clip skip, textual inversions and variations against diffusers: latents and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_pipelines import (
    NEGATIVE,
    PROMPT,
    SCALE,
    SCHEDULERS,
    SEED,
    SIZE,
    STEPS,
    agree,
    ours,
    pipeline,
    scheduler,
    theirs,
)
from PIL import Image
from safetensors.torch import save_file

import latentkit
from latentkit.applications import plan
from latentkit.applications.attachment import Attachment, Guide, WeightsFile
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.data.pictures import to_tensor
from latentkit.diffusion import noise
from latentkit.model.conditioners.image import prepared

pytestmark = pytest.mark.parity
EULER = (
    "EulerDiscreteScheduler",
    {"timestep_spacing": "leading"},
    {"sampler": "euler", "spacing": "leading:offset=1"},
)
FIELDS: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance_scale": SCALE, "prompt": PROMPT, "negative": NEGATIVE}
ASKED: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": SCALE,
    "negative_prompt": NEGATIVE,
    "prompt": PROMPT,
}


def saved(pipe: Any, folder: Path) -> latentkit.Model:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "saved")
    return latentkit.load(folder / "saved", "cpu")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    folder = tmp_path_factory.mktemp("xl")
    pipe = pipeline("XL", folder)
    return pipe, saved(pipe, folder)


@pytest.fixture(scope="module")
def refiner(xl: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    """XL's refiner: the second text tower alone, a score in the place of the size drawn, the base's first stage."""
    import diffusers as untyped

    diffusers: Any = untyped
    folder = tmp_path_factory.mktemp("refiner")
    torch.manual_seed(2)
    other = pipeline("XL", folder, cross_attention_dim=32, projection_class_embeddings_input_dim=5 * 8 + 24)
    parts = {**other.components, "vae": xl[0].vae, "text_encoder": None, "tokenizer": None}
    image_to_image = diffusers.StableDiffusionXLImg2ImgPipeline
    pipe = image_to_image(**parts, requires_aesthetics_score=True, add_watermarker=False)
    pipe.unet.add_embedding.linear_1.weight.data *= 10  # a score is two waves of 64: it must have a say
    return pipe, saved(pipe, folder)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    folder = tmp_path_factory.mktemp("sd1")
    pipe = pipeline("SD 1", folder)
    return pipe, saved(pipe, folder)


def test_sizes_and_crops_are_told(xl: tuple[Any, latentkit.Model]) -> None:
    pipe, model = xl
    fields = FIELDS | scheduler(pipe, "DDIM")
    told: dict[str, Any] = {"original_size": (96, 32), "crop": (5, 16), "target_size": (80, 48)}
    there = {"original_size": (32, 96), "crops_coords_top_left": (16, 5), "target_size": (48, 80)}
    there |= {"negative_original_size": (32, 96), "negative_crops_coords_top_left": (16, 5)}
    mine = ours(model, latentkit.TextToImage(**fields, **told))
    agree(mine, theirs(pipe, **ASKED, **there, negative_target_size=(48, 80), height=SIZE, width=SIZE))
    for name in told:
        other, _ = ours(model, latentkit.TextToImage(**fields, **{**told, name: None}))
        assert (mine[0] - other).abs().max() / other.std() > 1e-3, name


@pytest.mark.parametrize(("kind", "switch"), [("Euler", 0.8), ("DPM++(2M)", 0.55)])
def test_a_refiner_takes_over(kind: str, switch: float, xl: Any, refiner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULERS, "Euler", EULER)
    (pipe, model), (other, refining) = xl, refiner
    fields = FIELDS | scheduler(pipe, kind)
    scheduler(other, kind)
    given: dict[str, Any] = {"refiner": Guide("1" * 64, refining), "refiner_switch": switch, "aesthetic_score": 7.5}
    mine = ours(model, latentkit.TextToImage(**fields, **given, negative_aesthetic_score=1.0))
    started = theirs(pipe, **ASKED, denoising_end=switch, height=SIZE, width=SIZE)[0]
    told = {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
    there = theirs(other, **ASKED, **told, denoising_start=switch, image=started[None])
    agree(mine, there)
    for changed in ({"refiner_switch": 0.3}, {"aesthetic_score": None}):
        drawn, _ = ours(model, latentkit.TextToImage(**{**fields, **given, **changed}, negative_aesthetic_score=1.0))
        assert (mine[0] - drawn).abs().max() / drawn.std() > 1e-3, changed


def test_the_refiner_alone_makes_a_picture_of_a_picture(refiner: Any, tmp_path: Path) -> None:
    pipe, model = refiner
    fields = FIELDS | scheduler(pipe, "DDIM")
    image = picture(tmp_path / "init.png", SIZE)
    with torch.no_grad():
        z = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode() * pipe.vae.config.scaling_factor
    mine = ours(model, latentkit.ImageToImage(tmp_path / "init.png", **fields, strength=0.6, aesthetic_score=3.0))
    agree(mine, theirs(pipe, **ASKED, image=z, strength=0.6, aesthetic_score=3.0))


def picture(path: Path, side: int) -> Image.Image:
    """A picture of a few large cells, saved."""
    cells = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(side // 4, 0).repeat(side // 4, 1)
    image = Image.fromarray(cells)
    image.save(path)
    return image


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_clip_skip(family: str, request: pytest.FixtureRequest) -> None:
    """The peer skips in the prompt alone, so that its negative is given as it is here; 2 here is 1 there."""
    pipe, model = request.getfixturevalue(family)
    fields = FIELDS | scheduler(pipe, "DDIM")
    if family == "sd1":
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder  # where the peer looks for the last norm
    with torch.no_grad():
        found = pipe.encode_prompt(
            NEGATIVE, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=1
        )
    given: dict[str, Any] = {"negative_prompt_embeds": found[0], "clip_skip": 1, "height": SIZE, "width": SIZE}
    if family == "xl":
        given["negative_pooled_prompt_embeds"] = found[2]
    asked = {name: value for name, value in ASKED.items() if name != "negative_prompt"}
    mine = ours(model, latentkit.TextToImage(**fields, clip_skip=2))
    agree(mine, theirs(pipe, **asked, **given))
    whole, same = (ours(model, latentkit.TextToImage(**fields, clip_skip=skip))[0] for skip in (1, None))
    assert torch.equal(whole, same)
    assert (mine[0] - whole).abs().max() / whole.std() > 1e-3


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_textual_inversions(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Two vectors for one name, in the prompt and in the negative one; XL's file holds those of both towers."""
    pipe, model = request.getfixturevalue(family)
    fields = FIELDS | scheduler(pipe, "DDIM")
    vectors = {name: torch.randn(2, 32) * 0.1 for name in ("clip_l", "clip_g")}
    if family == "xl":
        save_file(vectors, tmp_path / "cat.safetensors")
        pipe.load_textual_inversion(
            vectors["clip_l"], token="<cat>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            vectors["clip_g"], token="<cat>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    else:
        save_file({"emb_params": vectors["clip_l"]}, tmp_path / "cat.safetensors")
        pipe.load_textual_inversion(vectors["clip_l"], token="<cat>")
    file = WeightsFile.read(tmp_path / "cat.safetensors")
    said = {"prompt": "a <cat> on a table", "negative": "blurry <cat>"}
    mine = ours(model, latentkit.TextToImage(**{**fields, **said}, embedding=[[file, "<cat>"]]))
    there = {**ASKED, "prompt": said["prompt"], "negative_prompt": said["negative"], "height": SIZE, "width": SIZE}
    agree(mine, theirs(pipe, **there))
    plain, _ = ours(model, latentkit.TextToImage(**{**fields, **said}))
    assert (mine[0] - plain).abs().max() / plain.std() > 1e-3


def seeing(projection: int) -> dict[str, Any]:
    """A random CLIP image tower of 28 pixels and what prepares pictures for it."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
        projection_dim=projection, hidden_act="gelu",
    )  # fmt: skip
    size: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config),
        "feature_extractor": transformers.CLIPImageProcessor(**size),
    }


def sees_alike(pipe: Any, model: latentkit.Model, folder: Path) -> None:
    """What the picture becomes before the U-Net is told it, by the file's pixels, the preparation and the tower.

    A picture that is not scaled agrees to 1e-5. One that is scaled is rounded to 256 values by the peer, between its
    two passes too, and not here: then the towers agree on the peer's pixels.
    """
    conditioner: Any = model.network.conditioners["image"]
    for number, (height, width) in enumerate(((28, 28), (28, 41), (39, 28), (61, 45), (20, 33))):
        scaled = 28 not in (height, width)
        cells = np.random.default_rng(number).integers(64, 192, (height, width, 3), np.uint8)
        Image.fromarray(cells).save(folder / "seen.png")
        read = Attachment.read(folder / "seen.png").picture
        assert read is not None
        mine = prepared(to_tensor(read, 3), conditioner.config.tower.size)
        pixels = pipe.feature_extractor(Image.fromarray(cells), return_tensors="pt").pixel_values
        with torch.no_grad():
            there = pipe.image_encoder(pixels).image_embeds
            both = conditioner.tower(mine[None]), conditioner.tower(pixels)
        whole, tower = ((one - there).abs().max() / there.std() for one in both)
        assert tower < 1e-5
        assert (mine - pixels[0]).abs().max() < (1.5 / 255 / 0.26 if scaled else 1e-5)
        assert whole < (0.05 if scaled else 1e-5)


@pytest.mark.parametrize("level", [0, 600])
def test_variations_by_unclip(level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers as untyped
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    diffusers: Any = untyped
    more = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * 16}
    parts = pipeline("SD 1", tmp_path, **more).components
    normaliser: Any = StableUnCLIPImageNormalizer(16)
    normaliser.mean.data, normaliser.std.data = torch.randn(1, 16), torch.rand(1, 16) + 0.5
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    unclip = diffusers.StableUnCLIPImg2ImgPipeline
    pipe = unclip(
        **kept, **seeing(16), image_normalizer=normaliser,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )  # fmt: skip
    model = saved(pipe, tmp_path)
    sees_alike(pipe, model, tmp_path)
    noise = torch.randn((1, 16), generator=torch.Generator("cpu").manual_seed(SEED))
    monkeypatch.setattr(plan, "keyed_normal", lambda shape, *key: noise)
    image = picture(tmp_path / "seen.png", 28)
    start = torch.randn((1, 4, SIZE // 2, SIZE // 2), generator=torch.Generator("cpu").manual_seed(SEED))
    fields = FIELDS | scheduler(pipe, "DDIM")
    given: dict[str, Any] = {"variation": Attachment.read(tmp_path / "seen.png"), "noise_level": level or None}
    mine = ours(model, latentkit.Request(**fields, **given))
    agree(mine, theirs(pipe, **ASKED, image=image, noise_level=level, latents=start))
    plain, _ = ours(model, latentkit.Request(**fields))
    assert (mine[0] - plain).abs().max() / plain.std() > 1e-2


def test_image_variations(tmp_path: Path) -> None:
    """The model that is told the picture as its one token, and no words."""
    import diffusers as untyped

    diffusers: Any = untyped
    parts = pipeline("SD 1", tmp_path).components
    kept = {name: parts[name] for name in ("vae", "unet", "scheduler")}
    kind = diffusers.StableDiffusionImageVariationPipeline
    pipe = kind(**kept, **seeing(32), safety_checker=None, requires_safety_checker=False)
    model = saved(pipe, tmp_path)
    sees_alike(pipe, model, tmp_path)
    image = picture(tmp_path / "seen.png", 28)
    fields = {**FIELDS, **scheduler(pipe, "DDIM"), "prompt": None, "negative": ""}
    mine = ours(model, latentkit.Request(**fields, variation=Attachment.read(tmp_path / "seen.png")))
    agree(mine, theirs(pipe, image=image, num_inference_steps=STEPS, guidance_scale=SCALE))


@pytest.mark.parametrize("family", ["SD 1", "XL"])
def test_latent_consistency(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model told its guidance scale, in the four steps that it is made for; ours draws the peer's noise."""
    import diffusers as untyped

    diffusers: Any = untyped
    parts = pipeline(family, tmp_path, time_cond_proj_dim=10).components
    lcm = diffusers.LCMScheduler(timestep_scaling=0.01)  # at the released 10.0 the boundary hardly shows
    if family == "SD 1":
        kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
        kind = diffusers.LatentConsistencyModelPipeline
        pipe = kind(**kept, scheduler=lcm, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    else:
        kind = diffusers.StableDiffusionXLPipeline
        pipe = kind(**{**parts, "scheduler": lcm}, add_watermarker=False)
    model = saved(pipe, tmp_path)
    consistent = model.network.architecture.consistency
    assert consistent is not None
    assert (consistent.scale, consistent.guidance_width) == (0.01, 10)
    stream = torch.Generator("cpu").manual_seed(SEED)
    drawn = [torch.randn((1, 4, SIZE // 2, SIZE // 2), generator=stream) for _ in range(4)]
    monkeypatch.setattr(noise.PictureNoise, "step", lambda self, step, purpose="step": drawn[step + 1])
    asked = latentkit.TextToImage(prompt=PROMPT, seed=SEED, guidance_scale=3.0)
    mine = ours(model, asked)
    there = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": SIZE, "width": SIZE}
    agree(mine, theirs(pipe, prompt=PROMPT, **there))
    for changed in ({"guidance_scale": 6.0}, {"steps": 3}):
        other, _ = ours(model, asked.model_copy(update=changed))
        assert (mine[0] - other).abs().max() / other.std() > 1e-3, changed
    write_folder(tmp_path / "ours", model.network)
    again: Any = type(pipe).from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    agree(mine, theirs(again, prompt=PROMPT, **there))


def test_a_consistency_lora_on_a_plain_model(sd1: tuple[Any, latentkit.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler and the spacing are what a person chooses beside such a LoRA; the boundary there is below 1e-5."""
    import diffusers as untyped

    diffusers: Any = untyped
    pipe, model = sd1
    pipe.scheduler = diffusers.LCMScheduler()
    stream = torch.Generator("cpu").manual_seed(SEED)
    drawn = [torch.randn((1, 4, SIZE // 2, SIZE // 2), generator=stream) for _ in range(4)]
    monkeypatch.setattr(noise.PictureNoise, "step", lambda self, step, purpose="step": drawn[step + 1])
    fields = {**FIELDS, "sampler": "lcm", "spacing": "lcm", "steps": 4, "guidance_scale": 1.5}
    there = {**ASKED, "num_inference_steps": 4, "guidance_scale": 1.5, "height": SIZE, "width": SIZE}
    agree(ours(model, latentkit.TextToImage(**fields)), theirs(pipe, **there))
