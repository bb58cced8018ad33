"""Models in whichever of the three layouts they lie: our own file, a single file of the released code, a folder."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny
from latentkit.checkpoints.detect import DESCRIPTION, said_prediction
from latentkit.checkpoints.diffusers_folder import INDEX, is_folder, match_folder, write_folder
from latentkit.checkpoints.doctor import picture
from latentkit.checkpoints.doctor.suspicion import suspicious
from latentkit.checkpoints.files import find, load_model, save_model
from latentkit.checkpoints.ldm_file import filled, match, write_single
from latentkit.checkpoints.lone import Lone, lone_part
from latentkit.checkpoints.names.rename import blocks
from latentkit.checkpoints.probe import doubtful, settle
from latentkit.checkpoints.storage.archive import read_archive, refuse_other
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyAutoencoder

Layout = Literal["ldm", "diffusers", "latentkit"]
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLD = {"modelspec.title": "name", "modelspec.license": "licence", "modelspec.date": "date"}
"""Metadata of single files that is kept, and what it is called in provenance."""
OF_SPEC = ("sai_model_spec", "architecture", "implementation", "resolution", "prediction_type", "hash_sha256")
WRITTEN = {"format", DESCRIPTION, *TOLD, *(f"modelspec.{key}" for key in OF_SPEC)}
"""Metadata that is written anew."""


class Opened(NamedTuple):
    """A model and where it came from."""

    model: LatentDiffusion
    provenance: dict[str, Any]
    layout: Layout
    certain: bool = True
    """Whether what its network predicts and its heads are known; otherwise `probe.settle` asks the network."""
    left: Mapping[str, list[str]] = {}
    """What of the file is left aside, by kind (see `rename.blocks`)."""


def layout_of(path: Path) -> Layout:
    """The layout of a file or folder, by what is in it; InputError where there is nothing."""
    if path.is_dir() and is_folder(path):
        return "diffusers"
    if not path.exists():
        raise InputError(f"{path} does not exist", exit_code=2)
    if path.is_dir():
        return "diffusers" if (path / "config.json").is_file() else "latentkit"
    refuse_other(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        own = b'"latentkit"' in file.read(min(length, 1 << 16))
    return "latentkit" if own else "ldm"


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    averaged: bool | None = None,
    variant: str | None = None,
    *,
    keep: bool = False,
) -> Opened:
    """The model there, in evaluation mode; `dtype` None: as stored.

    `averaged` is as in `ldm_file.match`, `variant` as in `read_folder`, `keep` as in `taken`.

    Errors: InputError names all that is missing, left over or wrong.
    """
    path = Path(path)
    layout = layout_of(path)
    device = torch.device(device)
    if variant is not None and layout != "diffusers":
        raise InputError(f"{path}: has no variant {variant!r}; only diffusers folders have variants", exit_code=2)
    if layout == "diffusers":
        folder = match_folder(path, variant, keep=keep)
        folder.complaints.refuse(str(path))
        model = filled(folder.model, folder.state, device, dtype)
        return Opened(model, {"source": "diffusers folder"}, layout, left=_left(folder.ignored, [])["left"])
    if layout == "ldm":
        archive = read_archive(path)
        matched = match(archive, str(path), averaged, path.parent, keep=keep)
        matched.complaints.refuse(str(path))
        model, name = filled(matched.model, matched.state, device, dtype), matched.found.name
        told = {ours: archive.metadata[theirs] for theirs, ours in TOLD.items() if theirs in archive.metadata}
        left = _left(matched.ignored, archive.tensors)["left"]
        if untold := sorted(key[:80] for key in archive.metadata if key not in WRITTEN and key.isprintable()):
            left["what the file says of itself"] = untold
        certain = not doubtful(name, matched.found.certain)
        return Opened(model, {"source": f"single file, {name}", **told}, layout, certain, left)
    path = find(path)
    stored = Counter(tensor.dtype for tensor in read_archive(path).tensors.values()).most_common(1)[0][0]
    model, provenance = load_model(path, device, dtype or stored)
    return Opened(model, provenance, layout)


def write_model(path: str | Path, opened: Opened, layout: Layout, dtype: torch.dtype | None = None) -> None:
    """Write a model in a layout; `dtype` None: as it is. Errors: InputError names what the layout cannot hold."""
    title = str(opened.provenance.get("name", Path(path).stem))
    licence, date = opened.provenance.get("licence"), opened.provenance.get("date")
    if layout == "diffusers":
        write_folder(path, opened.model, dtype)
    elif layout == "ldm":
        write_single(path, opened.model, title, dtype, licence, date)
    else:
        save_model(path, opened.model, opened.provenance, dtype or opened.model.denoiser.unet.conv_in.weight.dtype)


def differences(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, str]:
    """What differs between two states, by name, in words."""
    found = dict.fromkeys(ours.keys() - others.keys(), "only in the first")
    found |= dict.fromkeys(others.keys() - ours.keys(), "only in the second")
    for name in sorted(ours.keys() & others.keys()):
        a, b = ours[name], others[name]
        if a.shape != b.shape:
            found[name] = f"shape {list(a.shape)} and {list(b.shape)}"
        elif not torch.equal(a.float(), b.float()):
            largest = (a.float() - b.float()).abs().max().item()
            found[name] = f"largest difference {largest:.3g}"
    return found


def report(path: str | Path) -> dict[str, Any]:
    """What a model file or folder is, its parts, and all that is wrong with it; only unreadable ones raise."""
    path = Path(path)
    layout = layout_of(path)
    if is_tiny(path):
        return _tiny(path, layout)
    if (lone := lone_part(path)) is not None:
        return _lone(path, lone)
    found = {"path": str(path), "layout": layout, "kind": layout, **LEFT, "averaged": None}
    if layout == "diffusers":
        folder = match_folder(path)
        model, state = folder.model, folder.state
        found["wrong"] = folder.complaints.lines(None)
        found["says"] = f"{INDEX} and config.json"
        found |= _left(folder.ignored, [])
    elif layout == "ldm":
        archive = read_archive(path)
        matched = match(archive, str(path))
        model, state = matched.model, matched.state
        if not matched.complaints and doubtful(matched.found.name, matched.found.certain):
            settle(filled(model, state, torch.device("cpu"), None), str(path))
        found |= {
            "kind": matched.found.name,
            "wrong": matched.complaints.lines(None),
            "averaged": "taken" if matched.averaged else "left aside" if matched.averages else None,
            "says": said_prediction(archive),
        }
        found |= _left(matched.ignored, archive.tensors)
    else:
        opened = open_model(path)
        model, state = opened.model, opened.model.state_dict()
        found |= {"wrong": [], "says": "its own description"}
    architecture = model.architecture
    found |= {
        "prediction": architecture.prediction,
        "size": list(architecture.size),
        "parts": _parts(state, picture.whole(architecture)),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "suspicious": suspicious(state),
    }
    return found


LEFT: dict[str, Any] = {"ignored": {}, "left": {}}
"""Of a file of which nothing is left aside."""


def _left(ignored: Mapping[str, list[str]], there: Iterable[str]) -> dict[str, Any]:
    """All names of tensors that are left aside, by kind; and the same with whole blocks as one."""
    named = {kind: sorted(names) for kind, names in sorted(ignored.items()) if names}
    return {"ignored": named, "left": {kind: blocks(names, there) for kind, names in named.items()}}


def _lone(path: Path, lone: Lone) -> dict[str, Any]:
    """What is to be said of a part alone."""
    own = isinstance(lone.config, AutoencoderConfig)
    lines = (
        picture.first_stage(lone.config) if isinstance(lone.config, AutoencoderConfig) else picture.unet(lone.config)
    )
    return {
        "path": str(path),
        "layout": lone.layout,
        "kind": f"{lone.part} alone ({lone.name or 'of no released shape'})",
        **_left({"what takes no part": lone.aside}, lone.names),
        "averaged": None,
        "wrong": lone.complaints.lines(None),
        "says": "its config.json" if lone.statistics or not own else None,
        "prediction": None,
        "size": None,
        "parts": {lone.part: _part(list(lone.state.values()), lines)},
        "parameters": sum(tensor.numel() for tensor in lone.state.values()),
        "suspicious": suspicious(lone.state),
    }


def _tiny(path: Path, layout: Layout) -> dict[str, Any]:
    """What is to be said of a tiny autoencoder; what is wrong with it raises."""
    network = read_tiny(path).autoencoder
    assert isinstance(network, TinyAutoencoder)
    state = network.state_dict()
    return {
        "path": str(path),
        "layout": layout,
        "kind": "tiny autoencoder alone",
        **LEFT,
        "averaged": None,
        "wrong": [],
        "says": "its config.json" if path.is_dir() else None,
        "prediction": None,
        "size": None,
        "parts": {"first stage": _part(list(state.values()), picture.first_stage(network.config))},
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "suspicious": suspicious(state),
    }


TITLES = {
    "denoiser.": "U-Net",
    "first_stage.": "first stage",
    "conditioners.text.": "text tower",
    "conditioners.text.towers.0.": "text tower",
    "conditioners.text.towers.1.": "text tower 2",
    "conditioners.image.": "image tower",
    "conditioners.layout.": "layout tower",
    "conditioners.label.": "classes",
    "conditioners.map.": "semantic map",
}
"""What parts are called, by what the names of their tensors begin with."""


def _parts(state: Mapping[str, Tensor], lines: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for prefix, title in TITLES.items():
        tensors = [tensor for name, tensor in state.items() if name.startswith(prefix)]
        if tensors and prefix in lines:
            parts[title] = _part(tensors, lines[prefix])
    return parts


def _part(tensors: list[Tensor], lines: list[str]) -> dict[str, Any]:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.ndim)
    count = sum(tensor.numel() for tensor in tensors)
    return {"tensors": len(tensors), "parameters": count, "types": dict(types), "picture": lines}
