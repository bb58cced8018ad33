"""Files made to harm are refused at once, with nothing run; files that trainers left behind are read."""

import collections
import io
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from hostile import BOMBS, CALLABLES, PROGRAMS, SAFETENSORS, Gadget, calling, checkpoint, good, zips

from latentkit.checkpoints.diffusers_folder import INDEX, read_folder, write_folder
from latentkit.checkpoints.layouts import open_model
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.pickles import INERT, read_pickle
from latentkit.errors import InputError


@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize("name", CALLABLES)
def test_gadgets_are_refused_by_name(name: str, form: str, tmp_path: Path, quiet: list[str]) -> None:
    path = checkpoint(tmp_path / "model.ckpt", calling(name, form))
    with pytest.raises(InputError, match="nothing was run") as caught:
        read_archive(path)
    assert name.replace(" ", ".") in str(caught.value)


@pytest.mark.parametrize("place", ["value", "key", "callback", "state"])
def test_gadgets_inside_real_checkpoints_are_refused(place: str, tmp_path: Path, quiet: list[str]) -> None:
    content: dict[str, Any] = {"state_dict": {"weight": torch.ones(2)}}
    places: dict[str, dict[str, Any]] = {
        "value": {"evil": Gadget()},
        "key": {"state_dict": {"weight": Gadget()}},
        "callback": {"callbacks": {"x": [Gadget()]}},
        "state": {"optimizer_states": [{"a": (1, Gadget())}]},
    }
    content |= places[place]
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"(posix|os|nt)\.system"):
        open_model(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", PROGRAMS | BOMBS)
def test_broken_programs_are_refused(name: str, tmp_path: Path, quiet: list[str]) -> None:
    path = checkpoint(tmp_path / "model.ckpt", (PROGRAMS | BOMBS)[name])
    with pytest.raises(InputError, match=r"model\.ckpt"):
        read_archive(path)


def test_the_program_that_the_broken_ones_are_made_of_is_good(tmp_path: Path) -> None:
    archive = read_archive(checkpoint(tmp_path / "model.ckpt", good()))
    assert torch.equal(archive.tensors["w"], torch.zeros(2))


def test_zip_tricks_are_refused(tmp_path: Path, quiet: list[str]) -> None:
    for path in zips(tmp_path):
        with pytest.raises(InputError, match=path.name):
            read_archive(path)


def test_a_list_of_entries_without_end_is_not_begun(tmp_path: Path, quiet: list[str]) -> None:
    size = 1 << 25
    with open(tmp_path / "model.ckpt", "wb") as file:
        file.write(b"PK\x03\x04" + bytes(12))
        file.seek(size, 1)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, size, 16, 0))
    with pytest.raises(InputError, match=rf"its list of entries has {size} bytes"):
        read_archive(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", SAFETENSORS)
def test_broken_safetensors_are_refused(name: str, tmp_path: Path, quiet: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_archive(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model"
    write_folder(path, family.model("SD 1"))
    return path


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (INDEX, {"unet": ["os", "system"]}, "'unet' is of"),
        (INDEX, {"unet": ["diffusers", "FluxTransformer2DModel"]}, "known are UNet2DConditionModel"),
        (INDEX, {"vae": ["my_module", "AutoencoderKL"]}, "'vae' is of"),
        (INDEX, {"text_encoder": ["../../evil", "CLIPTextModel"]}, "'text_encoder' is of"),
        (INDEX, {"evil": ["diffusers", "UNet2DConditionModel"]}, "known are none of that name"),
        (INDEX, {"unet": ["diffusers"]}, "'unet' is of"),
        (INDEX, {"unet": [None, None]}, "names no unet"),
        ("unet/config.json", {"act_fn": "os.system"}, "act_fn is 'os.system'"),
        ("unet/config.json", {"block_out_channels": [32, 1 << 40, 64]}, "block_out_channels"),
        ("unet/config.json", {"layers_per_block": 1_000_000}, "at most 2000 are built"),
        ("unet/config.json", {"transformer_layers_per_block": [900_000] * 3}, "at most 2000 are built"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 999}, "16 at most"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels is '4'"),
        ("unet/config.json", {"in_channels": -4}, "in_channels is '-4'"),
        ("unet/config.json", {"brand_new_thing": 3}, "brand_new_thing"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("vae/config.json", {"layers_per_block": 1_000_000}, "at most 2000 are built"),
        ("vae/config.json", {"scaling_factor": "nan"}, "scaling_factor"),
        ("vae/config.json", {"norm_num_groups": 7}, "norm_num_groups"),
        ("text_encoder/config.json", {"num_hidden_layers": 500_000}, "at most 2000 are built"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1 << 40}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "exec"}, "beta_schedule is 'exec'"),
    ],
)
def test_folders_with_foreign_classes_and_absurd_configs_are_refused(
    file: str, change: dict[str, Any], message: str, folder: Path, tmp_path: Path, quiet: list[str]
) -> None:
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    content = json.loads((root / file).read_text()) | change
    (root / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_folder(root)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/b.safetensors", ".hidden", ".."])
def test_shards_do_not_lead_out_of_their_folder(name: str, folder: Path, tmp_path: Path, quiet: list[str]) -> None:
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(InputError, match="is no file of this folder"):
        read_folder(root)


def test_what_trainers_leave_behind_is_read_as_nothing(tmp_path: Path) -> None:
    """Lightning's callbacks, OmegaConf's configs, optimiser states; views, parameters and every type."""
    weights = {
        "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "double": torch.randn(3).double(),
        "view": torch.randn(6, 6)[1:3, ::2], "parameter": torch.nn.Parameter(torch.ones(2)), "whole": torch.arange(5),
        "empty": torch.zeros(0), "number": torch.tensor(0.18), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    torch.save(
        {"state_dict": collections.OrderedDict(weights), "global_step": 875000, "lr": 1e-4, "name": "x"},
        tmp_path / "model.ckpt",
    )
    archive = read_archive(tmp_path / "model.ckpt")
    assert archive.values == {"global_step": 875000, "lr": 1e-4, "name": "x"}
    assert archive.tensors.keys() == weights.keys()
    for name, tensor_ in weights.items():
        assert archive.tensors[name].dtype == tensor_.dtype
        assert torch.equal(archive.tensors[name], tensor_)
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    program = b"\x80\x02}(X\x09\x00\x00\x00callbacks" + callback + b"X\x01\x00\x00\x00wK\x02u."
    assert read_pickle(checkpoint(tmp_path / "other.ckpt", program)) == {"callbacks": INERT, "w": 2}


def test_every_protocol_of_pickle_is_read(tmp_path: Path) -> None:
    content = {
        "a": [1, 2.5, -3, 1 << 70, True, None],
        "b": ("x", ("y", "z"), ()),
        "c": {"d": {}},
        "e": {1, 2},
        "f": "ü" * 300,
    }
    for protocol in range(6):
        stream = io.BytesIO()
        pickle.dump({key: value for key, value in content.items() if key != "e" or protocol > 3}, stream, protocol)
        found = read_pickle(checkpoint(tmp_path / f"{protocol}.ckpt", stream.getvalue()))
        assert all(found[key] == content[key] for key in found)
        assert len(found) >= 4
