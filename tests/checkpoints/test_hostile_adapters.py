"""Adapters, parts alone and tiny autoencoders made to harm: each is refused in one sentence, at once, nothing run."""

import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from hostile import BOMBS, PROGRAMS, SAFETENSORS, Gadget, calling, checkpoint, header, zips
from safetensors.torch import save_file
from test_tiny_files import FIELDS
from test_tiny_files import written as tiny

from latentkit.checkpoints.adapters.control_files import read_control, write_control
from latentkit.checkpoints.adapters.inversions import read_inversion
from latentkit.checkpoints.adapters.lora_files import read_lora
from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny
from latentkit.checkpoints.diffusers_folder import _parts, _schedule, write_folder
from latentkit.checkpoints.layouts import report
from latentkit.checkpoints.lone import lone_part
from latentkit.checkpoints.names.diffusers_configs import autoencoder_config, unet_config
from latentkit.checkpoints.names.tiny_names import tiny_config
from latentkit.checkpoints.names.tower_configs import image_config, image_json, text_config
from latentkit.errors import InputError
from latentkit.nets.clip import ClipImageConfig
from latentkit.nets.controlnet import ControlNet

MODEL = family.model("SD 1")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def alone(path: Path) -> None:
    """What all that takes an autoencoder or a U-Net alone does first."""
    found = None if is_tiny(path) else lone_part(path)
    if found is None:
        raise InputError(f"{path} is neither an autoencoder nor a U-Net alone")
    found.complaints.refuse(str(path))


def beside(path: Path) -> None:
    """A good half of a tiny autoencoder, the other half of which is `path`."""
    half = path.with_name("encoder" + path.suffix)
    shutil.copy(tiny(path.parent, "two files"), half)
    path.rename(path.with_name("decoder" + path.suffix))
    read_tiny(half)


Reader = tuple[Callable[[Path], Any], str, tuple[str, ...]]
READERS: dict[str, Reader] = {
    "LoRA": (lambda path: read_lora(path, MODEL), "lora_unet_conv_in.lora_down.weight", (".safetensors", ".pt")),
    "ControlNet": (lambda path: read_control(path, MODEL), "input_hint_block.0.weight", (".pth", ".safetensors")),
    "inversion": (read_inversion, "emb_params", (".bin", ".pt", ".safetensors")),
    "autoencoder": (alone, "encoder.down.0.block.0.norm2.weight", (".ckpt", ".safetensors", ".pt")),
    "U-Net": (alone, "input_blocks.0.0.weight", (".safetensors", ".ckpt", ".bin")),
    "tiny": (read_tiny, "encoder.1.conv.0.weight", (".pth", ".safetensors")),
    "half of a tiny": (beside, "1.weight", (".pth", ".safetensors")),
    "inspect": (report, "encoder.conv_in.weight", (".ckpt", ".safetensors", ".vae.pt")),
}
"""What reads each kind of file, the name of a tensor that it looks for first, and what its names end in."""


def refused(read: Callable[[Path], Any], path: Path) -> str:
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        read(path)
    assert time.process_time() - start < 1
    said = str(caught.value)
    assert len(said) < 1000
    assert said.isprintable()
    return said


GADGETS = ["os system", "builtins eval", "torch load", "latentkit.checkpoints.files load"]
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
PICKLES = (
    PROGRAMS | BOMBS | {f"{name}, {form}": calling(name, form) for name in GADGETS for form in ("GLOBAL", "STACK")}
)


@pytest.mark.parametrize("kind", READERS)
def test_pickles_are_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    """Of each kind 50."""
    read, _, endings = READERS[kind]
    for (name, program), ending in zip(PICKLES.items(), itertools.cycle(endings)):
        refused(read, checkpoint(tmp_path / f"{name.replace(' ', '-')}{ending}", program))


