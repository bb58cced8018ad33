"""Model files: what is written is what is read, and everything else is refused by name."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import CLASSES, tiny_model
from torch import Tensor

from latentkit.checkpoints import files
from latentkit.checkpoints.files import (
    find,
    load,
    load_autoencoder,
    load_model,
    save_autoencoder,
    save_model,
)
from latentkit.checkpoints.storage.digest import Digest
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage

PROVENANCE = {"name": "tiny", "licence": "CC0", "defaults": {"steps": 3}}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a model with words and classes."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, tiny_model(label=True), PROVENANCE, torch.float32)
    return path


def altered(
    good: Path,
    path: Path,
    document: Callable[[dict[str, Any]], Any] = lambda d: None,
    tensors: Callable[[Tensors], Any] = lambda t: None,
) -> Path:
    """A copy of `good` with its description and tensors changed in place, its digest right again."""
    table = load_file(good)
    tensors(table)
    described = json.loads(header(good)["__metadata__"]["latentkit"])
    document(described)
    blank = "0x" + "0" * 64
    data = save(table, {"latentkit": json.dumps(described), "modelspec.hash_sha256": blank})
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data.replace(blank.encode(), b"0x" + hashlib.sha256(data[start:]).hexdigest().encode(), 1))
    return path


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def architecture(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """A change of the architecture: dotted names with `__`."""

    def change(document: dict[str, Any]) -> None:
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = document["architecture"]
            for part in outer:
                place = place[part]
            place[last] = value

    return change


def test_what_is_written_is_what_is_read(good: Path) -> None:
    model = tiny_model(label=True)
    read, provenance = load_model(good)
    assert provenance == PROVENANCE
    assert read.architecture == model.architecture
    assert read.state() == model.state()
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    theirs = read.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    told = {"text": ["red heart"], "label": [CLASSES[0]]}
    x, sigma = torch.randn(1, 4, 8, 8), torch.ones(1)
    assert torch.equal(
        model.denoiser(x, sigma, model.condition(told, 1)), read.denoiser(x, sigma, read.condition(told, 1))
    )


@pytest.mark.parametrize("kind", [{"latent": False}, {"text": False}, {"text": False, "label": True}, {"channels": 1}])
def test_every_kind_of_model_is_kept(kind: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**kind)
    save_model(tmp_path / "m.safetensors", model, {}, torch.float32)
    read, _ = load_model(tmp_path / "m.safetensors")
    theirs = read.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_equal_models_are_equal_bytes_with_modelspec_keys(good: Path, tmp_path: Path) -> None:
    read, provenance = load_model(good)
    save_model(tmp_path / "again.safetensors", read, provenance, torch.float32)
    assert Digest(tmp_path / "again.safetensors")() == Digest(good)()
    spec = header(good)["__metadata__"]
    assert spec["modelspec.sai_model_spec"] == "1.0.1"
    assert spec["modelspec.title"] == "tiny"
    assert spec["modelspec.license"] == "CC0"
    save_model(tmp_path / "unstated.safetensors", tiny_model(), {"licence": None})
    assert "modelspec.license" not in header(tmp_path / "unstated.safetensors")["__metadata__"]
    assert spec["modelspec.resolution"] == "32x32"
    assert spec["modelspec.prediction_type"] == "flow"


def test_half_precision_keeps_statistics_whole(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "m.safetensors"
    save_model(path, model, {})
    read, _ = load_model(path, dtype=torch.bfloat16)
    assert read.denoiser.unet.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(read.first_stage.latent_mean, model.first_stage.latent_mean)
    weight = load_model(path, dtype=torch.float32)[0].denoiser.unet.conv_in.weight
    assert torch.equal(weight, model.denoiser.unet.conv_in.weight.bfloat16().float())


def test_a_cpu_without_fast_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, fast = torch.device("cpu"), [True]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast[0])
    assert files.compute_type(torch.bfloat16, cpu) == torch.bfloat16
    fast[0] = False
    assert files.compute_type(torch.bfloat16, cpu) == torch.float32
    assert files.compute_type(torch.float16, cpu) == torch.float32
    assert files.compute_type(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_autoencoder_alone_and_out_of_a_model(good: Path, tmp_path: Path) -> None:
    model, path = tiny_model(label=True), tmp_path / "first.safetensors"
    save_autoencoder(path, model.first_stage, {})
    for read in (load_autoencoder(path), load_autoencoder(good)):
        theirs = read.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.first_stage.state_dict().items())
    with pytest.raises(InputError, match="kind 'autoencoder'; wanted is 'latent-diffusion'"):
        load_model(path)
    with pytest.raises(InputError, match="identity"):
        save_autoencoder(path, FirstStage(None, 3), {})


def test_truncated_and_damaged_files(good: Path, tmp_path: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "cut.safetensors"
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated"):
            load_model(path)
    flipped = bytearray(data)
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="not those that were written"):
        load_model(path)


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_refused_and_never_run(good: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save(Payload(marker), tmp_path / "zip.safetensors")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / "named.ckpt").write_bytes(good.read_bytes())
    for name in ("zip.safetensors", "raw.safetensors", "named.ckpt"):
        with pytest.raises(InputError, match="is a pickle"):
            load_model(tmp_path / name)
    for name in ("zip.safetensors", "raw.safetensors"):
        with pytest.raises(InputError, match=r"names '\w+\.mkdir'.*nothing was run"):
            load(tmp_path / name)
    assert not marker.exists()


def test_a_foreign_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "sd.safetensors").write_bytes(save({"model.diffusion_model.x": torch.zeros(2)}, {"format": "pt"}))
    with pytest.raises(InputError, match="no latentkit model"):
        load_model(tmp_path / "sd.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format 2; this version reads format 1"),
        (lambda d: d.update(code="os.system"), "'code' is unknown"),
        (lambda d: d.pop("state"), "state: is missing"),
        (lambda d: d.update(kind="tokenizer"), "kind"),
        (architecture(network__classpath="os.system"), "'network.classpath' is unknown"),
        (architecture(network__channels="32"), "network.channels: must be a whole number"),
        (architecture(network__heads=3), "cannot be split by heads=3"),
        (architecture(network__context_width=64), "parts do not fit together"),
        (architecture(picture_channels=1), "parts do not fit together"),
        (architecture(network__blocks=10**9), "blocks; at most .* are built"),
        (architecture(text__layers=10**9), "blocks; at most .* are built"),
        (architecture(first_stage__blocks=10**9), "blocks; at most .* are built"),
        (architecture(network__middle_depth=10**9), "blocks; at most .* are built"),
        (architecture(schedule={"kind": "linear", "steps": 10**12}), "1000000000000 steps"),
        (architecture(network__channels=2**40), "does not hold|cannot be built"),
        (lambda d: d["state"].update(text={"tokenizer": "{"}), "tokenizer cannot be read"),
        (lambda d: d.update(state={}), "cannot be built"),
    ],
)
def test_wrong_descriptions(change: Callable[[dict[str, Any]], Any], message: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_model(altered(good, tmp_path / "m.safetensors", document=change))


WEIGHT = "denoiser.unet.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(WEIGHT), f"{WEIGHT} is missing"),
        (lambda t: [t.pop(name) for name in list(t) if "encoder" in name], "and [0-9]+ more are missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not known"),
        (lambda t: t.update({WEIGHT: torch.zeros(1, 2)}), f"{WEIGHT} is of another shape"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].int()}), f"{WEIGHT} is not of floating type"),
        (lambda t: t[WEIGHT].view(-1)[3:4].fill_(float("nan")), f"{WEIGHT} is not finite"),
        (lambda t: t[WEIGHT].view(-1)[3:4].fill_(float("inf")), f"{WEIGHT} is not finite"),
    ],
)
def test_wrong_tensors(change: Callable[[Tensors], Any], message: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_model(altered(good, tmp_path / "m.safetensors", tensors=change))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_harms_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(InputError, match="No space left"):
        save_model(path, tiny_model(), {})
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.denoiser.unet.conv_in.weight.view(-1)[0] = 1e5
    with pytest.raises(InputError, match=r"not finite as torch\.float16"):
        save_model(tmp_path / "m.safetensors", model, {}, torch.float16)
    assert not os.listdir(tmp_path)


def test_names(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    run, shipped = tmp_path / "runs" / "pets", tmp_path / "models" / "emoji.safetensors"
    for path in (run / "model.safetensors", shipped):
        path.parent.mkdir(parents=True)
        path.write_bytes(good.read_bytes())
    (tmp_path / "emoji").mkdir()
    assert find("emoji") == shipped
    assert find(run) == run / "model.safetensors"
    assert find(good) == good
    fitted = tmp_path / "runs" / "cats"
    for name in ("autoencoder/model.safetensors", "tabby.safetensors", "tmp-tabby.safetensors"):
        (fitted / name).parent.mkdir(parents=True, exist_ok=True)
        (fitted / name).write_bytes(good.read_bytes())
    assert find("runs/cats") == Path("runs/cats/tabby.safetensors")
    assert load("runs/cats", "cpu").name == "tabby"
    loaded = load(run, "cpu")
    assert (loaded.name, loaded.digest) == ("pets", Digest(good)())
    with pytest.raises(InputError, match=r"did you mean 'emoji'\?") as caught:
        find("emojy")
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match=r"no shipped model \(emoji\), no file and no run folder.*'runs/cats'"):
        find("cats")
    with pytest.raises(InputError, match="did you mean 'runs/pets'"):
        find("runs/pest")
    with pytest.raises(InputError, match=r"holds no model; a run writes"):
        find(tmp_path / "emoji")
