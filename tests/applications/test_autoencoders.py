"""Drawing with another autoencoder than the model's own: whole, tiny, a whole model's; what fits, and the record."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from latentkit.applications.attachment import Attachment, WeightsFile
from latentkit.applications.generate import Progress, Result, generate, replay
from latentkit.applications.metadata import a1111, read
from latentkit.applications.request import ImageToImage, Request, TextToImage
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.exchange import first_stage_for
from latentkit.checkpoints.files import Model, load, save_autoencoder, save_model
from latentkit.checkpoints.lone import write_first_stage
from latentkit.checkpoints.names.tiny_names import tiny_json
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_normal
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.tiny import TinyConfig

NETWORK = family.model("SD 1")
MODEL = Model(NETWORK, {}, "SD 1", "0" * 64)
FEW: dict[str, Any] = {"prompt": "a cat", "steps": 3, "seed": 3}
FORMS = ["file", "folder", "our file", "whole file of ours", "whole folder"]


def other() -> LatentDiffusion:
    """A model with other weights in its autoencoder."""
    made: LatentDiffusion = copy.deepcopy(NETWORK)
    for index, one in enumerate(made.first_stage.parameters()):
        one.data += 0.05 * keyed_normal(one.shape, 5, index)
    return made


def written(form: str, folder: Path) -> Path:
    """The autoencoder of `other` in one of its forms."""
    path, model = folder / form.replace(" ", "-"), other()
    if form in ("file", "folder"):
        write_first_stage(path, model.first_stage, "ldm" if form == "file" else "diffusers")
    elif form == "our file":
        save_autoencoder(path, model.first_stage, {})
    elif form == "whole file of ours":
        save_model(path, model, {}, torch.float32)
    else:
        write_folder(path, model)
    return path


def tiny(path: Path, latents: int = 4) -> Path:
    """A tiny autoencoder as a folder, whose latents are multiplied by 2."""
    from latentkit.checkpoints.names.diffusers_names import autoencoder_pairs
    from latentkit.checkpoints.names.rename import given

    stage = FirstStage(TinyConfig((1, 1), latents, 16), 3)
    assert stage.autoencoder is not None
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_json(TinyConfig((1, 1), latents, 16), 2.0)))
    pairs = autoencoder_pairs(stage.autoencoder)
    save_file(given(pairs, stage.autoencoder.state_dict()), path / "diffusion_pytorch_model.safetensors")
    return path


def drawn(request: Request, model: Model = MODEL, **how: Any) -> Result:
    (result,) = [event for event in generate(model, request, **how) if isinstance(event, Result)]
    return result


@pytest.mark.parametrize("form", FORMS)
def test_every_form_draws_as_the_model_that_has_it(form: str, tmp_path: Path) -> None:
    """Latents are scaled as in the model, whatever the file says; the model keeps its own autoencoder."""
    file = WeightsFile.read(written(form, tmp_path))
    before = {name: (one.data_ptr(), one.clone()) for name, one in NETWORK.state_dict().items()}
    mine = drawn(TextToImage(autoencoder=file, **FEW))
    there = drawn(TextToImage(**FEW), Model(other()))
    assert torch.equal(mine.picture, there.picture)
    plain = drawn(TextToImage(**FEW))
    assert (mine.picture - plain.picture).abs().max() > 1e-2
    assert {name: one.data_ptr() for name, one in NETWORK.state_dict().items()} == {
        n: p for n, (p, _) in before.items()
    }
    assert all(torch.equal(one, before[name][1]) for name, one in NETWORK.state_dict().items())


def test_it_encodes_too_and_other_requests_keep_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "init.png").write_bytes(to_png(keyed_normal((3, 32, 32), 1).clamp(-1, 1)))
    file, init = WeightsFile.read(written("file", tmp_path)), Attachment.read(tmp_path / "init.png")
    asked = ImageToImage(init, strength=0.5, **FEW)
    with_it = asked.model_copy(update={"autoencoder": file})
    found = sorted((e for e in generate(MODEL, [asked, with_it]) if isinstance(e, Result)), key=lambda e: e.number)
    assert torch.equal(found[0].picture, drawn(asked).picture)
    assert torch.equal(found[1].picture, drawn(asked, Model(other())).picture)
    ends = []
    for request in (asked, with_it):
        for event in generate(MODEL, request):
            if isinstance(event, Progress):
                last = event.x0.clone()
        ends.append(last)
    assert not torch.equal(*ends)


def test_a_tiny_one_brings_its_own_scale(tmp_path: Path) -> None:
    file = WeightsFile.read(tiny(tmp_path / "taesd"))
    stage = first_stage_for(tmp_path / "taesd", NETWORK)
    assert stage.latent_std.tolist() == [0.5] * 4
    latent = torch.zeros(0)
    for event in generate(MODEL, TextToImage(autoencoder=file, **FEW)):
        if isinstance(event, Progress):
            latent = event.x0.clone()
        else:
            torch.testing.assert_close(event.picture, stage.decode(latent)[0].clamp(-1, 1), rtol=0, atol=1e-5)


def test_the_record_names_it_and_draws_again(tmp_path: Path) -> None:
    file = WeightsFile.read(written("folder", tmp_path))
    first = drawn(TextToImage(autoencoder=file, **FEW))
    record = read(first.png(), "x.png")
    assert json.loads(record.request.model_dump_json(exclude_none=True))["autoencoder"] == file.digest
    assert f"VAE hash: {file.digest[:10]}" in a1111(first.record)
    with pytest.raises(InputError, match=r"needs the autoencoder whose file has the sha256 .*--vae FILE") as caught:
        next(replay(MODEL, record))
    assert caught.value.exit_code == 2
    record = record.model_copy(update={"request": record.request.model_copy(update={"autoencoder": file})})
    (again,) = [event for event in replay(MODEL, record) if isinstance(event, Result)]
    assert again.png() == first.png()


def test_a_model_that_rests_in_its_file_and_half_types(tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", NETWORK, {}, torch.float32)
    file = WeightsFile.read(written("file", tmp_path))
    plain = drawn(TextToImage(autoencoder=file, **FEW))
    resting = load(tmp_path / "m.safetensors", low_memory=True)
    low = drawn(TextToImage(autoencoder=file, **FEW), resting)
    torch.testing.assert_close(low.picture, plain.picture, rtol=0, atol=1e-5)
    half = copy.deepcopy(NETWORK).to(torch.bfloat16)
    assert first_stage_for(tmp_path / "file", half).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    ours = "the model draws latents of 4 channels, 2x2 pixels each, of 3 in pictures"
    deep = family.model("SD 1").first_stage
    deeper = FirstStage(replace(family.KL, multipliers=(1, 2, 2)), 3)
    write_first_stage(tmp_path / "deeper", deeper, "diffusers")
    write_first_stage(tmp_path / "fits", deep, "diffusers")
    write_first_stage(tmp_path / "vq", family.model("classes").first_stage, "diffusers")
    for path, theirs in (
        (tmp_path / "deeper", "latents of 4 channels, 4x4 pixels each, of 3 in pictures"),
        (tmp_path / "vq", "latents of 3 channels, 2x2 pixels each, of 3 in pictures"),
        (tiny(tmp_path / "tiny", 16), "latents of 16 channels, 2x2 pixels each, of 3 in pictures"),
    ):
        with pytest.raises(InputError, match=f"{path}: its autoencoder makes {theirs}; {ours}"):
            next(generate(MODEL, TextToImage(autoencoder=WeightsFile.read(path), **FEW)))
    pixels = tiny_model(latent=False)
    with pytest.raises(InputError, match="the model draws pixels of 3 channels"):
        first_stage_for(tmp_path / "fits", pixels)
    save_model(tmp_path / "pixels", pixels, {}, torch.float32)
    with pytest.raises(InputError, match="its autoencoder makes pixels of 3 channels; the model draws latents"):
        first_stage_for(tmp_path / "pixels", NETWORK)


def test_other_scales_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    stage = family.model("SD 1", scale=0.13025).first_stage
    write_first_stage(tmp_path / "xl", stage, "diffusers")
    assert first_stage_for(tmp_path / "xl", NETWORK).latent_std[0] == NETWORK.first_stage.latent_std[0]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its latents are multiplied by 0.13025, and the model's are by 0.18215: it may be made for another" in said
    caplog.clear()
    write_first_stage(tmp_path / "unsaid", stage, "ldm")
    write_first_stage(tmp_path / "same", NETWORK.first_stage, "diffusers")
    for name in ("unsaid", "same"):
        first_stage_for(tmp_path / name, NETWORK)
    assert not caplog.records
    small = NETWORK.with_first_stage(first_stage_for(tiny(tmp_path / "tiny"), NETWORK))
    assert first_stage_for(tmp_path / "xl", small).latent_std[0] == pytest.approx(1 / 0.13025)
    with pytest.raises(InputError, match="does not say what its latents are multiplied by, nor does the model's tiny"):
        first_stage_for(tmp_path / "unsaid", small)
