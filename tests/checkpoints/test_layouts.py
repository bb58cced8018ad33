"""Models of every family in the released layouts: there and back to the bit, every tensor accounted for."""

import copy
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from latentkit.checkpoints import files, ldm_file
from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.files import Place, load
from latentkit.checkpoints.layouts import open_model, report
from latentkit.checkpoints.ldm_file import read_single, write_single
from latentkit.checkpoints.names.diffusers_names import unet_pairs
from latentkit.checkpoints.names.rename import taken
from latentkit.checkpoints.storage.archive import read_archive, read_part
from latentkit.checkpoints.storage.digest import Digest
from latentkit.cli import application
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, Preset

FOLDERS = ["SD 1", "SD 1 inpainting", "SD 2", "XL", "refiner"]


def the_same(ours: LatentDiffusion, other: LatentDiffusion) -> None:
    """Architecture, names, types and bits."""
    assert ours.architecture == other.architecture
    one, two = ours.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("name", family.ARCHITECTURES)
def test_a_single_file_holds_the_whole_model(name: str, tmp_path: Path) -> None:
    model = family.model(name, torch.float16)
    path = tmp_path / "model.safetensors"
    write_single(path, model, "test")
    read, _ = read_single(path)
    the_same(model, read)
    write_single(tmp_path / "again.safetensors", read, "test")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_holds_the_whole_model(name: str, tmp_path: Path) -> None:
    model = family.model(name, torch.float16)
    write_folder(tmp_path / "model", model)
    the_same(model, read_folder(tmp_path / "model"))


@pytest.mark.parametrize("name", [name for name in family.ARCHITECTURES if name not in FOLDERS])
def test_what_a_folder_cannot_hold_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"diffusers.* layout"):
        write_folder(tmp_path / "model", family.model(name))
    assert not (tmp_path / "model").exists()


def test_shards_variants_and_old_names_are_read(tmp_path: Path) -> None:
    model = family.model("SD 1", torch.float16)
    root = tmp_path / "model"
    write_folder(root, model)
    unet = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shard = f"diffusion_pytorch_model.fp16-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, root / "unet" / shard)
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": places}
    (root / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    unet.unlink()
    vae = root / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(vae).items():
        for new, before in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        renamed[name] = tensor[..., None, None] if ".query.weight" in name else tensor
    vae.unlink()
    save_file(renamed, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    text = root / "text_encoder" / "model.safetensors"
    flat = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    text.unlink()
    torch.save(flat | {"embeddings.position_ids": torch.arange(77)[None]}, root / "text_encoder" / "pytorch_model.bin")
    the_same(model, read_folder(root))


def test_several_variants_without_a_plain_one_must_be_chosen(tmp_path: Path) -> None:
    model, root = family.model("SD 1", torch.float16), tmp_path / "model"
    write_folder(root, model)
    plain = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(plain)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, plain.with_name(f"{plain.stem}.fp16.safetensors"))
    torch.save({name: 3 * tensor for name, tensor in tensors.items()}, plain.with_name(f"{plain.stem}.non_ema.bin"))
    weight = model.denoiser.unet.conv_in.weight
    for variant, factor in ((None, 1), ("fp16", 2), ("non_ema", 3)):
        assert torch.equal(read_folder(root, variant=variant).denoiser.unet.conv_in.weight, factor * weight)
    with pytest.raises(InputError, match="no part has weights of the variant 'ema'; there is fp16, non_ema"):
        read_folder(root, variant="ema")
    plain.unlink()
    assert torch.equal(read_folder(root, variant="non_ema").denoiser.unet.conv_in.weight, 3 * weight)
    with pytest.raises(InputError, match=r"unet: holds no plain weights but the variants fp16, non_ema; leave one"):
        read_folder(root)
    (root / "vae" / plain.name).rename(root / "vae" / f"{plain.stem}.ema.safetensors")
    with pytest.raises(InputError, match=r"vae: holds no plain weights but the variants ema; leave one"):
        read_folder(root, variant="fp16")
    with pytest.raises(InputError, match="holds no weights"):
        read_part(root / "tokenizer")
    for file in root.glob("*/*.*.*"):
        file.unlink()
    with pytest.raises(InputError, match="the variant 'fp16'; there is none"):
        read_folder(root, variant="fp16")


def test_convert_takes_one_of_several_variants(tmp_path: Path) -> None:
    model, root, new = family.model("SD 1", torch.float16), tmp_path / "model", tmp_path / "new.safetensors"
    write_folder(root, model)
    plain = root / "unet" / "diffusion_pytorch_model.safetensors"
    for number, name in enumerate(("fp16", "non_ema")):
        held = {key: (number + 2) * tensor for key, tensor in load_file(plain).items()}
        save_file(held, plain.with_name(f"{plain.stem}.{name}.safetensors"))
    plain.unlink()
    words = ("convert", str(root), str(new), "--to", "latentkit")
    code, said = command(*words)
    assert code == 1
    assert "leave one of them there, or of a whole model write one: latentkit convert FOLDER NEW" in said
    code, said = command(*words, "--variant", "ema")
    assert (code, new.exists()) == (1, False)
    assert "there is fp16, non_ema" in said
    assert command(*words, "--variant", "non_ema")[0] == 0
    assert torch.equal(open_model(new).model.denoiser.unet.conv_in.weight, 3 * model.denoiser.unet.conv_in.weight)
    for source, message in ((new, "has no variant 'fp16'; only diffusers"), (root / "vae", "takes no --variant")):
        code, said = command("convert", str(source), str(tmp_path / "x"), "--to", "ldm", "--variant", "fp16")
        assert (code, (tmp_path / "x").exists()) == (1, False)
        assert message in said


SCHEDULERS = [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatchEulerDiscreteScheduler'"),
    ({"_class_name": "EDMEulerScheduler"}, "_class_name is 'EDMEulerScheduler'"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name is "),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is 'True'"),
    ({"sigma_data": 0.5}, "sigma_data is '0.5'"),
    ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
]


@pytest.mark.parametrize(("fields", "message"), SCHEDULERS)
def test_schedulers_of_other_noise_are_refused(fields: dict[str, Any], message: str, written: Path) -> None:
    path = written / "model" / "scheduler" / "scheduler_config.json"
    kept = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(kept) | fields))
        with pytest.raises(InputError, match=re.escape(message)):
            read_folder(written / "model")
    finally:
        path.write_text(kept)


