"""Bits per dimension of pictures: closed forms through the whole way, from the folder to the printed line."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from torch import Tensor
from typer.testing import CliRunner

from latentkit.checkpoints.files import Model, save_model
from latentkit.cli import application
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.pictures import to_png
from latentkit.data.source import Source, open_source
from latentkit.diffusion.noise import keyed_uniform
from latentkit.diffusion.samplers.driver import Denoise, Denoised
from latentkit.errors import InputError
from latentkit.evaluation.likelihood import BIN, _dequantised, likelihood, lines
from latentkit.model.latent_diffusion import LatentDiffusion

COUNT, SIDE = 5, 32


def pictures(folder: Path, side: int) -> Source:
    """Gray noise of deviation about 0.3, with captions."""
    generator = torch.Generator().manual_seed(1)
    for i in range(COUNT):
        picture = (0.3 * torch.randn(3, side, side, generator=generator)).clamp(-1, 1)
        (folder / f"{i}.png").write_bytes(to_png(picture))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return open_source(folder, False)


def believing(network: LatentDiffusion, mean: Tensor, std: Tensor) -> LatentDiffusion:
    """The model with the exact denoiser of N(mean, std^2), `c 1 1` each, in the place of its own."""

    def bind(conditioning: Any, perturbed: bool = False) -> Denoise:
        def denoise(x: Tensor, sigma: float) -> Denoised:
            return Denoised(mean + (x - mean) * (std**2 / (std**2 + sigma**2)))

        return denoise

    network.denoiser.bind = bind  # type: ignore[method-assign]
    return network


def test_of_a_model_of_pixels_it_is_that_of_its_normal_density(tmp_path: Path) -> None:
    """Exactly to 1e-3 bits, and the bound just above; the scale of the first stage is undone."""
    source = pictures(tmp_path, 8)
    network = tiny_model(text=False, latent=False)
    scale, shift = (
        part[:, None, None].double() for part in (network.first_stage.latent_std, network.first_stage.latent_mean)
    )
    believing(network, torch.tensor([0.1, 0.0, -0.1]).double()[:, None, None], torch.full((3, 1, 1), 0.4).double())
    found = likelihood(Model(network), source, steps=400)
    total = 0.0
    for i in range(COUNT):
        eight = np.asarray(Image.open(tmp_path / f"{i}.png")).transpose(2, 0, 1)
        x = (
            torch.from_numpy(eight.astype(np.float32) / 127.5 - 1)
            + (keyed_uniform((3, 8, 8), 0, "dequantise", i) - 0.5) * BIN
        )
        mean = torch.tensor([0.1, 0.0, -0.1]).double()[:, None, None] * scale + shift
        deviation = (0.4**2 + network.architecture.schedule.sigma_min**2) ** 0.5 * scale
        total -= float(torch.distributions.Normal(mean, deviation).log_prob(x.double()).sum())
    bits = total / COUNT / (192 * math.log(2)) - math.log2(BIN)
    assert found.exact is not None
    assert found.exact.value == pytest.approx(bits, abs=1e-3)
    assert found.bound.value == pytest.approx(bits, abs=0.15)
    assert sum(found.parts.values()) == pytest.approx(found.bound.value, abs=1e-6)
    assert sum(value for _, value in found.levels) == pytest.approx(found.parts["diffusion"], abs=1e-6)


def two_stages(decoded: float) -> LatentDiffusion:
    """Latents of which every picture says nothing, whose diffusion is exact, and a decoder that says `decoded`."""
    network = tiny_model()
    stage = network.first_stage
    stage.latent_std.mul_(3)
    stage.moments = lambda pixels: torch.cat(  # type: ignore[method-assign]
        [torch.zeros(len(pixels), 4, 8, 8), torch.full((len(pixels), 4, 8, 8), -1.0)], dim=1
    )
    stage.decode = lambda z: torch.full((len(z), 3, SIDE, SIDE), decoded)  # type: ignore[method-assign]
    mean, std = (part[:, None, None].double() for part in (stage.latent_mean, stage.latent_std))
    return believing(network, -mean / std, math.exp(-0.5) / std)


def test_of_two_stages_it_is_the_whole_bound(tmp_path: Path) -> None:
    """Where the posterior is the diffusion's own density they cancel, and the decoder's normal density is left."""
    found = likelihood(Model(two_stages(0.2)), pictures(tmp_path, SIDE), steps=400, flow_steps=40)
    assert found.exact is None  # a density of latents is none of pictures
    latents = sum(value for name, value in found.parts.items() if name not in ("decoder", "quantisation"))
    assert abs(latents) < 0.01
    assert abs(found.parts["latents"]) > 0.01
    worse = likelihood(Model(two_stages(0.9)), open_source(tmp_path, False), steps=50)
    for one, decoded in ((found, 0.2), (worse, 0.9)):
        assert one.decoder_std == pytest.approx(math.hypot(decoded, 0.3), rel=0.03)
        density = 0.5 * math.log2(2 * math.pi * math.e * (one.decoder_std or 0) ** 2)
        assert one.parts["decoder"] == pytest.approx(density, rel=1e-3)
    assert worse.bound.value > found.bound.value


def test_a_picture_has_its_number_whatever_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, mean, std = pictures(tmp_path, 8), torch.zeros(3, 1, 1), torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    model = Model(believing(tiny_model(text=False, latent=False), mean, std))
    whole = likelihood(model, source, steps=5, flow_steps=4)
    assert (whole.pictures, whole.bound.error is None) == (COUNT, False)
    monkeypatch.setattr("latentkit.evaluation.likelihood.AT_ONCE", COUNT - 1)  # the last one alone
    apart = likelihood(model, source, steps=5, flow_steps=4)
    assert apart.exact is not None
    assert whole.exact is not None
    assert apart.exact.value == pytest.approx(whole.exact.value, abs=1e-5)
    assert apart.bound.value == pytest.approx(whole.bound.value, abs=1e-5)
    one, other = (likelihood(model, source, count=1, steps=5, flow_steps=4, seed=seed) for seed in (0, 1))
    assert (one.pictures, one.bound.error) == (1, None)
    assert one.exact != other.exact
    assert one.bound != other.bound


def test_values_are_spread_evenly_over_their_width(tmp_path: Path) -> None:
    source = pictures(tmp_path, SIDE)
    shown = Pictures(source, Transform(size=SIDE), 0)
    away = torch.stack([_dequantised(shown, i, 0) - shown.sample(i, i) for i in range(COUNT)]) / BIN
    assert -0.5 <= away.min() < -0.49
    assert 0.49 < away.max() <= 0.5
    assert away.std() == pytest.approx(12**-0.5, rel=0.02)
    assert not torch.equal(away[0], away[1])


def test_the_model_is_told_the_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, told = tiny_model(label=True), []
    condition = network.condition
    monkeypatch.setattr(network, "condition", lambda values, count: told.append(values) or condition(values, count))
    found = likelihood(Model(network), pictures(tmp_path, SIDE), count=2, steps=3)
    assert found.told == ("text", "label")
    assert told == [{"text": ["picture 0", "picture 1"], "label": [None, None]}]


def spoilt(change: Callable[[LatentDiffusion], None]) -> LatentDiffusion:
    network = tiny_model(text=False)
    change(network)
    return network


def wide(network: LatentDiffusion) -> None:
    network.architecture = replace(network.architecture, size=(32, 64))


def coded(network: LatentDiffusion) -> None:
    assert network.architecture.first_stage is not None
    first = replace(network.architecture.first_stage, codes=16)
    network.architecture = replace(network.architecture, first_stage=first)


@pytest.mark.parametrize(
    ("change", "message"),
    [(wide, "64x32 pixels; a likelihood is counted for square"), (coded, "rounds to a codebook")],
)
def test_models_without_such_a_number(change: Callable[[LatentDiffusion], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        likelihood(Model(spoilt(change)), pictures(tmp_path, SIDE), steps=3)


def test_pictures_without_such_a_number(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits"):
        likelihood(Model(tiny_model(text=False)), open_source(tmp_path, False), steps=3)
    with pytest.raises(InputError, match="no pictures"):
        likelihood(Model(tiny_model(text=False)), open_source(tmp_path, False).subset([]), steps=3)


def test_the_command_prints_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = pictures(tmp_path / "data", 8)
    save_model(tmp_path / "pixels.safetensors", tiny_model(text=False, latent=False), {}, torch.float32)
    words = ["evaluate", "likelihood", str(tmp_path / "data"), "-m", str(tmp_path / "pixels.safetensors")]
    words += ["-n", "2", "--steps", "3", "--flow-steps", "2"]
    shown = CliRunner().invoke(application(), [*words, "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert (document["pictures"], document["size"], document["data"]) == (2, [8, 8], source.fingerprint)
    assert document["unit"] == "bits per dimension of 8-bit pixels, dequantised evenly"
    assert document["exact"]["value"] < document["bound"]["value"] + 5
    plain = CliRunner().invoke(application(), words)
    assert "2 pictures of 8x8x3, the model told: nothing" in plain.stdout
    assert f"exactly  {document['exact']['value']:8.4f}" in plain.stdout


def test_lines_of_two_stages(tmp_path: Path) -> None:
    text = "\n".join(lines(likelihood(Model(two_stages(0.0)), pictures(tmp_path, SIDE), count=1, steps=3)))
    assert "exactly" not in text
    assert "the decoder's deviation is 0.3" in text
