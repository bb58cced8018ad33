"""LoRAs and ControlNets in a picture: nothing at weight 0, what merged weights give, a base that stays as it was."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor

from latentkit.applications.attachment import Attachment, Guide, WeightsFile
from latentkit.applications.generate import Progress, Result, generate, replay
from latentkit.applications.metadata import read
from latentkit.applications.request import Request, TextToImage
from latentkit.applications.tasks import adapters
from latentkit.checkpoints.adapters.controlnet_names import controlnet_pairs
from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.files import Model
from latentkit.checkpoints.names.rename import given
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_normal
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.latent_diffusion import LatentDiffusion, fit_network
from latentkit.nets.clip import ClipTextConfig
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change

NETWORK = tiny_model()
MODEL = Model(NETWORK, {"defaults": {"steps": 2}}, "tiny", "0" * 64)
QUERY = "denoiser.unet.down.1.blocks.0.transformer.blocks.0.self_attention.q.weight"
CONV = "denoiser.unet.down.0.blocks.0.residual.conv_in.weight"
TOWER = "conditioners.text.towers.0.blocks.0.attention.v.weight"


def changes(network: LatentDiffusion, *names: str) -> dict[str, Change]:
    state, made = network.state_dict(), {}
    for name in names:
        out, *rest = state[name].shape
        down = keyed_normal((3, *rest), 1, name, "down")
        made[name] = Change(down, keyed_normal((out, 3, *(1 for _ in rest[1:])), 1, name, "up") * 0.3, 2.0)
    return made


def lora(folder: Path, *names: str, network: LatentDiffusion = NETWORK) -> WeightsFile:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    write_lora(path, network, changes(network, *names))
    return WeightsFile.read(path)


def controlnet(folder: Path, seed: int = 1) -> WeightsFile:
    """A random ControlNet for the tiny model."""
    network = ControlNet(replace(NETWORK.architecture.network, channels_in=4))
    drawn = {
        name: keyed_normal(one.shape, seed, name) * (one[0].numel() ** -0.5 if one.ndim > 1 else 0.1)
        for name, one in network.state_dict().items()
    }
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file(given(controlnet_pairs(network, "ldm"), drawn), path)
    return WeightsFile.read(path)


def hint(folder: Path, seed: int = 1) -> Attachment:
    path = folder / f"hint-{seed}.png"
    path.write_bytes(to_png(keyed_normal((3, 40, 40), seed, "hint").clamp(-1, 1)))
    return Attachment.read(path)


def results(asked: Request | list[Request], model: Model = MODEL) -> list[Result]:
    found = [event for event in generate(model, asked) if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


def asking(prompt: str = "cat", **fields: Any) -> Request:
    return TextToImage(prompt=prompt, seed=3, **fields)


def drawn(model: Model = MODEL, **fields: Any) -> Tensor:
    return results(asking(**fields), model)[0].picture


def test_a_lora_draws_what_its_merged_weights_draw(tmp_path: Path) -> None:
    file = lora(tmp_path, QUERY, CONV)
    plain = drawn()
    assert torch.equal(drawn(lora=[[file, 0.0]]), plain)
    merged = copy.deepcopy(NETWORK)
    state = merged.state_dict()
    for name, change in changes(NETWORK, QUERY, CONV).items():
        state[name].copy_(change.applied(state[name], 0.7))
    styled = drawn(lora=[[file, 0.7]])
    assert torch.equal(styled, drawn(MODEL._replace(network=merged)))
    assert (styled - plain).abs().max() > 1e-2
    half = drawn(lora=[[file, 0.35], [file, 0.35]])
    torch.testing.assert_close(half, styled, rtol=0, atol=1e-3)


def test_a_lora_changes_what_a_text_tower_says(tmp_path: Path) -> None:
    clip = ClipConfig((ClipTextConfig(width=32, layers=1, heads=2),))
    network = LatentDiffusion(fit_network(replace(NETWORK.architecture, text=None, clip=clip)), {})
    for index, (name, one) in enumerate(network.named_parameters()):
        one.data = keyed_normal(one.shape, 2, index, name) * (one[0].numel() ** -0.5 if one.ndim > 1 else 0.1)
    model = Model(network.eval().requires_grad_(False), {"defaults": {"steps": 2}}, "clip")
    file = lora(tmp_path, TOWER, network=network)
    own = network.state_dict()[TOWER].clone()
    assert not torch.equal(drawn(model, lora=[[file, 1.0]]), plain := drawn(model))
    assert torch.equal(drawn(model, lora=[[file, 0.0]]), plain)
    assert torch.equal(network.state_dict()[TOWER], own)


def test_the_base_is_as_it_was_while_another_picture_is_drawn_and_when_one_is_cancelled(tmp_path: Path) -> None:
    file = lora(tmp_path, QUERY, CONV)
    before = {name: (one.data_ptr(), one.clone()) for name, one in NETWORK.state_dict().items()}
    plain, styled = drawn(), drawn(lora=[[file, 0.7]])
    events = generate(MODEL, asking(lora=[[file, 0.7]]))
    assert isinstance(next(events), Progress)
    assert torch.equal(drawn(), plain)
    assert next(event for event in events if isinstance(event, Result)).picture.equal(styled)
    events = generate(MODEL, asking(lora=[[file, 0.7]]))
    next(events)
    events.close()  # type: ignore[attr-defined]
    for name, one in NETWORK.state_dict().items():
        assert (one.data_ptr(), True) == (before[name][0], torch.equal(one, before[name][1]))


def test_a_lora_is_on_inside_of_its_context_alone(tmp_path: Path) -> None:
    request = adapters.opened(asking(lora=[[lora(tmp_path, QUERY), 1.0]]), NETWORK, {})
    own = NETWORK.state_dict()[QUERY].data_ptr()
    context = adapters.wearing(NETWORK, request)
    for _ in range(2):
        assert NETWORK.state_dict()[QUERY].data_ptr() == own
        with context:
            assert NETWORK.state_dict()[QUERY].data_ptr() != own
    with pytest.raises(ZeroDivisionError), context:
        raise ZeroDivisionError
    assert NETWORK.state_dict()[QUERY].data_ptr() == own


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0}, {"pag_scale": 2.0}], ids=str)
def test_a_controlnet_adds_what_it_is_weighed(tmp_path: Path, fields: dict[str, Any]) -> None:
    file, other, picture = controlnet(tmp_path), controlnet(tmp_path, 2), hint(tmp_path)
    plain = drawn(**fields)
    assert torch.equal(drawn(control=[[file, picture, 0.0]], **fields), plain)
    whole = drawn(control=[[file, picture, 1.0]], **fields)
    assert (whole - plain).abs().max() > 1e-2
    assert not torch.equal(drawn(control=[[file, hint(tmp_path, 2), 1.0]], **fields), whole)
    twice = drawn(control=[[file, picture, 0.5], [file, picture, 0.5]], **fields)
    torch.testing.assert_close(twice, whole, rtol=0, atol=1e-3)
    assert not torch.equal(drawn(control=[[file, picture, 1.0], [other, picture, 1.0]], **fields), whole)


def test_guidance_steers_by_the_hint_too(tmp_path: Path) -> None:
    """Both branches have it, so that equal words leave nothing to guide by."""
    file, picture = controlnet(tmp_path), hint(tmp_path)
    same = drawn(control=[[file, picture, 1.0]], negative="cat", guidance_scale=7.0)
    alone = drawn(control=[[file, picture, 1.0]], guidance_scale=1.0)
    torch.testing.assert_close(same, alone, rtol=0, atol=1e-4)


def test_a_weaker_guide_is_told_no_hint(tmp_path: Path) -> None:
    file, picture = controlnet(tmp_path), hint(tmp_path)
    guide = Guide("1" * 64, MODEL)
    plain = drawn(guidance_model=guide, guidance_scale=3.0)
    assert not torch.equal(drawn(guidance_model=guide, guidance_scale=3.0, control=[[file, picture, 1.0]]), plain)


def test_batches_equal_singles_and_records_draw_again(tmp_path: Path) -> None:
    style, file, picture = lora(tmp_path, QUERY), controlnet(tmp_path), hint(tmp_path)
    fields = {"lora": [[style, 0.7]], "control": [[file, picture, 0.8]]}
    asked = [asking(prompt, **fields) for prompt in ("cat", "red heart")]
    together = results(asked)
    assert [one.record.batch for one in together] == [2, 2]
    for request, one in zip(asked, together):
        torch.testing.assert_close(one.picture, results(request)[0].picture, rtol=0, atol=5e-5)
    png = together[1].png()
    record = read(png, "a.png")
    assert record == together[1].record
    written = json.loads(record.request.model_dump_json(exclude_none=True))
    assert written["lora"] == [[style.digest, 0.7]]
    assert written["control"] == [[file.digest, picture.digest, 0.8]]
    with pytest.raises(InputError, match=f"needs the hint picture whose pixels have the sha256 {picture.digest[:9]}"):
        next(replay(MODEL, record))
    steps = (
        (
            {"control": ((WeightsFile(file.digest), picture, 0.8),)},
            f"the LoRA whose file has the sha256 {style.digest[:9]}",
        ),
        ({"lora": ((style, 0.7),)}, f"the ControlNet whose file has the sha256 {file.digest[:9]}"),
        ({"control": ((file, picture, 0.8),)}, None),
    )
    for update, missing in steps:
        record = record.model_copy(update={"request": record.request.model_copy(update=update)})
        if missing:
            with pytest.raises(InputError, match=missing):
                next(replay(MODEL, record))
    (again,) = [event for event in replay(MODEL, record) if isinstance(event, Result)]
    assert again.png() == png


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, reader = adapters.READERS["lora"]
    calls: list[Path] = []
    monkeypatch.setitem(adapters.READERS, "lora", (kind, lambda path, model: calls.append(path) or reader(path, model)))
    style = lora(tmp_path, QUERY)
    results([asking("cat", lora=[[style, 0.5]]), asking("dog", lora=[[style, 0.7]])])
    assert len(calls) == 1


def test_what_does_not_fit_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    style, file, picture = lora(tmp_path, QUERY), controlnet(tmp_path), hint(tmp_path)
    for fields, message in (
        ({"lora": [[file, 1.0]]}, "is a ControlNet; wanted is a LoRA"),
        ({"control": [[style, picture, 1.0]]}, "is a LoRA; wanted is a ControlNet"),
    ):
        with pytest.raises(InputError, match=message):
            next(generate(MODEL, [asking(), asking(**fields)]))
    with pytest.raises(InputError, match=r"none\.safetensors: cannot be read"):
        WeightsFile.read(tmp_path / "none.safetensors")
    for fields, message in (
        ({"lora": []}, "lora"),
        ({"lora": [["/etc/passwd", 1.0]]}, "WeightsFile.read"),
        ({"lora": [[style, 1e3]]}, "must be at most 100"),
        ({"control": [[style, 1.0]]}, "control"),
    ):
        with pytest.raises(InputError, match=message):
            asking(**fields)


def test_a_controlnet_works_in_its_share_of_the_steps_alone(tmp_path: Path) -> None:
    file, picture = controlnet(tmp_path), hint(tmp_path)
    plain, whole = drawn(), drawn(control=[[file, picture, 1.0]])
    assert torch.equal(drawn(control=[[file, picture, 1.0, {"start": 0.1, "end": 0.4}]]), plain)  # no whole step of two
    first = drawn(control=[[file, picture, 1.0, {"end": 0.5}]])
    last = drawn(control=[[file, picture, 1.0, {"start": 0.5}]])
    assert torch.equal(drawn(control=[[file, picture, 1.0, {"start": 0.0, "end": 1.0}]]), whole)
    pictures = [plain, whole, first, last]
    assert all((one - other).abs().max() > 1e-3 for n, one in enumerate(pictures) for other in pictures[:n])


def test_guess_mode_leaves_what_guidance_leads_away_from_alone(tmp_path: Path) -> None:
    file, picture = controlnet(tmp_path), hint(tmp_path)
    guess = {"guess": True}
    same = drawn(control=[[file, picture, 1.0, guess]], negative="cat", guidance_scale=7.0)
    alone = drawn(control=[[file, picture, 1.0, guess]], guidance_scale=1.0)
    assert (same - alone).abs().max() > 1e-2
    fewer = drawn(control=[[file, picture, 1.0]], guidance_scale=1.0)
    assert (fewer - alone).abs().max() > 1e-3
    pooled = drawn(control=[[file, picture, 1.0, {"pooled": True}]], guidance_scale=1.0)
    assert (pooled - fewer).abs().max() > 1e-3


def test_terms_are_written_with_the_picture_and_refused_where_they_cannot_be(tmp_path: Path) -> None:
    file, picture = controlnet(tmp_path), hint(tmp_path)
    (result,) = results(asking(control=[[file, picture, 0.8, {"end": 0.5, "guess": True}]]))
    written = json.loads(result.record.request.model_dump_json(exclude_none=True))["control"][0]
    assert written == [file.digest, picture.digest, 0.8, {"start": 0.0, "end": 0.5, "guess": True, "pooled": False}]
    read_again = read(result.png(), "a.png")
    assert read_again == result.record
    for terms, message in (
        ({"start": 0.5, "end": 0.5}, r"start 0\.5 must be below end 0\.5"),
        ({"end": 1.5}, "control"),
        ({"ends": 0.5}, "control"),
    ):
        with pytest.raises(InputError, match=message):
            asking(control=[[file, picture, 0.8, terms]])
    for kind, message in (("canny", "kind 'canny' is number 3, and this ControlNet has no kinds"), ("cany", "canny")):
        with pytest.raises(InputError, match=message):
            next(generate(MODEL, asking(control=[[file, picture, 0.8, {"kind": kind}]])))
