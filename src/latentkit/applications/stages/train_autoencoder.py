"""Training a first stage from a recipe: pictures in, one autoencoder file and its measurements out."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkit import __version__
from latentkit.applications.pictures import open_data, write_sheet
from latentkit.checkpoints.files import save_autoencoder
from latentkit.data.dataset import Pictures
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.data.range import Range, check_same
from latentkit.errors import InputError
from latentkit.evaluation.first_stage import measure as measure_each
from latentkit.evaluation.first_stage import open_first_stage
from latentkit.evaluation.reconstruction import reconstruction
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.perceptual import FeatureConfig, OwnTrunk, PerceptualDistance
from latentkit.training import distributed
from latentkit.training.ema import Averaging
from latentkit.training.first_stage.autoencoder import AutoencoderObjective
from latentkit.training.first_stage.perceptual import FeatureObjective, Perceptual, check_files, read_distance
from latentkit.training.optimizers import Optimiser
from latentkit.training.recipe import AutoencoderRecipe, resolved
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

SHEET = 12
OWN_PERCEPTUAL = "perceptual"
"""Folder of the run within the run that trains the loss's own network."""
MOST_MEASURED, COMPARED = 512, 64


def train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> Path:
    """Train (or go on training) in `folder`; returns the model file's path."""
    channels = recipe.data.transform.channels
    if recipe.network.picture_channels != channels:
        raise InputError(
            f"the autoencoder has picture_channels: {recipe.network.picture_channels}, the data channels: {channels}; "
            "make them equal",
            exit_code=2,
        )
    seen = recipe.loss.perceptual
    if seen is not None:
        check_files(seen, "loss.perceptual")
    train, held = open_data(recipe.data, recipe.seed, recipe.network.downsampling)
    critic, side = recipe.loss.adversarial, min(map(min, train.shapes))
    if critic and side < critic.network.smallest:
        raise InputError(
            f"the critic has layers: {critic.network.layers}, which takes pictures of at least "
            f"{critic.network.smallest} px a side; the smallest here are {side} px: use fewer layers",
            exit_code=2,
        )
    torch.manual_seed(recipe.seed)
    first_stage = FirstStage(recipe.network, channels)
    autoencoder = first_stage.autoencoder
    assert autoencoder is not None
    if recipe.start is not None:
        _begin(autoencoder, recipe.start, recipe.data.transform.range)
    autoencoder.set_checkpointing(recipe.checkpointing)
    device = distributed.pick_device(recipe.schedule.device)
    first_stage.to(device)
    world = distributed.join(device)
    order = Order(len(train), recipe.schedule.batch, recipe.seed, train.buckets)
    loader = Loader(train, order, recipe.schedule.micro_batch, world.rank, world.size, recipe.data.workers)
    every = recipe.schedule.sample_every
    distance = known = read_distance(seen).to(device) if seen and seen.network != "own" else None
    with RunFolder(folder, resolved(recipe), writes=world.main) as run:
        if seen and seen.network == "own":
            distance = _own_perceptual(recipe, seen, loader, folder)
            torch.manual_seed(recipe.seed)  # the critic is the same, whether features were trained just now or before
        trainer = Trainer(
            AutoencoderObjective(
                autoencoder,
                recipe.loss,
                recipe.seed,
                perceptual=distance.to(device) if distance else None,
                frozen_encoder=recipe.frozen_encoder,
            ),
            loader.batches,
            run,
            schedule=recipe.schedule,
            optimiser={"autoencoder": recipe.optimiser} | ({"critic": critic.optimiser} if critic else {}),
            averaging=recipe.averaging,
            callbacks=[Callback(every, lambda step, t: _look(step, t, first_stage, held, known))] if every else (),
            seed=recipe.seed,
        )
        trainer.train()
        path = folder / "model.safetensors"
        if world.main:
            with trainer.ema.applied():
                provenance = {
                    "recipe": resolved(recipe),
                    "data": train.source.fingerprint,
                    "pictures": len(train),
                    "steps": trainer.step,
                    "licence": recipe.licence,
                    "versions": {"latentkit": __version__, "torch": str(torch.__version__)},
                    "reconstruction": measure(autoencoder, held),
                }
                save_autoencoder(path, first_stage, provenance)
        distributed.barrier()
    return path


