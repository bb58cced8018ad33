"""Models in whichever of the three layouts they lie: our own file, a single file of the released code, a folder."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny
from latentkit.checkpoints.detect import said_prediction
from latentkit.checkpoints.diffusers_folder import INDEX, is_folder, match_folder, read_folder, write_folder
from latentkit.checkpoints.files import find, load_model, save_model
from latentkit.checkpoints.ldm_file import filled, match, read_single, write_single
from latentkit.checkpoints.lone import Lone, lone_part
from latentkit.checkpoints.names.rename import finite
from latentkit.checkpoints.probe import doubtful, settle
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyAutoencoder
from latentkit.nets.unet import UNetConfig

Layout = Literal["ldm", "diffusers", "latentkit"]
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUSPICIOUS_SCALE = 1e3
"""Deviation of a weight above which something went wrong in training or conversion."""


class Opened(NamedTuple):
    """A model and where it came from."""

    model: LatentDiffusion
    provenance: dict[str, Any]
    layout: Layout
    certain: bool = True
    """Whether what its network predicts and its heads are known; otherwise `probe.settle` asks the network."""


def layout_of(path: Path) -> Layout:
    """The layout of a file or folder, by what is in it; InputError where there is nothing."""
    if path.is_dir() and is_folder(path):
        return "diffusers"
    if not path.exists():
        raise InputError(f"{path} does not exist", exit_code=2)
    if path.is_dir():
        return "diffusers" if (path / "config.json").is_file() else "latentkit"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        own = b'"latentkit"' in file.read(min(length, 1 << 16))
    return "latentkit" if own else "ldm"


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    averaged: bool | None = None,
) -> Opened:
    """The model there, in evaluation mode; `dtype` None: as stored, `averaged` as in `ldm_file.match`.

    Errors: InputError names all that is missing, left over or wrong.
    """
    path = Path(path)
    layout = layout_of(path)
    if layout == "diffusers":
        return Opened(read_folder(path, device, dtype), {"source": "diffusers folder"}, layout)
    if layout == "ldm":
        model, found = read_single(path, device, dtype, averaged)
        return Opened(model, {"source": f"single file, {found.name}"}, layout, not doubtful(found.name, found.certain))
    path = find(path)
    stored = Counter(tensor.dtype for tensor in read_archive(path).tensors.values()).most_common(1)[0][0]
    model, provenance = load_model(path, device, dtype or stored)
    return Opened(model, provenance, layout)


def write_model(path: str | Path, opened: Opened, layout: Layout, dtype: torch.dtype | None = None) -> None:
    """Write a model in a layout; `dtype` None: as it is. Errors: InputError names what the layout cannot hold."""
    title = str(opened.provenance.get("name", Path(path).stem))
    licence = opened.provenance.get("licence")
    if layout == "diffusers":
        write_folder(path, opened.model, dtype)
    elif layout == "ldm":
        write_single(path, opened.model, title, dtype, licence)
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


def digest_of(path: Path) -> str:
    """The sha256 of a file, or of all of a folder's files and their names."""
    content = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            content.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            content.update(hashlib.file_digest(stream, "sha256").digest())
    return content.hexdigest()


