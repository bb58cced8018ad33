"""The released models of 2021 draw what they are asked for: maps, boxes, small pictures, classes, words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from latentkit.applications.attachment import Attachment
from latentkit.applications.generate import Result, generate, replay
from latentkit.applications.metadata import read
from latentkit.applications.plan import from_noise
from latentkit.applications.request import Request, ask, known
from latentkit.applications.rules import resolve
from latentkit.applications.tasks.places import placed, read_boxes
from latentkit.checkpoints.files import Model, load
from latentkit.checkpoints.ldm_file import write_single
from latentkit.cli import application
from latentkit.data.maps import decode_map
from latentkit.diffusion.noise import PictureNoise
from latentkit.errors import InputError
from latentkit.model.conditioners.tokenizer import PIECES
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, Preset

BOXES = ((3, 0.1, 0.2, 0.5, 0.9), (7, 0.0, 0.0, 1.0, 0.5))
SEMANTIC = Model(family.model("semantic", scale=1.0), {"defaults": {"steps": 2}}, "semantic", "0" * 64)
LAYOUT = Model(family.model("layout", scale=1.0), {"defaults": {"steps": 2}}, "layout", "0" * 64)


def painted(folder: Path, numbers: np.ndarray) -> Path:
    path = folder / "map.png"
    Image.fromarray(numbers.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def semantic_map(tmp_path: Path) -> Attachment:
    return Attachment.read(painted(tmp_path, np.arange(32 * 32).reshape(32, 32) % 7), decode_map)


def results(model: Model, *asked: Request) -> list[Result]:
    found = [event for event in generate(model, list(asked)) if isinstance(event, Result)]
    return sorted(found, key=lambda result: result.number)


def first_rows(model: Model, request: Request, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor | None]:
    """What the U-Net is given at the first step, and its context."""
    network, calls = model.network, []
    full = resolve(request, network, {})
    shape = network.latent_shape(known(full.height), known(full.width))
    plan = from_noise(network, [full], PictureNoise([known(full.seed)], shape))
    forward = network.denoiser.unet.forward

    def watched(x: Tensor, *told: Any, **how: Any) -> Tensor:
        calls.append((x, told[1]))
        return forward(x, *told, **how)

    monkeypatch.setattr(network.denoiser.unet, "forward", watched)
    plan.denoise(plan.x, float(plan.sigmas[0]))
    monkeypatch.undo()
    return calls[0]


def test_a_map_stands_beside_the_latent(semantic_map: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, context = first_rows(SEMANTIC, Request(semantic_map=semantic_map, seed=1), monkeypatch)
    assert context is None
    assert rows.shape == (1, 6, 16, 16)
    numbers = torch.arange(32 * 32).reshape(32, 32) % 7
    (weight,) = SEMANTIC.network.conditioners["map"].parameters()
    shares = torch.nn.functional.one_hot(numbers, 7).float().unfold(0, 2, 2).unfold(1, 2, 2).mean((3, 4))
    torch.testing.assert_close(rows[0, 3:], (shares @ weight.T).movedim(2, 0))


def test_a_map_says_the_size_and_covers_another_without_mixing_classes(tmp_path: Path) -> None:
    numbers = np.zeros((36, 66))
    numbers[:, 33:] = 6
    attached = Attachment.read(painted(tmp_path, numbers), decode_map)
    network = SEMANTIC.network
    own = resolve(Request(semantic_map=attached), network, {})
    assert (own.task, own.height, own.width, own.guidance_scale) == ("semantic-to-image", 36, 64, 1.0)
    (whole,) = placed(network, [own])["map"]
    assert np.array_equal(whole.numpy(), numbers[:, 1:65])
    (square,) = placed(network, [resolve(Request(semantic_map=attached, width=48, height=48), network, {})])["map"]
    assert square.shape == (48, 48)
    assert square.unique().tolist() == [0, 6]
    assert (square[:, :24] == 0).all()
    assert (square[:, 24:] == 6).all()


def test_boxes_are_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ask(layout=[list(box) for box in BOXES], seed=1)
    rows, context = first_rows(LAYOUT, request, monkeypatch)
    assert rows.shape[0] == 1
    encoder: Any = LAYOUT.network.conditioners["layout"]
    # 6 x 6 points of 40 tokens; 39 is none.
    tokens = [3, 1 * 6 + 0, 4 * 6 + 2, 7, 0, 2 * 6 + 5, *[39] * 6, 0, 35]
    assert context is not None
    torch.testing.assert_close(context, encoder.encoder(torch.tensor([tokens])))
    full = resolve(request, LAYOUT.network, {})
    assert (full.task, full.guidance_scale) == ("layout-to-image", 1.0)
    _, guided = first_rows(LAYOUT, request.model_copy(update={"guidance_scale": 2.0}), monkeypatch)
    assert guided is not None
    torch.testing.assert_close(guided[0], encoder.encoder(torch.tensor([[39] * 12 + [0, 35]]))[0])


@pytest.mark.parametrize("kind", ["map", "layout"])
def test_batches_equal_singles_and_records_draw_again(kind: str, semantic_map: Attachment, tmp_path: Path) -> None:
    model = SEMANTIC if kind == "map" else LAYOUT
    other = Attachment.read(painted(tmp_path, np.zeros((32, 32))), decode_map)
    asked = (
        [Request(semantic_map=each, seed=4) for each in (semantic_map, other)]
        if kind == "map"
        else [Request(layout=each, seed=4, width=32, height=32) for each in (BOXES, BOXES[:1])]
    )
    together = results(model, *asked)
    assert [one.record.batch for one in together] == [2, 2]
    assert (together[0].picture - together[1].picture).abs().max() > 1e-3
    for request, one in zip(asked, together):
        torch.testing.assert_close(one.picture, results(model, request)[0].picture, rtol=0, atol=5e-5)
    record = read(together[1].png(), "a.png")
    if kind == "map":
        with pytest.raises(InputError, match="needs the semantic map picture whose pixels have"):
            next(replay(model, record))
        given = record.request.model_copy(update={"semantic_map": other})
        record = record.model_copy(update={"request": given})
    (again,) = [event for event in replay(model, record) if isinstance(event, Result)]
    assert again.png() == together[1].png()


def test_what_cannot_be_done(semantic_map: Attachment, tmp_path: Path) -> None:
    plain = family.model("SD 1")
    wild = Attachment.read(painted(tmp_path, np.full((32, 32), 9)), decode_map)
    for network, request, message in (
        (SEMANTIC.network, Request(), "draws by a semantic map: give --map"),
        (SEMANTIC.network, Request(semantic_map=wild), "classes 9 to 9; this model has 0 to 6"),
        (SEMANTIC.network, Request(semantic_map=semantic_map, guidance_scale=3.0), "no condition that can be left out"),
        (SEMANTIC.network, Request(semantic_map=semantic_map, prompt="x"), "no prompt; it takes: semantic map"),
        (SEMANTIC.network, Request(task="semantic-to-image"), "semantic-to-image needs a semantic map"),
        (LAYOUT.network, Request(task="layout-to-image"), "layout-to-image needs a layout"),
        (LAYOUT.network, Request(layout=((3, 0.5, 0.0, 0.5, 1.0),)), r"the box of 3 is empty \(left 0\.5"),
        (LAYOUT.network, Request(layout=((3, 0.0, 0.8, 0.5, 0.7),)), "is empty"),
        (LAYOUT.network, Request(layout=(("cat", 0.0, 0.0, 0.5, 1.0),)), "knows classes by number only"),
        (LAYOUT.network, Request(layout=BOXES * 3), "has 6 boxes; this model reads 4"),
        (LAYOUT.network, Request(layout=BOXES, semantic_map=semantic_map), "no semantic map; it takes: layout"),
        (plain, Request(layout=BOXES, prompt="x"), "no layout; it takes: prompt"),
        (plain, Request(semantic_map=semantic_map), "no semantic map; it takes: prompt"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(request, network, {})
        assert caught.value.exit_code == 2, message
    with pytest.raises(InputError, match="bottom of layout 1: must be at most 1"):
        ask(layout=[[3, 0.0, 0.0, 0.5, 1.5]])
    assert resolve(Request(init=semantic_map, layout=BOXES), LAYOUT.network, {}).task == "image-to-image"


@pytest.mark.parametrize("listed", [True, False])
def test_boxes_are_read_as_imagefolders_write_them(tmp_path: Path, listed: bool) -> None:
    objects = [{"label": "person", "box": [0.1, 0.2, 0.5, 1.0]}, {"label": 3, "box": [0, 0, 1, 1]}]
    path = tmp_path / "boxes.json"
    whole = {"file_name": "1.jpg", "text": "a person", "objects": objects}
    path.write_text(json.dumps(objects if listed else whole), encoding="utf-8")
    assert read_boxes(path) == [["person", 0.1, 0.2, 0.5, 1.0], [3, 0.0, 0.0, 1.0, 1.0]]
    assert ask(layout=read_boxes(path)).layout == (("person", 0.1, 0.2, 0.5, 1.0), (3, 0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"boxes": []}', "objects: "),
        ('[{"label": "cat", "box": [0, 0, 1]}]', r"0\.box\.3: .*a layout is"),
        ('[{"label": "cat", "box": [0, 0, 1, "1"]}]', r"0\.box\.3"),
        ('[{"label": null, "box": [0, 0, 1, 1]}]', r"0\.label"),
        (" " * (1 << 20) + "[]", "more than 1048576 bytes"),
    ],
)
def test_files_that_hold_no_boxes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_boxes(path)
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        read_boxes(tmp_path / "none.json")


def test_classes_without_a_row_for_none_are_drawn_unguided() -> None:
    plain = family.model("classes")
    label: Any = plain.architecture.label
    assert resolve(Request(label="cat"), plain, {}).guidance_scale == 2.0
    bare = LatentDiffusion(
        replace(plain.architecture, label=replace(label, null=False)), {"label": {"classes": ["cat", "dog"]}}
    )
    assert resolve(Request(label="cat"), bare, {}).guidance_scale == 1.0
    assert resolve(Request(label="cat"), bare, {"guidance_scale": 3.0}).guidance_scale == 3.0


def released(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as the released code writes it, without a word of itself: its shapes are those of a preset."""
    write_single(path, family.model(name, scale=1.0), "test")
    save_file(load_file(path), path)
    monkeypatch.setitem(PRESETS, "small", Preset(family.ARCHITECTURES[name], 1.0))