def _begin(autoencoder: Autoencoder, start: str, here: Range | None) -> None:
    """Give an autoencoder the weights of the one called `start`; InputError where their shapes or ranges differ."""
    opened = open_first_stage(start, "cpu")
    given = opened.first_stage.autoencoder
    if given is None:
        raise InputError(f"start: {start} holds no autoencoder; name one, or leave it out", exit_code=2)
    there, wanted = (asdict(network.config) for network in (given, autoencoder))
    unlike = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if unlike:
        said = "".join(f"\n  network.{key}: {there.get(key)} -> {wanted.get(key)}" for key in unlike)
        raise InputError(f"start: {start} holds another autoencoder (there -> in the recipe):{said}", exit_code=2)
    check_same(f"start: {start}", opened.values, here)
    autoencoder.load_state_dict(given.state_dict())


def _own_perceptual(
    recipe: AutoencoderRecipe, settings: Perceptual, loader: Loader, folder: Path
) -> PerceptualDistance:
    """The loss's perceptual network, trained on the pictures as a run within the run."""
    channels = recipe.network.picture_channels
    trunk = OwnTrunk(FeatureConfig(picture_channels=channels))
    schedule = recipe.schedule.model_copy(update={"steps": settings.steps})
    about = {"features": settings.model_dump(mode="json"), "of": recipe.name}
    with RunFolder(folder / OWN_PERCEPTUAL, about, writes=distributed.world().main) as run:
        Trainer(
            FeatureObjective(trunk, recipe.seed),
            loader.batches,
            run,
            schedule=schedule,
            optimiser=Optimiser(),
            averaging=Averaging(power=()),
            seed=recipe.seed,
        ).train()
    return PerceptualDistance(trunk, channels)


def measure(autoencoder: Autoencoder, pictures: Pictures) -> dict[str, float]:
    """Reconstruction figures of an autoencoder on pictures, in float32."""
    return reconstruction(pairs(autoencoder, pictures))


@torch.inference_mode()
def pairs(autoencoder: Autoencoder, pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """(original, reconstruction) in [-1, 1], `c h w` each, one picture at a time."""
    autoencoder.eval()
    device = next(autoencoder.parameters()).device
    for index in range(min(len(pictures), MOST_MEASURED)):
        original = pictures.view(index, 0)[1]
        decoded = autoencoder.decode(autoencoder.encode(original[None].to(device)).mean)[0]
        yield original, decoded.float().clamp(-1, 1).cpu()


def _look(
    step: int, trainer: Trainer, first_stage: FirstStage, held: Pictures, lpips: PerceptualDistance | None
) -> None:
    """Metrics and a sheet (originals above their reconstructions) of the held-out pictures, averaged weights.

    The dear ones are of the first `COMPARED` pictures; LPIPS where its weights are known.
    """
    autoencoder = first_stage.autoencoder
    if not trainer.world.main or autoencoder is None:
        return
    with trainer.ema.applied():
        values: dict[str, Any] = measure(autoencoder, held)
        shown = [pair for _, pair in zip(range(SHEET), pairs(autoencoder, held))]
        originals = (held.view(index, 0)[1] for index in range(min(len(held), COMPARED)))
        found = measure_each(first_stage, originals, lpips)
    values |= {"ssim": found.ssim, "lpips": found.lpips, "frechet": found.frechet, "features": found.network}
    mean, square = trainer.shared["latent_moments"]
    values |= {"latent_mean": mean.tolist(), "latent_std": (square - mean.square()).clamp_min(0).sqrt().tolist()}
    trainer.log({f"validation/{name}": value for name, value in values.items() if value is not None})
    sheet = [original for original, _ in shown] + [decoded for _, decoded in shown]
    write_sheet(trainer.run.samples / f"step-{step:08d}.png", sheet, len(shown), alpha=held.alpha)
