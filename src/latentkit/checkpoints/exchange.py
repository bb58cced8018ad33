"""A model's parts exchanged: the autoencoder or the U-Net of another file in the place of its own."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from latentkit.checkpoints.adapters.survey import instead
from latentkit.checkpoints.adapters.tiny_files import is_tiny, read_tiny
from latentkit.checkpoints.detect import comparable
from latentkit.checkpoints.files import Place, bring, find, load_autoencoder
from latentkit.checkpoints.layouts import layout_of, open_model
from latentkit.checkpoints.ldm_file import OUR_UNET, built
from latentkit.checkpoints.lone import Lone, lone_first_stage, lone_part
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.model.presets import PRESETS
from latentkit.nets.tiny import TinyAutoencoder
from latentkit.nets.unet import UNetConfig

WITH_ONE = ("an autoencoder alone", "a tiny autoencoder alone", "a whole model")
UNSAID = "1"
"""Factor on the latents of an autoencoder that says none."""


def first_stage_for(path: str | Path, model: LatentDiffusion) -> FirstStage:
    """The first stage at `path`, alone, tiny or a whole model's, for the latents of `model`, which it computes like.

    Latents stay as they are scaled in the model; a tiny autoencoder brings its own scale. Errors: InputError where
    there is none, or one of other latents or pictures.
    """
    path, own = Path(path), model.first_stage
    try:
        stage = _first_stage(path)
    except InputError as error:
        raise instead(error, path, "an autoencoder", *WITH_ONE) from None
    ours, theirs = _shape(own), _shape(stage)
    if own.autoencoder is None or stage.autoencoder is None or ours != theirs:
        raise InputError(f"{path}: its autoencoder makes {theirs}; the model draws {ours}")
    if not isinstance(stage.autoencoder, TinyAutoencoder):
        _scaled(stage, own, path)
    like, device = next(own.autoencoder.parameters()), own.latent_mean.device
    place = Place(device if like.is_meta else like.device, like.dtype)  # a backend may have let go of the weights
    for parameter in stage.autoencoder.parameters():
        bring(parameter, place)
    for buffer in stage.buffers():
        buffer.data = buffer.data.to(device)
    return stage


def _scaled(stage: FirstStage, own: FirstStage, path: Path) -> None:
    """Give `stage` the model's scaling of latents; that of a tiny autoencoder says nothing of others."""
    said, used = _scale(stage), _scale(own)
    if isinstance(own.autoencoder, TinyAutoencoder):
        if said == UNSAID:
            what = f"{path}: does not say what its latents are multiplied by, nor does the model's tiny autoencoder"
            raise InputError(f"{what}; give diffusers' folder of it, or a whole model")
        return
    if said not in (UNSAID, used):
        what = f"{path} says that its latents are multiplied by {said}, and the model's are by {used}"
        logging.getLogger("latentkit").warning(f"{what}: it may be made for another kind of model")
    stage.latent_mean, stage.latent_std = own.latent_mean, own.latent_std


def _first_stage(path: Path) -> FirstStage:
    if is_tiny(path):
        return read_tiny(path)
    if (stage := lone_first_stage(path)) is not None:
        return stage
    if layout_of(path) == "latentkit":
        return load_autoencoder(find(path), dtype=None)
    return open_model(path).model.first_stage


def _shape(stage: FirstStage) -> str:
    if stage.autoencoder is None:
        return f"pixels of {stage.picture_channels} channels"
    cell = f"{stage.downsampling}x{stage.downsampling}"
    return f"latents of {stage.latent_channels} channels, {cell} pixels each, of {stage.picture_channels} in pictures"


def _scale(stage: FirstStage) -> str:
    """The factors on raw latents."""
    factors = sorted({f"{1 / float(one):.5g}" for one in stage.latent_std})
    return factors[0] if len(factors) == 1 else f"{factors[0]} to {factors[-1]}"


def with_part(model: LatentDiffusion, path: Path, kind: Literal["vae", "unet"]) -> LatentDiffusion:
    """The model with an autoencoder ("vae", see `first_stage_for`) or the U-Net alone at `path` for its own.

    Errors: InputError where the part does not fit the others.
    """
    if kind == "vae":
        return model.with_first_stage(first_stage_for(path, model))
    lone = None if is_tiny(path) else lone_part(path)
    if lone is None or not isinstance(lone.config, UNetConfig):
        raise instead(InputError(f"{path}: is no U-Net alone", exit_code=2), path, "a U-Net alone")
    lone.complaints.refuse(str(path))
    made = built(_with_network(model.architecture, lone, path), model.state(), str(path))
    state = model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(OUR_UNET)}
    dtype = next(tensor.dtype for name, tensor in state.items() if name.startswith(OUR_UNET))
    made.load_state_dict(kept | {OUR_UNET + name: part.to(dtype) for name, part in lone.state.items()}, assign=True)
    return made.eval().requires_grad_(False)


def left_aside(path: Path) -> Mapping[str, list[str]]:
    """What takes no part in a picture of the file at `path` that a part was taken of, by kind (see `Opened.left`)."""
    if is_tiny(path):
        return {}
    if (lone := lone_part(path)) is not None:
        return lone.left
    return {} if layout_of(path) == "latentkit" else open_model(path).left


def _with_network(old: Architecture, lone: Lone, path: Path) -> Architecture:
    """The architecture with another U-Net: one of the same shape, or of a preset told by the same conditioners."""
    network = lone.config
    assert isinstance(network, UNetConfig)
    if comparable(network) == comparable(old.network):  # only a config.json knows heads better than the model does
        return replace(old, network=network if lone.layout == "diffusers" else old.network)
    for known in PRESETS.values():
        other = known.architecture
        same = comparable(other.network) == comparable(network) and other.conditions() == old.conditions()
        if same and other.first_stage == old.first_stage:
            return replace(other, network=network, size=old.size, prediction=old.prediction)
    beside = network.channels_in - old.network.channels_out - (old.beside - old.concat_channels)
    made = replace(old, network=network, concat_channels=beside)
    try:
        fits = beside >= 0 and fit_network(made) == made
    except InputError:
        fits = False
    if not fits:
        raise InputError(
            f"{path}: its U-Net takes {network.channels_in} channels, context {network.context_width}, vector "
            f"{network.vector_width}; the model's takes {old.network.channels_in}, {old.network.context_width}, "
            f"{old.network.vector_width}, and its conditioners make no other"
        )
    return made
