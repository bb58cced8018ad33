"""Single files as other programs leave them, and what of ours is not written as one."""

import json
from dataclasses import replace
from pathlib import Path

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_detect import whole
from torch import Tensor

from latentkit.checkpoints.ldm_file import TWICE, match, read_single, spec_name, write_single
from latentkit.checkpoints.names.rename import given, prefixed
from latentkit.checkpoints.names.tower_names import hugging_face_text, of_comfy, unused
from latentkit.checkpoints.storage.archive import Archive, read_archive
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.conditioners.image import ImageConfig
from latentkit.model.conditioners.tokenizer import clip_tokenizer
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion
from latentkit.model.presets import PRESETS, preset
from latentkit.nets.clip import ClipImageConfig

FIRST, SECOND = "first_stage_model.", "cond_stage_model."


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(FIRST, SECOND): tensor for name, tensor in tensors.items() if name.startswith(FIRST)}


def test_the_first_stage_that_also_encodes_the_condition_is_saved_twice() -> None:
    """The released inpainting_big; only what is a copy by name and shape, and only where no conditioner is."""
    tensors = whole("inpainting_big")
    copies = copied(tensors)
    assert {name.split(".")[1] for name in copies} == {
        "encoder",
        "decoder",
        "quantize",
        "quant_conv",
        "post_quant_conv",
    }
    found = match(Archive(tensors | copies), "file")
    assert not found.complaints
    assert found.found.name == "inpainting_big"
    assert sorted(found.ignored[TWICE]) == sorted(copies)
    other = "cond_stage_model.encoder.conv_in.weight"
    for wrong in ({other: copies[other][:1]}, {f"{other}x": copies[other]}):
        assert match(Archive(tensors | wrong), "file").complaints.unknown == list(wrong)
    tensors = whole("cin256")
    assert sorted(match(Archive(tensors | copied(tensors)), "file").complaints.unknown) == sorted(copied(tensors))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sdxl", "conditioner.embedders.0.text_projection"),
        ("sdxl", "conditioner.embedders.0.transformer.text_projection.weight"),
        ("sd1.5", "cond_stage_model.transformer.text_projection.weight"),
        ("sd1.5", "cond_stage_model.clip_l.text_projection"),
        ("sd1.5", "embedding_manager.string_to_param_dict.*"),
    ],
)
def test_what_other_programs_add_is_left_aside(name: str, extra: str) -> None:
    found = match(Archive(whole(name) | {extra: torch.zeros(2, 2)}), "file")
    assert not found.complaints
    assert [len(names) for names in found.ignored.values()] == [1]
    assert not unused(f"x{extra}")


@pytest.mark.parametrize("name", ["SD 1", "SD 2", "XL", "refiner"])
def test_comfyuis_own_names_of_towers_are_read(name: str, tmp_path: Path) -> None:
    model, path = family.model(name), tmp_path / "model.safetensors"
    write_single(path, model, "test")
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("cond")}
    clip = model.architecture.clip
    assert clip is not None
    for index, tower in enumerate(clip.towers):
        kind = "l" if tower.activation == "quick_gelu" else "g" if tower.projection else "h"
        roots = f"cond_stage_model.clip_{kind}.transformer.", f"conditioners.text.towers.{index}."
        tensors |= given(prefixed(hugging_face_text(tower), *roots), model.state_dict())
    save_file(tensors, path, read_archive(path).metadata)
    read, _ = read_single(path)
    state = read.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_no_tensor_is_lost_to_another_of_its_name(tmp_path: Path) -> None:
    root = "cond_stage_model.transformer."
    norm = f"{root}text_model.final_layer_norm.bias"
    assert of_comfy(["cond_stage_model.clip_g.x", "cond_stage_model.clip_l.x", "y"]) == {
        "cond_stage_model.clip_g.x": "conditioner.embedders.1.x",
        "cond_stage_model.clip_l.x": "conditioner.embedders.0.x",
        "y": "y",
    }
    tensors = whole("sd1.5")
    for other in (f"{root}final_layer_norm.bias", norm.replace(".transformer", ".clip_l.transformer")):
        with pytest.raises(InputError, match=f"holds {norm} twice"):
            match(Archive(tensors | {other: tensors[norm]}), "file")


_SD1 = family.ARCHITECTURES["SD 1"]
_IMAGE = ImageConfig(
    ClipImageConfig(size=28, patch=14, width=32, layers=2, heads=2, projection=24), noise=NoiseSchedule("linear")
)
_SEEING = replace(family.ARCHITECTURES["SD 2"], network=replace(family.V2, vector_width=48), image=_IMAGE)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        *((replace(_SD1, prediction=name), f"no prediction '{name}'") for name in ("x0", "flow", "edm", "score")),
        (replace(_SD1, schedule=NoiseSchedule(kind="cosine")), "no noise schedule as this 'cosine' one"),
        (replace(_SD1, schedule=NoiseSchedule(kind="linear")), "no noise schedule as this 'linear' one"),
        (replace(_SD1, schedule=replace(family.SCHEDULE, beta_start=0.0015, beta_end=0.0195)), "no noise schedule"),
        (_SEEING, "no noise of its own on embedded pictures"),
    ],
)  # fmt: skip
def test_what_others_would_take_for_stable_diffusions_own_is_not_written(
    architecture: Architecture, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"the CompVis layout holds {message}.*; our own layout does"):
        write_single(tmp_path / "model.safetensors", LatentDiffusion(architecture, {}), "test")
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_its_own_is_not_written(tmp_path: Path) -> None:
    shipped = clip_tokenizer().to_str()
    write_single(tmp_path / "a", LatentDiffusion(_SD1, {"text": {"tokenizer": shipped}}), "test")
    changed = json.loads(shipped)
    changed["model"]["merges"].pop()
    other = json.dumps(changed)
    with pytest.raises(InputError, match="holds no vocabulary of one's own"):
        write_single(tmp_path / "b", LatentDiffusion(_SD1, {"text": {"tokenizer": other}}), "test")
    assert not (tmp_path / "b").exists()


SPECS = {
    "sd1.5": "v1", "sd1.5-inpainting": "v1-inpainting", "sd2.1-base": "v2-512", "sd2.1": "v2-768-v",
    "sd2-inpainting": "v2-inpainting", "sd2-depth": "v2-depth", "sd2.1-unclip-h": "v2-unclip-h",
    "sd2.1-unclip-l": "v2-unclip-l", "x4-upscaler": "x4-upscaler", "sdxl": "xl-v1-base",
    "sdxl-inpainting": "xl-v1-inpainting", "sdxl-refiner": "xl-v1-refiner",
}  # fmt: skip


def test_every_preset_has_its_own_name_in_model_spec() -> None:
    """As ComfyUI, kohya's scripts and SwarmUI write and know them."""
    assert {name: spec_name(preset(name)) for name in PRESETS} == {
        name: f"stable-diffusion-{SPECS[name]}" if name in SPECS else "latent-diffusion" for name in PRESETS
    }
    seeing = replace(preset("sd1.5"), clip=None, image=ImageConfig(ClipImageConfig(), slot="context"))
    assert spec_name(seeing) == "stable-diffusion-v1-variations"