@pytest.mark.parametrize("kind", READERS)
def test_gadgets_among_tensors_are_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    read, name, endings = READERS[kind]
    torch.save({name: torch.ones(2), "x": [Gadget()]}, tmp_path / f"file{endings[0]}")
    assert ".system'" in refused(read, tmp_path / f"file{endings[0]}")
    legacy = tmp_path / f"old{endings[0]}"
    torch.save({name: torch.ones(2), "x": Gadget()}, legacy, _use_new_zipfile_serialization=False)
    assert ".system'" in refused(read, legacy)


@pytest.mark.parametrize("kind", READERS)
def test_zips_are_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    for path in zips(tmp_path):
        refused(READERS[kind][0], path.rename(path.with_suffix(READERS[kind][2][0])))


@pytest.mark.parametrize("kind", READERS)
def test_broken_safetensors_are_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    """Of each kind 18."""
    path = tmp_path / f"file{READERS[kind][2][-1]}"
    for content in SAFETENSORS.values():
        path.write_bytes(content)
        refused(READERS[kind][0], path)


SHAPES = [
    [], [0], [1 << 63, 0], [0, 1 << 62, 3, 3], [1 << 62, 1 << 62, 0], [0, 0, 0, 0], [1] * 9, [1] * 64, [1] * 400,
]  # fmt: skip
TYPES = {"F4": 0.5, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "I8": 1, "U16": 2, "I64": 8, "C64": 8}


@cache
def aimed(name: str) -> dict[str, bytes]:
    """Files whose one tensor has the name that is looked for."""
    files: dict[str, bytes] = {}
    for shape in SHAPES:
        size = 4 * math.prod(shape)
        files[f"shape {shape}"[:60]] = header({name: ENTRY | {"shape": shape, "data_offsets": [0, size]}}, bytes(size))
    for kind, width in TYPES.items():
        shape, size = [4, 2, 2, 2], int(32 * width)
        entry = {"dtype": kind, "shape": shape, "data_offsets": [0, size]}
        files[f"type {kind}"] = header({name: entry}, bytes(size))
    one, other = json.dumps(ENTRY), json.dumps(ENTRY | {"shape": [1 << 30], "data_offsets": [0, 1 << 32]})
    for title, pair in (
        ("twice the same", (one, one)),
        ("twice", (one, other)),
        ("twice, the other first", (other, one)),
    ):
        files[title] = header(
            b'{"%b":%b,"%b":%b}' % (name.encode(), pair[0].encode(), name.encode(), pair[1].encode()), bytes(8)
        )
    return files | {
        "a shape twice": header(b'{"%b":%b}' % (name.encode(), one.replace('"sh', '"shape":[1],"sh').encode())),
        "metadata twice": header(b'{"__metadata__":{},"__metadata__":{},"w":%b}' % one.encode(), bytes(8)),
        "a name of ten million letters": header({name + "x" * 10_000_000: ENTRY}, bytes(8)),
        "a name that clears the screen": header({name + "\x1b[2J": ENTRY}, bytes(8)),
        "very many tensors": header({f"{name}{n}": ENTRY for n in range(30_001)}),
        "a header of 34 MB": header(b" " * (1 << 25) + b"{}", b""),
        "not finite": header({name: ENTRY}, b"\xff" * 8),
    }  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_tensors_that_cannot_be_meant_are_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    """Of each kind 28."""
    read, first, endings = READERS[kind]
    path = tmp_path / f"file{endings[-1]}"
    for content in aimed(first).values():
        path.write_bytes(content)
        refused(read, path)


BLOCKS = {
    "autoencoder": {f"encoder.down.{n}.block.{n}.norm2.weight": [1] for n in range(100)}
    | {f"encoder.down.{n}.block.0.norm2.weight": [1] for n in range(100)}
    | {"encoder.conv_in.weight": [1] * 4, "encoder.conv_out.weight": [2, 1, 1, 1], "decoder.conv_in.weight": [1] * 4}
    | {"encoder.down.0.block.99.norm2.weight": [1]},
    "U-Net": {f"input_blocks.{n}.1.transformer_blocks.{n}.x": [1] for n in range(999)}
    | {"input_blocks.0.0.weight": [1, 4, 3, 3]},
    "ControlNet": {f"input_blocks.1.1.transformer_blocks.{n}.x": [1] for n in range(20_000)}
    | {"input_hint_block.0.weight": [16, 3, 3, 3]},
    "tiny": {f"encoder.{n}.conv.0.weight": [1] for n in range(1, 20_000) if n != 10_000}
    | {f"encoder.{n}.weight": [1, 1, 1, 1] for n in (0, 10_000, 20_000)},
}
"""Shapes of tensors whose names alone ask for thousands of blocks."""


