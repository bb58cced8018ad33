"""Tiny autoencoders in the layouts of their author and of diffusers, alone and inside of Stable Diffusion."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from latentkit.applications.attachment import WeightsFile
from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny, tiny_digest
from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.exchange import with_part
from latentkit.checkpoints.files import load_autoencoder, load_model, save_autoencoder, save_model
from latentkit.checkpoints.layouts import open_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.names.tiny_names import tiny_config, tiny_json
from latentkit.checkpoints.storage.digest import Digest
from latentkit.cli import application
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyConfig

WIDTH = 16
SMALL = TinyConfig((1, 2), channels=WIDTH)


class Block(nn.Module):
    """As the author builds it."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.conv(x) + x
        return added.relu()


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def authors(latents: int = 4) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder of pixels in 0..1, and decoder to them, of the author's build, with two levels and few channels."""
    torch.manual_seed(2)
    encoder = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), Block(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2, bias=False), Block(), Block(),
        nn.Conv2d(WIDTH, latents, 3, padding=1),
    )  # fmt: skip
    decoder = nn.Sequential(
        Clamp(), nn.Conv2d(latents, WIDTH, 3, padding=1), nn.ReLU(), Block(), Block(),
        nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), Block(),
        nn.Conv2d(WIDTH, 3, 3, padding=1),
    )  # fmt: skip
    return encoder, decoder


def written(folder: Path, form: str, latents: int = 4) -> Path:
    """The author's networks in one of the forms that lie about."""
    encoder, decoder = authors(latents)
    halves = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    if form == "one file":
        whole = {f"{half}.{name}": one for half, held in halves.items() for name, one in held.items()}
        save_file(whole, folder / "taesd.safetensors")
        return folder / "taesd.safetensors"
    for half, held in halves.items():
        if form == "pickles":
            torch.save(held, folder / f"taesd_{half}.pth")
        else:
            save_file(held, folder / f"taesd_{half}.safetensors")
    return folder / ("taesd_decoder.pth" if form == "pickles" else "taesd_encoder.safetensors")


@pytest.mark.parametrize("latents", [4, 16])
@pytest.mark.parametrize("form", ["pickles", "two files", "one file"])
@torch.no_grad()
def test_the_authors_files_give_what_the_authors_networks_give(tmp_path: Path, form: str, latents: int) -> None:
    path = written(tmp_path, form, latents)
    assert is_tiny(path)
    stage = read_tiny(path)
    assert (stage.latent_channels, stage.downsampling) == (latents, 2)
    encoder, decoder = authors(latents)
    pixels = torch.rand(1, 3, 12, 20) * 2 - 1
    z = encoder((pixels + 1) / 2)
    torch.testing.assert_close(stage.encode(pixels), z)
    torch.testing.assert_close(stage.decode(3 * z), decoder(3 * z) * 2 - 1)
    assert not any(parameter.requires_grad for parameter in stage.parameters())


@pytest.mark.parity
@torch.no_grad()
def test_diffusers_folders_and_files_are_read(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3, decoder_block_out_channels=(WIDTH,) * 3, num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(1, 2, 1), latent_channels=16, scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "tiny")
    assert is_tiny(tmp_path / "tiny")
    stage = read_tiny(tmp_path / "tiny")
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    z = theirs.encode(pixels).latents
    torch.testing.assert_close(stage.encode(pixels), (z - 0.25) * 0.5)
    torch.testing.assert_close(stage.decode((z - 0.25) * 0.5), theirs.decode(z).sample)
    file = tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
    assert is_tiny(file)
    torch.testing.assert_close(read_tiny(file).encode(pixels), z)


def with_a_tiny_one() -> LatentDiffusion:
    """Stable Diffusion 1 with a tiny autoencoder for its own."""
    model = family.model("SD 1")
    tiny = LatentDiffusion(replace(model.architecture, first_stage=SMALL), model.state())
    weights = {name: one for name, one in model.state_dict().items() if not name.startswith("first_stage.")}
    tiny.load_state_dict(tiny.state_dict() | weights)
    return tiny.eval().requires_grad_(False)


