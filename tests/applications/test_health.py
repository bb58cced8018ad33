"""The health page: of finished, broken and unfinished runs, and what it says of each thing that is wrong."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentkit.applications.stages import health
from latentkit.applications.stages.health import Found, look, verdict, write_health
from latentkit.applications.stages.train import train
from latentkit.checkpoints.files import load_autoencoder
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.pictures import to_png, to_tiff
from latentkit.data.source import open_source
from latentkit.errors import InputError
from latentkit.evaluation.first_stage import Codes
from latentkit.evaluation.latents import statistics
from latentkit.evaluation.reconstruction import psnr, reconstruct
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.training.recipe import AutoencoderRecipe, parse_recipe


def recipe(pictures: Path, **changes: Any) -> AutoencoderRecipe:
    values: dict[str, Any] = {
        "stage": "autoencoder",
        "name": "small",
        "data": {"path": str(pictures), "transform": {"size": 16, "channels": 3}},
        "network": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": False, "codes": 16},
        "loss": {"adversarial": {"start": 2, "warmup": 1, "ramp": 2, "network": {"channels": 4, "layers": 1}}},
        "optimiser": {"warmup": 0},
        "averaging": {"power": []},
        "schedule": {"steps": 4, "batch": 2, "save_every": 2, "sample_every": 4, "log_every": 1, "device": "cpu"},
    }
    found = parse_recipe(values | changes)
    assert isinstance(found, AutoencoderRecipe)
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    for number in range(6):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((24, 16)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "small"
    train(recipe(pictures), run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_finished_run(run: Path) -> None:
    page = write_health(run, False)
    assert page == run / "health.html"
    text = page.read_text()
    for heading in ("What to make of it", "Reconstructions", "In figures", "Quality", "Discriminator", "Codebook"):
        assert f"<h2>{heading}</h2>" in text
    assert "the finished model" in text
    assert "of 16 chosen" in text
    assert "<script" not in text
    assert 'src="http' not in text
    assert "No values were recorded" not in text
    assert "deviation of latent channels" in text
    assert "Frechet distance by latentkit-random-conv-v1" in text
    assert "LPIPS" not in text, "there are no weights of it"
    assert text.count("data:image/png") == 2 * 2 * 6
    assert write_health(run, False).read_text() == text


def test_every_part_of_the_loss_has_a_curve(trained: Path, pictures: Path, tmp_path: Path) -> None:
    """Those that may be negative too."""
    parts = dict.fromkeys(("l1", "l2", "pyramid", "structure", "wavelet", "frequency", "equivariance"), 0.1)
    critic = recipe(pictures).loss.adversarial
    assert critic is not None
    own = {"network": "own", "steps": 1}
    loss = parts | {"output_variance": True, "perceptual": own, "adversarial": critic.model_dump()}
    train(
        recipe(pictures, loss=loss, schedule=recipe(pictures).schedule.model_dump() | {"steps": 12}), tmp_path / "run"
    )
    text = write_health(tmp_path / "run", False).read_text()
    for name in (*parts, "perceptual", "codes", "commitment", "critic&#x27;s verdict", "log of the output variance"):
        assert f"</span> {name} <b>" in text, name
    known: dict[str, list[tuple[float, float]]] = {
        "loss": [(1, 0.5), (2, -0.5)],
        "log_variance": [(1, -1.0), (2, -2.0)],
    }
    (_, drawn) = health._learning(recipe(pictures), known)[1]
    assert "<b>-0.5</b>" in drawn
    assert "<b>-2</b>" in drawn


def test_a_run_under_way(run: Path) -> None:
    """The averaged weights of the newest checkpoint are those that a finished model gets."""
    finished = load_autoencoder(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    assert "the averaged weights of step 4" in write_health(run, False).read_text()
    first_stage, _ = health._weights(run, recipe(Path("absent")))
    assert finished.autoencoder is not None
    assert first_stage.autoencoder is not None
    for name, value in finished.autoencoder.state_dict().items():
        assert torch.equal(value, first_stage.autoencoder.state_dict()[name]), name


def test_a_run_whose_newest_checkpoint_is_damaged(run: Path) -> None:
    (run / "model.safetensors").unlink()
    (run / "checkpoints" / "step-00000004" / "ema.safetensors").write_bytes(b"damaged")
    assert "the averaged weights of step 2" in write_health(run, False).read_text()
    assert (run / "checkpoints" / "step-00000004").is_dir(), "only looked at"


def test_a_run_without_weights_or_pictures_shows_its_curves(run: Path, pictures: Path, tmp_path: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(str(pictures), str(tmp_path / "gone")))
    page = write_health(run, False).read_text()
    assert "Nothing could be reconstructed" in page
    assert "gone does not exist" in page
    assert "<svg" in page
    (run / "recipe.yaml").write_text(text)
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    assert "no model and no whole checkpoint yet" in write_health(run, False).read_text()


def test_a_fit_and_what_is_no_run(run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run, whole / "autoencoder")
    assert write_health(whole, False) == whole / "autoencoder" / "health.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no recipe\.yaml; name the folder of a run"):
        write_health(tmp_path / "empty", False)
    with pytest.raises(InputError, match=r"absent is no folder$"):
        write_health(tmp_path / "absent", False)
    shutil.copytree(whole / "autoencoder", tmp_path / "table" / "kl-f2")
    (tmp_path / "table" / "plan.yaml").touch()
    with pytest.raises(InputError, match=r"table is no run, and holds 1; name one: .*table/kl-f2$"):
        write_health(tmp_path / "table", False)
    shutil.copytree(whole / "autoencoder", run / "perceptual")
    with pytest.raises(InputError, match=r"own network; name the run it is in: .*run$"):
        write_health(run / "perceptual", False)
    second = {
        "stage": "diffusion",
        "name": "b",
        "first_stage": "identity",
        "data": {"path": "x", "transform": {"size": 16}},
        "network": {},
        "schedule": {"steps": 1, "batch": 1},
    }
    (run / "recipe.yaml").write_text(json.dumps(second))
    with pytest.raises(InputError, match="a run of the second stage"):
        write_health(run, False)


def test_the_worst_come_first(trained: Path, pictures: Path) -> None:
    first_stage = load_autoencoder(trained / "model.safetensors")
    held = Pictures(open_source(pictures), Transform(size=16), 0)
    rows = look(first_stage, held).rows
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    said = [float(value) for value in re.findall(r"<figcaption>([\d.]+) dB", health._extremes(first_stage, held, rows))]
    assert said == [round(row[0], 1) for row in [*rows[:6], *rows[::-1][:6]]]
    original = held.view(rows[0][2], 0)[1]
    assert rows[0][0] == pytest.approx(psnr(original, reconstruct(first_stage, original).picture))


def good(**changes: Any) -> Found:
    """Pictures that come back well, latents that are smooth, apart and normal, codes evenly used."""
    rough = torch.nn.functional.interpolate(torch.randn(1, 3, 16, 16), scale_factor=8.0, mode="bilinear")[0]
    found = Found([(30.0, 0.9, 0)], statistics([rough]), Codes(16, 16, 15.0, 640), [], [])
    return found._replace(**changes)


def channels(change: Any) -> Any:
    z = torch.nn.functional.interpolate(torch.randn(1, 3, 16, 16), scale_factor=8.0, mode="bilinear")[0]
    return statistics([change(z)])


def wild(z: torch.Tensor) -> torch.Tensor:
    z[1, :3, :3] = 60.0
    return z


def test_nothing_is_said_of_a_good_run() -> None:
    known = {"psnr": [(1, 31.0)], "critic/told_apart": [(1, 0.8)], "autoencoder/adaptive_weight": [(1, 0.5)]}
    known["validation/psnr"] = [(1, 30.5), (4, 30.0)]
    assert verdict(recipe(Path("x")), known, good()) == ["Nothing stands out."]
    few = Codes(16, 3, 1.2, 4 * 16 - 1)
    assert verdict(recipe(Path("x")), known, good(codes=few)) == ["Nothing stands out."], "too few cells to tell"
    assert verdict(recipe(Path("x")), {}, None) == ["Nothing stands out."]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [(20.0, 0.5, 0)]}, "come back poorly (20.0 dB)"),
        ({"codes": Codes(16, 7, 6.0, 640)}, "codebook has collapsed: 7 of 16"),
        ({"codes": Codes(1000, 990, 90.0, 64000)}, "used like 90"),
        ({"latents": channels(lambda z: z * torch.tensor([1.0, 0.01, 1.0])[:, None, None])}, "channels 1 hardly vary"),
        ({"latents": channels(lambda z: torch.cat([z, -z[1:2] + 0.1 * z[:1]]))}, "channels 1 and 3 say much the same"),
        ({"latents": channels(wild)}, "channels 1 have far outliers"),
        ({"latents": statistics([torch.randn(3, 64, 64)])}, "as rough as noise"),
    ],
)
def test_what_is_said_of_latents_and_pictures(changes: dict[str, Any], said: str) -> None:
    (sentence,) = verdict(recipe(Path("x")), {}, good(**changes))
    assert said in sentence


def test_levels_that_are_hardly_used_are_not_called_a_codebook() -> None:
    network = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "latent_channels": 2, "levels": [4, 4]}
    (sentence,) = verdict(recipe(Path("x"), network=network), {}, good(codes=Codes(16, 7, 6.0, 640)))
    assert sentence.startswith("The levels have collapsed: 7 of 16")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"critic/told_apart": [(i, 0.6 if i < 90 else 0.97) for i in range(100)]}, "discriminator is winning: 97%"),
        ({"critic/told_apart": [(i, 0.9 if i < 90 else 0.5) for i in range(100)]}, "discriminator is guessing: 50%"),
        (
            {"critic/told_apart": [(1, 0.7)], "autoencoder/adaptive_weight": [(1, 0.0005)]},
            "counts for nothing: its adaptive weight is 0.0005",
        ),
        (
            {"critic/told_apart": [(1, 0.7)], "validation/psnr": [(1, 30.0), (5, 28.5)]},
            "fell from 30.0 to 28.5 dB",
        ),
        ({"attempt": [(7, 1), (9, 2)]}, "went back to a checkpoint, 2 times (first at step 7)"),
        ({"autoencoder/psnr": [(1, 35.0)]}, "by heart: they come back with 35.0 dB, others with 30.0"),
    ],
)
def test_what_is_said_of_training(known: dict[str, Any], said: str) -> None:
    (sentence,) = verdict(recipe(Path("x")), known, good())
    assert said in sentence


@pytest.mark.parametrize(("alpha", "mode"), [(True, "RGBA"), (False, "RGB")])
def test_four_channels_are_shown_as_what_they_are(tmp_path: Path, alpha: bool, mode: str) -> None:
    picture = torch.zeros(4, 16, 16)
    name, data = ("0.png", to_png(picture)) if alpha else ("0.tif", to_tiff(picture))
    (tmp_path / name).write_bytes(data)
    config = AutoencoderConfig(picture_channels=4, channels=32, multipliers=(1,), blocks=1, attention=False)
    held = Pictures(open_source(tmp_path), Transform(size=16, channels=4), 0)
    page = health._extremes(FirstStage(config, 3).eval(), held, [(1.0, 1.0, 0)])
    shown = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"base64,([^\"']+)", page)]
    assert {image.mode for image in shown} == {mode}