def report(path: str | Path) -> dict[str, Any]:
    """What a model file or folder is, its parts, and all that is wrong with it; only unreadable ones raise."""
    path = Path(path)
    layout = layout_of(path)
    if is_tiny(path):
        return _tiny(path, layout)
    if (lone := lone_part(path)) is not None:
        return _lone(path, lone)
    found: dict[str, Any] = {"path": str(path), "layout": layout, "kind": layout, "ignored": {}, "averaged": False}
    if layout == "diffusers":
        model, state, complaints = match_folder(path)
        found["wrong"] = complaints.lines(None)
        found["says"] = f"{INDEX} and config.json"
    elif layout == "ldm":
        archive = read_archive(path)
        matched = match(archive, str(path))
        model, state = matched.model, matched.state
        if not matched.complaints and doubtful(matched.found.name, matched.found.certain):
            settle(filled(model, state, torch.device("cpu"), None), str(path))
        names = archive.tensors
        found |= {
            "kind": matched.found.name,
            "wrong": matched.complaints.lines(None),
            "ignored": {kind: sorted(names_) for kind, names_ in matched.ignored.items()},
            "averaged": any(name.startswith("model_ema.") for name in names),
            "says": said_prediction(archive),
        }
    else:
        opened = open_model(path)
        model, state = opened.model, opened.model.state_dict()
        found |= {"wrong": [], "says": "its own description"}
    architecture = model.architecture
    found |= {
        "prediction": architecture.prediction,
        "size": list(architecture.size),
        "parts": _parts(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "network": _levels(architecture.network),
        "suspicious": suspicious(state),
    }
    return found


def _lone(path: Path, lone: Lone) -> dict[str, Any]:
    """What is to be said of a part alone."""
    own = isinstance(lone.config, AutoencoderConfig)
    network = _autoencoder(lone.config) if isinstance(lone.config, AutoencoderConfig) else _levels(lone.config)
    return {
        "path": str(path),
        "layout": lone.layout,
        "kind": f"{lone.part} alone ({lone.name or 'of no released shape'})",
        "ignored": {"what takes no part": lone.aside} if lone.aside else {},
        "averaged": False,
        "wrong": lone.complaints.lines(None),
        "says": "its config.json" if lone.statistics or not own else None,
        "prediction": None,
        "size": None,
        "parts": {lone.part: _part(list(lone.state.values()))},
        "parameters": sum(tensor.numel() for tensor in lone.state.values()),
        "network": network,
        "suspicious": suspicious(lone.state),
    }


def _tiny(path: Path, layout: Layout) -> dict[str, Any]:
    """What is to be said of a tiny autoencoder; what is wrong with it raises."""
    network = read_tiny(path).autoencoder
    assert isinstance(network, TinyAutoencoder)
    config, state = network.config, network.state_dict()
    cells = f"{config.latent_channels} latent channels, {config.downsampling} pixels to a cell"
    return {
        "path": str(path),
        "layout": layout,
        "kind": "tiny autoencoder alone",
        "ignored": {},
        "averaged": False,
        "wrong": [],
        "says": "its config.json" if path.is_dir() else None,
        "prediction": None,
        "size": None,
        "parts": {"first stage": _part(list(state.values()))},
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "network": [cells, f"levels of {', '.join(map(str, config.blocks))} blocks, {config.channels} wide"],
        "suspicious": suspicious(state),
    }


PARTS = {"denoiser.": "U-Net", "first_stage.": "first stage", "conditioners.": "conditioners"}


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for prefix, title in PARTS.items():
        tensors = [tensor for name, tensor in state.items() if name.startswith(prefix)]
        if tensors:
            parts[title] = _part(tensors)
    return parts


def _part(tensors: list[Tensor]) -> dict[str, Any]:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.ndim)
    return {"tensors": len(tensors), "parameters": sum(t.numel() for t in tensors), "types": dict(types)}


def _autoencoder(config: AutoencoderConfig) -> list[str]:
    """A picture of an autoencoder."""
    widths = ", ".join(str(config.channels * multiplier) for multiplier in config.multipliers)
    latent = f"{config.latent_channels} latent channels, {config.downsampling} pixels to a cell"
    codes = f"; {config.codes} codes" if config.codes else ""
    return [f"{latent}{codes}", f"levels {widths} wide, {config.blocks} blocks"]


def _levels(config: UNetConfig) -> list[str]:
    """A picture of the U-Net: one line for each level."""
    lines = [f"{config.channels_in} channels in, {config.channels_out} out"]
    for level, (multiplier, depth) in enumerate(zip(config.multipliers, config.depth)):
        width = config.channels * multiplier
        kind = "plain attention" if config.plain_attention else f"{depth} x transformer"
        heads = f", {kind}, {config.head_count(width)} heads" if depth else ""
        lines.append(f"{'  ' * level}1/{2**level}: {width:5d} wide, {config.blocks} blocks{heads}")
    if config.context_width:
        lines.append(f"context {config.context_width} wide")
    if config.vector_width:
        lines.append(f"vector {config.vector_width} wide")
    return lines


def suspicious(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that are not finite, all zero, or far too large, by name."""
    found: dict[str, str] = {}
    for name, tensor in state.items():
        if (
            not tensor.is_floating_point()
            or not tensor.numel()
            or name.endswith(("latent_mean", "latent_std", ".mean"))
        ):
            continue
        if not finite(tensor):
            found[name] = "holds values that are not finite"
        elif tensor.ndim > 1 and not tensor.any():
            found[name] = "is all zero"
        elif tensor.ndim > 1 and (scale := float(tensor.float().square().mean().sqrt())) > SUSPICIOUS_SCALE:
            found[name] = f"has values of the size {scale:.3g}"
    return found
