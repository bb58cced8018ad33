"""Adapters with one tensor spoiled: each is named; what is read all the same is a whole file of another kind.

Whole models have 504 mutations of their own (`test_layouts.py`), parts alone 16 (`test_lone.py`): 726 with these.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_controlnet_names import SD1
from test_controlnet_names import model as target
from test_lora_files import CONV, TEXT, Q, changes, made
from torch import Tensor

from latentkit.checkpoints.adapters.control_files import read_control, write_control
from latentkit.checkpoints.adapters.inversions import read_inversion
from latentkit.checkpoints.adapters.lora_files import read_lora, write_lora
from latentkit.errors import InputError
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change

Tensors = dict[str, Tensor]
Source = tuple[Path, Callable[[Path], Any]]
LORAS = ["kohya", "peft", "loha", "lokr", "dora"]
SOURCES = [*LORAS, "control ldm", "control diffusers", "inversion", "two towers"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def lora(kind: str, path: Path) -> Source:
    model = made()
    shape = model.state_dict()[Q].shape
    ours = changes(model, Q, CONV, TEXT)
    if kind == "loha":
        ours = {Q: replace(ours[Q], second=changes(model, Q)[Q])}
    if kind == "dora":
        ours = {Q: replace(ours[Q], magnitude=torch.rand(shape[0], 1))}
    if kind == "lokr":
        ours = {Q: Change(torch.randn(3, 8), torch.randn(16, 3), 2.0, left=Change(None, torch.randn(2, 4)))}
    write_lora(path, model, ours, "diffusers" if kind == "peft" else "kohya")
    return path, lambda file: read_lora(file, model)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A file of each kind, and what reads it."""
    root = tmp_path_factory.mktemp("mutations")
    found = {kind: lora(kind, root / f"{kind}.safetensors") for kind in LORAS}
    network, plain = ControlNet(SD1), target(SD1)
    for layout in ("ldm", "diffusers"):
        place = root / ("control.safetensors" if layout == "ldm" else "control")
        write_control(place, network, layout)
        found[f"control {layout}"] = (place, lambda file: read_control(file, plain))
    save_file({"emb_params": torch.randn(2, 8)}, root / "inversion.safetensors")
    save_file({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 12)}, root / "towers.safetensors")
    found["inversion"] = (root / "inversion.safetensors", read_inversion)
    found["two towers"] = (root / "towers.safetensors", read_inversion)
    return found


def spoiled(tensors: Tensors, key: str, how: str) -> Tensors | None:
    """The tensors with one spoiled; None where that is no change."""
    rest, one = {name: tensor for name, tensor in tensors.items() if name != key}, tensors[key]
    if how == "dropped":
        return rest
    if how == "renamed":
        return rest | {f"{key}x": one}
    if how == "of whole numbers":
        return rest | {key: one.long()}
    if how == "NaN":
        return rest | {key: torch.full_like(one, torch.nan)}
    if how == "of another rank":
        return rest | {key: one[None].expand(3, *one.shape).contiguous()}
    turned = one.transpose(0, 1).contiguous() if one.ndim > 1 else one
    return None if turned.shape == one.shape else rest | {key: turned}


HOW = ["dropped", "renamed", "transposed", "of whole numbers", "NaN", "of another rank"]
WHOLE = {
    ("alpha", "dropped"): "alpha is then the rank",
    ("dora_scale", "dropped"): "a LoRA",
    ("dora_scale", "transposed"): "norms of the inputs of a square weight",
    ("emb_params", "renamed"): "diffusers' layout: the name is the prompt's",
    ("emb_params", "transposed"): "more vectors, for a narrower tower",
    ("clip_l", "dropped"): "an inversion of one tower",
    ("clip_l", "renamed"): "an inversion of one tower; what lies beside it is passed over",
    ("clip_g", "renamed"): "an inversion of one tower; what lies beside it is passed over",
    ("clip_g", "dropped"): "an inversion of one tower",
}
"""Changes after which a file is whole, by the end of the tensor's name."""


def files(source: Source, folder: Path) -> tuple[Tensors, Callable[[Tensors], Path]]:
    """The tensors, and what writes others into a copy."""
    path = source[0]
    if path.is_file():
        copy = folder / path.name
        return load_file(path), lambda tensors: (save_file(tensors, copy), copy)[1]
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    return load_file(path / WEIGHTS), lambda tensors: (save_file(tensors, folder / WEIGHTS), folder)[1]


TRIED = {
    "kohya": 28, "peft": 36, "loha": 29, "lokr": 23, "dora": 23, "control ldm": 25, "control diffusers": 25,
    "inversion": 5, "two towers": 12,
}  # fmt: skip
"""Mutations of each kind: 206 in all."""


@pytest.mark.parametrize("name", SOURCES)
def test_spoiled_tensors_are_named(name: str, sources: dict[str, Source], tmp_path: Path) -> None:
    tensors, write = files(sources[name], tmp_path)
    read = sources[name][1]
    read(write(tensors))
    keys = sorted(tensors)
    tried = 0
    for key in keys[:: max(1, len(keys) // 4)]:
        for how in HOW:
            changed = spoiled(tensors, key, how)
            if not changed:
                continue
            tried += 1
            path = write(changed)
            if (key.rpartition(".")[2], how) in WHOLE:
                read(path)
                continue
            with pytest.raises(InputError) as caught:
                read(path)
            shown = key.removeprefix("control_model.")
            if name in LORAS and how == "dropped":  # the rest of its layer is named
                shown = re.split(r"\.(lora|hada|lokr)_", key)[0]
            assert shown in str(caught.value), (key, how)
    assert tried == TRIED[name]
