"""Training a first stage from a recipe: pictures in, one autoencoder file and its measurements out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkit.applications.pictures import open_data, write_sheet
from latentkit.checkpoints.files import save_autoencoder
from latentkit.data.dataset import Pictures
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.errors import InputError
from latentkit.evaluation.reconstruction import reconstruction
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import Autoencoder
from latentkit.training import distributed
from latentkit.training.autoencoder import AutoencoderObjective
from latentkit.training.recipe import AutoencoderRecipe, resolved
from latentkit.training.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

SHEET = 12
MOST_MEASURED = 512


def train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> Path:
    """Train (or go on training) in `folder`; returns the model file's path."""
    channels = recipe.data.transform.channels
    if recipe.network.picture_channels != channels:
        raise InputError(
            f"the autoencoder has picture_channels: {recipe.network.picture_channels}, the data channels: {channels}; "
            "make them equal",
            exit_code=2,
        )
    train, held = open_data(recipe.data, recipe.seed, recipe.network.downsampling)
    torch.manual_seed(recipe.seed)
    first_stage = FirstStage(recipe.network, channels)
    autoencoder = first_stage.autoencoder
    assert autoencoder is not None
    world = distributed.join(distributed.pick_device(recipe.schedule.device))
    order = Order(len(train), recipe.schedule.batch, recipe.seed, train.buckets)
    loader = Loader(train, order, recipe.schedule.micro_batch, world.rank, world.size, recipe.data.workers)
    with RunFolder(folder, resolved(recipe), writes=world.main) as run:
        trainer = Trainer(
            AutoencoderObjective(autoencoder, recipe.loss, recipe.seed),
            loader.batches,
            run,
            schedule=recipe.schedule,
            optimiser=recipe.optimiser,
            averaging=recipe.averaging,
            callbacks=[Callback(recipe.schedule.sample_every, lambda step, t: _look(step, t, autoencoder, held))],
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
                    "licence": recipe.licence or "unstated",
                    "reconstruction": measure(autoencoder, held),
                }
                save_autoencoder(path, first_stage, provenance)
        distributed.barrier()
    return path


def measure(autoencoder: Autoencoder, pictures: Pictures) -> dict[str, float]:
    """Reconstruction figures of an autoencoder on pictures, in float32."""
    return reconstruction(_pairs(autoencoder, pictures))


@torch.inference_mode()
def _pairs(autoencoder: Autoencoder, pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """(original, reconstruction) in [-1, 1], `c h w` each, one picture at a time."""
    autoencoder.eval()
    device = next(autoencoder.parameters()).device
    for index in range(min(len(pictures), MOST_MEASURED)):
        original = pictures.view(index, 0)[1]
        decoded = autoencoder.decode(autoencoder.encode(original[None].to(device)).mean)[0]
        yield original, decoded.float().clamp(-1, 1).cpu()


def _look(step: int, trainer: Trainer, autoencoder: Autoencoder, held: Pictures) -> None:
    """Metrics and a sheet (originals above their reconstructions) of the held-out pictures, averaged weights."""
    if not trainer.world.main:
        return
    with trainer.ema.applied():
        values: dict[str, Any] = measure(autoencoder, held)
        shown = [pair for _, pair in zip(range(SHEET), _pairs(autoencoder, held))]
    trainer.log({f"validation/{name}": value for name, value in values.items()})
    square = [pair for pair in shown if pair[0].shape == shown[0][0].shape]
    sheet = [original for original, _ in square] + [decoded for _, decoded in square]
    write_sheet(trainer.run.samples / f"step-{step:08d}.png", sheet, len(square))