def test_the_2021_text_model_reads_berts_vocabulary_beside_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    released(path, "text of 2021", monkeypatch)
    told = Request(prompt="red hearts", seed=1, steps=1)
    with pytest.raises(InputError, match=r"lay BERT's \(vocab\.txt\) beside its file"):
        results(load(path), told)
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "red", "heart", "##s"]), encoding="utf-8")
    model = load(path)
    assert results(model, told)[0].picture.isfinite().all()
    text: Any = model.network.conditioner("text")
    assert text._ids("red hearts")[:5] == [2, 5, 6, 7, 3]


def test_the_command_line_draws_maps_and_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    numbers = painted(tmp_path, np.arange(32 * 32).reshape(32, 32) % 7)
    boxes = tmp_path / "boxes.json"
    boxes.write_text('{"objects": [{"label": 3, "box": [0.1, 0.2, 0.5, 0.9]}]}', encoding="utf-8")
    for name, told in (("semantic", ["--map", str(numbers)]), ("layout", ["--boxes", str(boxes)])):
        file, out = tmp_path / f"{name}.ckpt", str(tmp_path / name)
        released(file, name, monkeypatch)
        found = run(application(), ["generate", "-m", str(file), *told, "-o", out, "--steps", "2", "--seed", "1"])
        assert found.exit_code == 0, found.output
        picture = found.output.split()[-1]
        assert Image.open(picture).size == (32, 32)
        more = told if name == "semantic" else []
        again = run(application(), ["replay", picture, "-m", str(file), "-o", out, *more])
        assert again.exit_code == 0, again.output
        if name == "semantic":
            refused = run(application(), ["replay", picture, "-m", str(file), "-o", out])
            assert "drawn from a semantic map picture" in str(refused.exception)
            assert "give it with --map PICTURE" in str(refused.exception)