@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedulers_of_betas_are_one(name: str, written: Path) -> None:
    path = written / "model" / "scheduler" / "scheduler_config.json"
    kept = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(kept) | {"_class_name": name, "use_flow_sigmas": False}))
        assert read_folder(written / "model").architecture == family.ARCHITECTURES["SD 1"]
    finally:
        path.write_text(kept)


def test_averaged_weights_are_asked_for(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", family.model("SD 1")
    write_single(path, model, "test")
    with pytest.raises(InputError, match="has no averaged weights"):
        read_single(path, averaged=True)
    tensors, metadata = load_file(path), read_archive(path).metadata
    roots = [key for key in tensors if key.startswith("model.diffusion_model.")]
    average = {"model_ema." + key.removeprefix("model.").replace(".", ""): tensors[key] + 1 for key in roots}
    save_file(tensors | average | {"betas": torch.ones(3)}, path, metadata)
    for averaged, added in ((True, 1), (False, 0), (None, 0)):
        read, _ = read_single(path, averaged=averaged)
        assert torch.equal(read.denoiser.unet.conv_in.weight, model.denoiser.unet.conv_in.weight + added)
    found = report(path)
    assert found["averaged"]
    assert not found["wrong"]
    assert found["ignored"]["buffers of the noise schedule"] == ["betas"]


def test_latent_statistics_by_channel_fold_exactly(tmp_path: Path) -> None:
    model = family.model("SD 1", torch.float64)
    model.first_stage.set_statistics(torch.tensor([1.0, -2, 0, 3]), torch.tensor([4.0, 5, 6, 7]))
    pixels = torch.randn(1, 3, 8, 8)
    write_single(tmp_path / "model.safetensors", model, "test")
    write_folder(tmp_path / "model", model)
    for again in (read_single(tmp_path / "model.safetensors")[0], read_folder(tmp_path / "model")):
        torch.testing.assert_close(again.first_stage.latent_std, torch.full((4,), 1 / 0.18215))
        z = model.first_stage.encode(pixels)
        torch.testing.assert_close(again.first_stage.encode(pixels), z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.first_stage.decode(z), model.first_stage.decode(z), atol=1e-4, rtol=1e-4)
        noise = torch.randn_like(z)
        drawn = [stage.from_moments(stage.moments(pixels), noise) for stage in (model.first_stage, again.first_stage)]
        torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """While a model of 110 MB is read, the process grows by less than its size and a tenth."""
    big = replace(family.UNET, channels=128, multipliers=(1, 2, 2), blocks=1)
    architecture = replace(family.ARCHITECTURES["SD 1"], network=big)
    path = tmp_path / "model.safetensors"
    write_single(path, LatentDiffusion(architecture, {}), "test")
    code = (
        "import resource, sys\n"
        "from latentkit.checkpoints.ldm_file import read_single\n"
        "from latentkit.model.conditioners.tokenizer import clip_tokenizer\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "clip_tokenizer(); read_single(sys.argv[2]); before = peak()\n"
        "model, _ = read_single(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    small = tmp_path / "small.safetensors"
    write_single(small, family.model("SD 1"), "test")
    size = path.stat().st_size
    assert size > 5e7
    run = subprocess.run([sys.executable, "-c", code, str(path), str(small)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1.1 * size


def mutated(tensors: dict[str, Tensor], kind: str, name: str) -> dict[str, Tensor]:
    tensors = dict(tensors)
    tensor = tensors[name]
    if kind == "dropped":
        del tensors[name]
    elif kind == "renamed":
        tensors[name + "x"] = tensors.pop(name)
    elif kind == "cut":
        tensors[name] = tensor[: max(1, len(tensor) - 1)].clone() if len(tensor) > 1 else tensor.repeat(2)
    elif kind == "transposed":
        tensors[name] = tensor.transpose(0, 1).contiguous()
    elif kind == "of whole numbers":
        tensors[name] = torch.ones(tensor.shape, dtype=torch.int64)
    else:
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[-1] = math.nan if kind == "NaN" else math.inf
    return tensors


KINDS = ["dropped", "renamed", "cut", "transposed", "of whole numbers", "NaN", "infinite"]
DECIDING = [
    "input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight", "input_blocks.2.0.op.weight",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "time_embed.0.weight", "out.2.weight",
    "encoder.mid.attn_1.q.weight", "encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight",
]  # fmt: skip
"""Ends of names of tensors from which the shape of a network is known."""


def sample(kind: str, tensors: dict[str, Tensor], ends: Sequence[str] = ()) -> list[str]:
    """42 of those that the mutation changes, and those with such ends."""

    def changes(tensor: Tensor) -> bool:
        return kind != "transposed" or (tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1])

    fit = sorted(name for name, tensor in tensors.items() if changes(tensor))
    return random.Random(kind).sample(fit, 42) + [name for name in fit if name.endswith(tuple(ends))]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1 in both layouts."""
    root = tmp_path_factory.mktemp("written")
    write_single(root / "model.safetensors", family.model("SD 1"), "test")
    write_folder(root / "model", family.model("SD 1"))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_of_a_single_file_are_named(kind: str, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """42 tensors each, and those that decide; with those of folders 588 and more. Those files may say nothing else."""
    archive = read_archive(written / "model.safetensors")
    made = family.model("SD 1").to("meta")
    monkeypatch.setattr(ldm_file, "built", lambda *_: made)
    monkeypatch.setitem(PRESETS, "tiny", Preset(made.architecture))
    names = sample(kind, archive.tensors, DECIDING)
    assert len(names) == 42 + len(DECIDING) - 3 * (kind == "transposed")  # three of them are square
    for name in names:
        tensors = mutated(archive.tensors, kind, name)
        for metadata in (archive.metadata, {}) if name.endswith(tuple(DECIDING)) else (archive.metadata,):
            found = ldm_file.match(archive._replace(tensors=tensors, metadata=metadata), "file")
            assert found.found.name == ("a model of latentkit" if metadata else "tiny")
            complaints = found.complaints
            assert any(name in line for line in complaints.lines(None)), name
            with pytest.raises(InputError, match=r"does not hold the model"):
                complaints.refuse("file")


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_of_a_folder_are_named(kind: str, written: Path) -> None:
    folder = written / "model" / "unet"
    network = family.model("SD 1").denoiser.unet
    pairs = unet_pairs(network)
    whole = read_part(folder)
    for name in sample(kind, whole):
        tensors = mutated(whole, kind, name)
        state, complaints = taken(pairs, tensors, network.state_dict())
        assert state
        assert any(name in line for line in complaints.lines(None)), name


@pytest.mark.parametrize("kind", ["dropped", "renamed", "NaN"])
def test_a_folder_with_a_mutation_is_refused(kind: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "model", tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    name = "decoder.mid_block.resnets.0.conv1.weight"
    save_file(mutated(load_file(file), kind, name), file)
    with pytest.raises(InputError, match=rf"vae/{name}"):
        read_folder(tmp_path / "model")


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(application(), list(arguments))
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_the_commands(tmp_path: Path) -> None:
    single, folder, own = (str(tmp_path / name) for name in ("one.safetensors", "folder", "own.safetensors"))
    write_single(single, family.model("SD 1"), "test")
    for source, target, layout in ((single, folder, "diffusers"), (folder, own, "latentkit")):
        code, said = command("convert", source, target, "--to", layout)
        assert code == 0, said
        assert "bit for bit the same" in said
    code, said = command("diff", single, own)
    assert code == 0, said
    assert said.startswith("0 of ")
    half = str(tmp_path / "half.safetensors")
    assert command("convert", own, half, "--to", "ldm", "--dtype", "float16")[0] == 0
    assert command("diff", single, half)[0] == 1
    code, said = command("inspect", half, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["layout"] == "ldm"
    assert found["parts"]["U-Net"]["types"].keys() == {"float16"}
    assert not found["wrong"]
    assert not found["suspicious"]
    tensors = load_file(half)
    gone = next(name for name in tensors if name.startswith("first_stage_model.encoder.mid"))
    tensors["model.diffusion_model.out.2.weight"].zero_()
    del tensors[gone]
    save_file(tensors, half, read_archive(Path(half)).metadata)
    code, said = command("inspect", half)
    assert code == 1
    assert gone in said
    assert "denoiser.unet.conv_out.weight is all zero" in said
    assert command("convert", single, folder, "--to", "diffusers")[0] == 1
    assert "did you mean 'ldm'" in command("convert", single, str(tmp_path / "x"), "--to", "lmd")[1]
    assert "float16" in command("convert", single, str(tmp_path / "x"), "--to", "ldm", "--dtype", "half")[1]


def test_load_takes_every_layout(tmp_path: Path) -> None:
    model = family.model("SD 1", torch.float16)
    write_single(tmp_path / "one.safetensors", model, "test")
    write_folder(tmp_path / "folder", model)
    for name in ("one.safetensors", "folder"):
        loaded = load(tmp_path / name)
        assert loaded.network.architecture == model.architecture
        assert loaded.network.denoiser.unet.conv_in.weight.dtype == torch.float32  # half is slow on a CPU
        assert loaded.network.first_stage.latent_std.dtype == torch.float32
        assert loaded.digest == Digest(tmp_path / name)()
    shutil.rmtree(tmp_path / "folder" / "vae")
    with pytest.raises(InputError, match=r"vae.config\.json"):
        load(tmp_path / "folder")


def test_a_digest_is_of_the_files_that_were_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    write_single(path, family.model("SD 1", torch.float16), "test")
    write_folder(folder, family.model("SD 1", torch.float16))
    first, second, both = load(path, "cpu"), load(path, "cpu"), load(folder, "cpu")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first.digest == copy.deepcopy(first).digest == found
    assert both.digest == Digest(folder)()
    gone, again = load(folder, "cpu"), Digest(folder / "model_index.json")
    with open(path, "r+b") as file:  # in place
        file.write(b"new")
    (tmp_path / "new").write_bytes((folder / "model_index.json").read_bytes())
    (tmp_path / "new").replace(folder / "model_index.json")
    assert first.digest == found
    assert second.digest == gone.digest == ""
    assert "one.safetensors: was changed after it was read: its pictures' records do not tell the file" in caplog.text
    with pytest.raises(InputError, match=r"model_index\.json: was changed after it was read"):
        again()
    path.unlink()
    with pytest.raises(InputError, match=r"one\.safetensors: cannot be read: No such file"):
        Digest(path)
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        Digest(tmp_path / ("a" * 300))


def test_an_interrupted_digest_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    digest, whole = Digest(tmp_path / "file"), hashlib.file_digest

    def interrupted(file: Any, name: str) -> Any:
        file.read(2)
        raise KeyboardInterrupt

    monkeypatch.setattr(hashlib, "file_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digest()
    monkeypatch.setattr(hashlib, "file_digest", whole)
    assert digest() == hashlib.sha256(b"bytes").hexdigest()


def test_a_digest_is_worked_out_beside_all_else_where_no_cpu_computes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    waiting, beside = (files._digest(tmp_path / "file", Place(torch.device(name))) for name in ("cpu", "meta"))
    end = time.monotonic() + 60
    while not beside._found and time.monotonic() < end:
        time.sleep(0.01)
    assert beside._found == hashlib.sha256(b"bytes").hexdigest()
    assert not waiting._found
    assert waiting() == beside()
