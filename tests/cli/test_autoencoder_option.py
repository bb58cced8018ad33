"""`--vae`: into the picture and its record, asked for by `replay`, refused by name where it does not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from latentkit.applications.metadata import read
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.files import save_autoencoder, save_model
from latentkit.checkpoints.lone import write_first_stage
from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.names.tiny_names import AUTHOR, tiny_pairs
from latentkit.checkpoints.storage.digest import Digest
from latentkit.diffusion.noise import keyed_normal
from latentkit.model.first_stage import FirstStage
from latentkit.nets.tiny import TinyAutoencoder, TinyConfig

Run = Callable[..., int]
ASKED = ("generate", "cat", "-m", "sd.safetensors", "--steps", "2", "--seed", "1")


def stage() -> FirstStage:
    """Other weights than the model's."""
    made: FirstStage = family.model("SD 1").first_stage
    for index, one in enumerate(made.parameters()):
        one.data += 0.05 * keyed_normal(one.shape, 5, index)
    return made


@pytest.fixture
def run(run: Run) -> Run:
    """Runs the command in a folder with a model; gives the exit code."""
    save_model("sd.safetensors", family.model("SD 1"), {}, torch.float32)
    return run


def test_it_is_recorded_and_asked_for_when_the_picture_is_drawn_again(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_first_stage(Path("vae"), stage(), "diffusers")
    save_autoencoder("other.safetensors", family.model("SD 1").first_stage, {})
    assert run(*ASKED, "--vae", "vae", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["autoencoder"] == Digest(Path("vae"))()
    again = ("replay", shown["path"], "-m", "sd.safetensors")
    assert run(*again) == 2
    assert "needs the autoencoder whose file has the sha256" in capsys.readouterr().err
    assert run(*again, "--vae", "other.safetensors") == 2
    assert "other.safetensors is not the autoencoder of" in capsys.readouterr().err
    assert run(*again, "--vae", "vae") == 0
    assert run(*ASKED) == 0
    plain = Path(capsys.readouterr().out.split()[-1])
    assert plain.read_bytes() != Path(shown["path"]).read_bytes()
    assert read(plain.read_bytes(), "x").request.autoencoder is None
    assert run("replay", str(plain), "-m", "sd.safetensors", "--vae", "vae") == 2
    assert "wanted is none" in capsys.readouterr().err


def test_another_half_of_a_tiny_one_is_noticed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = TinyAutoencoder(TinyConfig((1, 1), channels=16))
    tensors = given(tiny_pairs(network, AUTHOR), network.state_dict())
    for half, prefix in (("encoder", AUTHOR.encoder), ("decoder", AUTHOR.decoder)):
        held = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        save_file(held, f"taesd_{half}.safetensors")
    assert run(*ASKED, "--vae", "taesd_decoder.safetensors") == 0
    again = ("replay", capsys.readouterr().out.strip(), "-m", "sd.safetensors", "--vae")
    assert run(*again, "taesd_encoder.safetensors") == 0
    changed = {name: 2 * one for name, one in load_file("taesd_encoder.safetensors").items()}
    save_file(changed, "taesd_encoder.safetensors")
    assert run(*again, "taesd_decoder.safetensors") == 2
    assert "taesd_decoder.safetensors is not the autoencoder of" in capsys.readouterr().err


def test_a_run_and_whole_models_give_theirs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    other = family.model("SD 1")
    other.first_stage = stage()
    Path("run").mkdir()
    save_autoencoder("run/model.safetensors", stage(), {})
    save_model("whole.safetensors", other, {}, torch.float32)
    write_folder("folder", other)
    pictures = []
    for name in ("run", "whole.safetensors", "folder"):
        assert run(*ASKED, "--vae", name, "--out", name + "-out") == 0
        pictures.append(Path(capsys.readouterr().out.strip()))
    from latentkit.data.pictures import decode

    arrays = [decode(path.read_bytes(), "x").array for path in pictures]
    assert all((array == arrays[0]).all() for array in arrays)


def test_what_is_no_autoencoder_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder("folder", family.model("SD 1"))
    save_model("tiny.safetensors", tiny_model(), {})
    for words, code, message in (
        ("none.safetensors", 2, "no model 'none.safetensors'"),
        ("folder/unet", 2, "is a U-Net alone; wanted is an autoencoder"),
        ("emoji", 1, "the model draws latents of 4 channels, 2x2 pixels each, of 3 in pictures"),
    ):
        assert run(*ASKED, "--vae", words) == code
        assert message in capsys.readouterr().err
    assert not Path("out").exists()