@pytest.mark.parity
@torch.no_grad()
def test_stable_diffusion_with_one_goes_to_diffusers_and_back(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    model = with_a_tiny_one()
    write_folder(tmp_path / "model", model)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    assert pipe.vae.config.scaling_factor == 1.0
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(model.first_stage.decode(z), pipe.vae.decode(z).sample)
    back = read_folder(tmp_path / "model")
    assert back.architecture == model.architecture
    for name, one in model.state_dict().items():
        assert torch.equal(one, back.state_dict()[name]), name


def test_our_own_files_hold_it_and_the_released_layout_does_not(tmp_path: Path) -> None:
    model = with_a_tiny_one()
    save_model(tmp_path / "model.safetensors", model, {}, torch.float32)
    back, _ = load_model(tmp_path / "model.safetensors", dtype=torch.float32)
    assert back.architecture.first_stage == SMALL
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(back.first_stage.decode(z), model.first_stage.decode(z))
    save_autoencoder(tmp_path / "tiny.safetensors", model.first_stage, {})
    assert torch.equal(load_autoencoder(tmp_path / "tiny.safetensors").decode(z), model.first_stage.decode(z))
    with pytest.raises(InputError, match="CompVis layout holds no tiny autoencoder"):
        write_single(tmp_path / "single.safetensors", model, "test")
    model.first_stage.latent_mean[0] = 1
    with pytest.raises(InputError, match="cannot be folded into a tiny autoencoder"):
        write_folder(tmp_path / "folder", model)


def test_one_stands_in_for_the_first_stage_of_a_model(tmp_path: Path) -> None:
    path = written(tmp_path, "two files")
    model = family.model("SD 1")
    made = with_part(model, path, "vae")
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(made.first_stage.decode(z), read_tiny(path).decode(z))
    assert made.first_stage.latent_std.tolist() == [1.0] * 4
    before, after = model.state_dict(), made.state_dict()
    kept = {name for name in before if not name.startswith("first_stage.")}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name for name in after if not name.startswith("first_stage.")} == kept
    half = with_part(family.model("SD 1", torch.bfloat16), path, "vae")
    assert {one.dtype for one in half.first_stage.parameters()} == {torch.bfloat16}
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"latents of 16 channels, 2x2 pixels each.*; the model draws latents of 4"):
        with_part(model, written(tmp_path / "other", "two files", 16), "vae")


def test_the_command_line_puts_one_into_a_model(tmp_path: Path) -> None:
    path = written(tmp_path, "two files")
    write_single(tmp_path / "sd.safetensors", family.model("SD 1"), "test")
    for to, target in (("latentkit", "own.safetensors"), ("diffusers", "folder")):
        asked = ["convert", str(tmp_path / "sd.safetensors"), str(tmp_path / target), "--to", to, "--vae", str(path)]
        result = CliRunner().invoke(application(), asked)
        assert result.exit_code == 0, result.output
        assert "tensors bit for bit the same" in result.output
        z = torch.randn(1, 4, 8, 8)
        made = open_model(tmp_path / target).model
        torch.testing.assert_close(made.first_stage.decode(z), read_tiny(path).decode(z))