@pytest.mark.parametrize("kind", BLOCKS)
def test_networks_without_end_are_not_built(kind: str, tmp_path: Path, idle: list[str]) -> None:
    entries, place = {}, 0
    for name, shape in BLOCKS[kind].items():
        after = place + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, after]}
        place = after
    (tmp_path / "file.safetensors").write_bytes(header(entries, bytes(place)))
    said = refused(READERS[kind][0], tmp_path / "file.safetensors")
    assert kind == "U-Net" or "at most 2000 are built" in said


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a pipe": lambda path: os.mkfifo(path),
    "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to another file": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("../../nothing"),
    "an empty file": Path.touch,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "half of a tiny"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path, idle: list[str]) -> None:
    """Of each kind 8."""
    for name, make in SPECIAL.items():
        path = tmp_path / f"{name}{READERS[kind][2][0]}"
        make(path)
        assert "root:" not in refused(READERS[kind][0], path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good ones of each kind that lies in a folder."""
    root = tmp_path_factory.mktemp("folders")
    write_folder(root / "model", MODEL)
    write_control(root / "control", ControlNet(MODEL.architecture.network), "diffusers")
    (root / "tiny").mkdir()
    tiny(root, "one file").rename(root / "tiny" / WEIGHTS)
    (root / "tiny" / "config.json").write_text(json.dumps(FIELDS))
    made = {"autoencoder": root / "model" / "vae", "U-Net": root / "model" / "unet"}
    return made | {"ControlNet": root / "control", "tiny": root / "tiny"}


KINDS = ["autoencoder", "U-Net", "ControlNet", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", WEIGHTS, f"{WEIGHTS}.index.json"])
def test_folders_of_what_is_no_file_are_refused(
    file: str, kind: str, folders: dict[str, Path], tmp_path: Path, idle: list[str]
) -> None:
    """Of each kind 24."""
    for name, make in SPECIAL.items():
        shutil.copytree(folders[kind], tmp_path / name)
        (tmp_path / name / (file if file == "config.json" else WEIGHTS)).unlink()
        make(tmp_path / name / file)
        assert "root:" not in refused(READERS[kind][0], tmp_path / name)


SHARDS = ["../model.safetensors", "/etc/passwd", "..", "", ".", "a\x00b", "x" * 5000, "a/b", "\x1b[2J"]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_do_not_lead_out_of_a_folder(
    kind: str, folders: dict[str, Path], tmp_path: Path, idle: list[str]
) -> None:
    shutil.copytree(folders[kind], tmp_path / "folder")
    (tmp_path / "folder" / WEIGHTS).rename(tmp_path / "model.safetensors")
    for shard in SHARDS:
        index = tmp_path / "folder" / f"{WEIGHTS}.index.json"
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
        refused(READERS[kind][0], tmp_path / "folder")


FOREIGN: list[Any] = ["os.system", "FluxTransformer2DModel", "../../evil", [], {"a": 1}, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_foreign_classes_are_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path, idle: list[str]
) -> None:
    shutil.copytree(folders[kind], tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    fields = json.loads(config.read_text())
    for foreign in FOREIGN:
        config.write_text(json.dumps(fields | {"_class_name": foreign}))
        refused(READERS[kind][0], tmp_path / "folder")


def schedule(what: str, values: dict[str, Any]) -> Any:
    Path(what).write_text(json.dumps(values))
    return _schedule(Path(what))


CONFIGS: dict[str, tuple[str, Callable[[str, dict[str, Any]], Any]]] = {
    "index": ("model_index.json", lambda what, values: _parts(Path(what), values)),
    "U-Net": ("unet/config.json", unet_config),
    "autoencoder": ("vae/config.json", autoencoder_config),
    "scheduler": ("scheduler/scheduler_config.json", schedule),
    "text tower": (
        "text_encoder/config.json", lambda what, values: text_config(what, values, pad=None, penultimate=False)
    ),
    "image tower": ("", image_config),
    "tiny": ("", tiny_config),
}  # fmt: skip
ABSURD: list[Any] = [
    None, True, -1, 0, 1 << 40, 10**30, 10**400, 1.5, math.nan, math.inf, -math.inf, "evil", "\x1b[2J", "9" * 5000, "1",
    [], {}, [[]], {"a": 1}, [1 << 40] * 3, ["x"] * 3, [None] * 2, [math.nan] * 4, [0] * 4, [-1, 1, 1], ["os", "system"],
    ["diffusers", {}], [{}, []],
]  # fmt: skip
RARE = [
    "sample_size", "shift_factor", "latents_mean", "latents_std", "reverse_transformer_layers_per_block",
    "attn_norm_num_groups", "addition_embed_type", "class_embed_type", "num_class_embeds", "resnet_time_scale_shift",
    "trained_betas", "prediction_type", "norm_num_groups", "dropout", "_class_name", "evil\x1b[2J" + "x" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_with_every_absurd_value_is_read_or_refused(
    kind: str, folders: dict[str, Path], tmp_path: Path, idle: list[str]
) -> None:
    """More than 300 of each config, about 4,000 in all."""
    file, read = CONFIGS[kind]
    image = ClipImageConfig(width=32, layers=2, heads=2, size=28, patch=14, projection=16)
    fields = FIELDS if kind == "tiny" else image_json(image)
    if file:
        fields = json.loads((folders["U-Net"].parent / file).read_text())
    said = []
    for name, value in itertools.product([*fields, *RARE], ABSURD):
        try:
            read(str(tmp_path / "config.json"), fields | {name: value})
        except InputError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(len(text) < 1000 and text.isprintable() for text in said)


LORA = {f"unet.conv_in.lora_{n}.weight": torch.ones(shape) for n, shape in (("A", (1, 4, 3, 3)), ("B", (32, 1, 1, 1)))}


@pytest.fixture(scope="module", autouse=True)
def _good(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A good one is read, and all that is imported at the first reading is imported."""
    path = tmp_path_factory.mktemp("good") / "lora.safetensors"
    save_file(LORA, path, {"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    assert read_lora(path, MODEL).changes["denoiser.unet.conv_in.weight"].alpha == 2


@pytest.mark.parametrize(
    "told",
    [
        "[" * 100_000, "[]", "7", "nonsense", '{"unet.lora_alpha": 1e999}', '{"unet.lora_alpha": [1]}',
        '{"unet.lora_alpha": -1}', '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": 1%s}' % ("0" * 400),
        '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {"conv_in": "x"}}',
        '{"unet.lora_alpha": 1, "unet.use_rslora": 1, "unet.r": -1}', '{"unet.lora_alpha": 1, "unet.use_rslora": 1}',
    ],
)  # fmt: skip
def test_what_a_lora_says_of_itself_is_checked(told: str, tmp_path: Path, idle: list[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(LORA, path, {"lora_adapter_metadata": told})
    assert re.search("lora_adapter_metadata is damaged|alpha is no number above 0", refused(READERS["LoRA"][0], path))


def test_patterns_and_layers_without_end_take_no_time(tmp_path: Path, idle: list[str]) -> None:
    pattern = json.dumps({"unet.alpha_pattern": {f"evil.{n}": 1 for n in range(100_000)}})
    names = [name for name, one in MODEL.denoiser.unet.named_modules() if hasattr(one, "weight")]
    made = {f"unet.{name}{n}.lora_A.weight": torch.ones(1) for n, name in enumerate(names * 10)}
    save_file(made, tmp_path / "lora.safetensors", {"lora_adapter_metadata": pattern})
    refused(READERS["LoRA"][0], tmp_path / "lora.safetensors")