def test_what_is_missing_left_over_or_wrong_is_named(tmp_path: Path) -> None:
    lone = written(tmp_path, "two files")
    (tmp_path / "taesd_decoder.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds the encoder alone; .* lie beside it \(taesd_decoder\.safetensors\)"):
        read_tiny(lone)
    lone.rename(tmp_path / "first.safetensors")
    with pytest.raises(InputError, match="the same name with 'decoder'"):
        read_tiny(tmp_path / "first.safetensors")
    encoder, decoder = authors()
    whole = {f"encoder.{name}": one for name, one in encoder.state_dict().items()}
    whole |= {f"decoder.{name}": one for name, one in decoder.state_dict().items()}
    for change, message in (
        ({"decoder.1.weight": None}, r"decoder\.1\.weight is missing"),
        ({"decoder.40.weight": torch.ones(1)}, r"decoder\.40\.weight is not known"),
        ({"decoder.1.bias": torch.ones(3)}, r"decoder\.1\.bias .* of another shape"),
        ({"decoder.1.bias": torch.full((WIDTH,), torch.nan)}, r"decoder\.1\.bias is not finite"),
        ({"encoder.5.weight": None}, "make no encoder"),
        ({"encoder.1.conv.0.weight": None}, "holds no tiny autoencoder"),
    ):
        held = {name: one for name, one in (whole | change).items() if one is not None}
        save_file(held, tmp_path / "changed.safetensors")
        with pytest.raises(InputError, match=message):
            read_tiny(tmp_path / "changed.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "none.safetensors")
    assert not is_tiny(tmp_path / "none.safetensors")
    assert not is_tiny(tmp_path)


def test_the_digest_is_that_of_both_files(tmp_path: Path) -> None:
    encoder = written(tmp_path, "two files")
    decoder = encoder.with_name("taesd_decoder.safetensors")
    found = tiny_digest(encoder)
    assert found == tiny_digest(decoder) == WeightsFile.read(encoder).digest
    assert len({found, Digest(encoder)(), Digest(decoder)()}) == 3
    for path in (encoder, decoder):
        path.rename(path.with_name(f"new_{path.name}"))
    assert found == tiny_digest(tmp_path / f"new_{decoder.name}")
    save_file({"x": torch.ones(1)}, tmp_path / "my_encoder.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "my_decoder.safetensors")
    Path(tmp_path / "damaged_encoder.pth").write_bytes(b"x")
    Path(tmp_path / "damaged_decoder.pth").write_bytes(b"y")
    whole = written(tmp_path, "one file")
    for other in (tmp_path, whole, *(tmp_path / name for name in ("my_encoder.safetensors", "damaged_encoder.pth"))):
        assert tiny_digest(other) == Digest(other)()
    (tmp_path / f"new_{encoder.name}").unlink()
    left = tmp_path / f"new_{decoder.name}"
    assert tiny_digest(left) == Digest(left)()
    left = left.rename(tmp_path / "half.safetensors")
    assert tiny_digest(left) == Digest(left)()


FIELDS = json.loads(json.dumps(tiny_json(SMALL, 1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; only 'relu' is run"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is '4'; only 2"),
        ({"num_decoder_blocks": [1, 1]}, "the decoder must mirror the encoder"),
        ({"num_encoder_blocks": [1, "3"]}, "num_encoder_blocks .* give a whole number"),
        ({"num_encoder_blocks": [2]}, "all levels must have the same width"),
        ({"encoder_block_out_channels": [8, 16]}, "all levels must have the same width"),
        ({"encoder_block_out_channels": [8, 8]}, "the decoder must mirror"),
        ({"latent_channels": 1 << 40}, "latent_channels .* from 1 to 1024"),
        ({"out_channels": 4}, "as many channels out as in"),
        ({"scaling_factor": 0}, "scaling_factor is '0'; give a number above 0"),
    ],
)
def test_configs_that_cannot_be_run_are_named(change: dict[str, Any], message: str) -> None:
    assert tiny_config("it", FIELDS) == (SMALL, 1.0, 0.0)
    with pytest.raises(InputError, match=f"it: .*{message}"):
        tiny_config("it", FIELDS | change)


def test_a_config_that_its_tensors_belie_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "one file")
    path.rename(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | {"latent_channels": 5}), encoding="utf-8")
    with pytest.raises(InputError, match=r"describes TinyConfig.*latent_channels=5"):
        read_tiny(tmp_path)


@pytest.mark.parametrize("config", [SMALL, AutoencoderConfig(channels=32, multipliers=(1,))])
def test_a_first_stage_is_of_the_kind_of_its_config(config: TinyConfig | AutoencoderConfig) -> None:
    with torch.device("meta"):
        found = FirstStage(config, 3).autoencoder
    assert found is not None
    assert found.config == config


@pytest.mark.parametrize("form", ["pickles", "two files", "one file"])
def test_a_tiny_autoencoder_alone_is_described(form: str, tmp_path: Path) -> None:
    path = written(tmp_path, form)
    said = CliRunner().invoke(application(), ["inspect", str(path)], catch_exceptions=False)
    assert said.exit_code == 0
    assert f"{path}: tiny autoencoder alone, layout ldm" in said.output
    count = sum(weight.numel() for half in authors() for weight in half.parameters())
    assert f"first stage   {count / 1e6:10,.2f} M" in said.output
    assert "4 latent channels, 2 pixels to a cell" in said.output
    with pytest.raises(InputError, match=r"tiny autoencoder alone; to put it into a model: .* --vae "):
        CliRunner().invoke(
            application(), ["convert", str(path), str(tmp_path / "x"), "--to", "ldm"], catch_exceptions=False
        )
