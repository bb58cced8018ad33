"""Training a second stage from a recipe: latents cached once, then the U-Net and its conditioners."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkit.applications.generate import draw
from latentkit.applications.pictures import open_data, write_sheet
from latentkit.checkpoints.files import digest, find, load_autoencoder, save_model
from latentkit.data.dataset import Pictures
from latentkit.data.latents import LatentCache, open_latents
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.data.source import Source
from latentkit.diffusion.noise import keyed_batch
from latentkit.errors import InputError
from latentkit.model.conditioners.text import train_tokenizer
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.training import distributed
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.recipe import DiffusionRecipe, resolved
from latentkit.training.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

IDENTITY = "identity"
SHEET = 16
MOST_VALIDATED = 256
VALIDATION_SIGMAS = (0.05, 0.15, 0.5, 1.5, 5.0, 15.0)


def cache_folder() -> Path:
    """Where latents are kept between runs: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentkit" / "latents"


def train_diffusion(recipe: DiffusionRecipe, folder: Path) -> Path:
    """Train (or go on training) in `folder`; returns the model file's path."""
    device = distributed.pick_device(recipe.schedule.device)
    world = distributed.join(device)
    autoencoder, encoder_digest = _first_stage(recipe)
    channels = recipe.data.transform.channels
    if autoencoder is not None and autoencoder.picture_channels != channels:
        raise InputError(
            f"the first stage takes pictures of {autoencoder.picture_channels} channels, the recipe asks for "
            f"{channels}; set data.transform.channels to {autoencoder.picture_channels}",
            exit_code=2,
        )
    cell = autoencoder.downsampling if autoencoder else 1
    train, held = open_data(recipe.data, recipe.seed, cell * 2 ** (len(recipe.network.multipliers) - 1))
    model = build_model(recipe, autoencoder, train.source).to(device)
    data: Pictures | LatentCache = train
    held_data: Pictures | LatentCache = held
    if autoencoder is not None:
        data = _latents(model.first_stage, train, encoder_digest)
        held_data = _latents(model.first_stage, held, encoder_digest)
        model.first_stage.set_statistics(*data.statistics())
    order = Order(len(data), recipe.schedule.batch, recipe.seed, data.buckets)
    loader = Loader(data, order, recipe.schedule.micro_batch, world.rank, world.size, recipe.data.workers)
    model.denoiser.unet.checkpointing = recipe.checkpointing
    objective = DiffusionObjective(model, recipe.loss, recipe.seed)
    validation = next(Loader(held_data, Order(len(held), min(len(held), MOST_VALIDATED), 0)).batches())[0]
    every = recipe.schedule.sample_every
    with RunFolder(folder, resolved(recipe), writes=world.main) as run:
        trainer = Trainer(
            objective,
            loader.batches,
            run,
            schedule=recipe.schedule,
            optimiser=recipe.optimiser,
            averaging=recipe.averaging,
            callbacks=[Callback(every, lambda step, t: _look(step, t, objective, recipe, validation))],
            seed=recipe.seed,
        )
        trainer.train()
        path = folder / "model.safetensors"
        if world.main:
            with trainer.ema.applied():
                save_model(path, model, provenance(recipe, train.source, trainer.step), torch.bfloat16)
        distributed.barrier()
    return path


def provenance(recipe: DiffusionRecipe, source: Source, steps: int) -> dict[str, Any]:
    """Where a model came from, for its file."""
    return {
        "recipe": resolved(recipe),
        "data": source.fingerprint,
        "pictures": len(source),
        "steps": steps,
        "licence": recipe.licence,
        "defaults": recipe.sampling.model_dump(mode="json", exclude={"prompts"}),
    }


def _first_stage(recipe: DiffusionRecipe) -> tuple[FirstStage | None, str]:
    """The trained first stage and its digest; None for the identity."""
    if recipe.first_stage == IDENTITY:
        return None, IDENTITY
    path = find(recipe.first_stage)
    return load_autoencoder(path), digest(path)


def build_model(recipe: DiffusionRecipe, autoencoder: FirstStage | None, source: Source) -> LatentDiffusion:
    """The untrained model, its weights a function of the recipe's seed, its first stage the trained one."""
    state: dict[str, Any] = {}
    text = recipe.text
    if text is not None:
        captions = [item.caption for item in source.items if item.caption]
        if not captions:
            raise InputError(f"the recipe has a text encoder, but no picture of {recipe.data.path} has a caption")
        state["text"] = {"tokenizer": train_tokenizer(captions, text.vocabulary)}
    if recipe.label is not None:
        if not source.classes:
            raise InputError(f"the recipe has classes, but no picture of {recipe.data.path} has a label")
        state["label"] = {"classes": source.classes}
    config = autoencoder.autoencoder.config if autoencoder and autoencoder.autoencoder else None
    size = recipe.data.transform.size
    architecture = Architecture(
        network=recipe.network,
        first_stage=config,
        picture_channels=recipe.data.transform.channels,
        size=(size, size),
        schedule=recipe.noise,
        prediction=recipe.prediction,
        learned_variance=recipe.learned_variance,
        text=text,
        label=recipe.label,
    )
    torch.manual_seed(recipe.seed)
    model = LatentDiffusion(fit_network(architecture), state)
    if autoencoder is not None:
        model.first_stage.load_state_dict(autoencoder.state_dict())
    model.first_stage.requires_grad_(False)
    return model


@torch.inference_mode()
def _latents(first_stage: FirstStage, pictures: Pictures, encoder_digest: str) -> LatentCache:
    device = first_stage.latent_mean.device
    return open_latents(
        cache_folder(), pictures, lambda pixels: first_stage.moments(pixels.to(device)).cpu(), encoder_digest
    )


@torch.inference_mode()
def validate(objective: DiffusionObjective, batch: dict[str, Any]) -> dict[str, float]:
    """Loss on held-out pictures with fixed noise, per noise level and on average."""
    first_stage = objective.model.first_stage
    field = "moments" if "moments" in batch else "pixels"
    device = first_stage.latent_mean.device
    values: dict[str, float] = {}
    for level, sigma in enumerate(VALIDATION_SIGMAS):
        total = 0.0
        for rows in torch.split(torch.arange(len(batch["draw"])), 64):
            x0 = batch[field][rows].to(device)
            x0 = first_stage.from_moments(x0) if field == "moments" else x0
            eps = keyed_batch(rows, x0.shape[1:], level, "validation").to(device)
            part = {"caption": [batch["caption"][i] for i in rows], "label": batch["label"][rows]}
            told = {n: list(objective.model.conditioner(n).from_batch(part)) for n in objective.model.conditioners}
            sigmas = torch.full((len(rows),), sigma, dtype=torch.float64)
            total += float(objective.errors(x0, sigmas, eps, told).sum())
        values[f"validation/sigma_{sigma:g}"] = total / len(batch["draw"])
    return values | {"validation/loss": sum(values.values()) / len(values)}


def sample_prompts(model: LatentDiffusion, recipe: DiffusionRecipe, captions: list[str]) -> list[str | None]:
    """What the sample sheets ask for: the recipe's prompts, else held-out captions, the classes, or nothing."""
    words: list[str] = list(recipe.sampling.prompts)
    if not words and recipe.text is not None:
        words = [caption for caption in captions if caption]
    elif not words and recipe.label is not None:
        words = list(model.state()["label"]["classes"])
    return [*words[:SHEET]] or [None] * SHEET


def _look(
    step: int, trainer: Trainer, objective: DiffusionObjective, recipe: DiffusionRecipe, batch: dict[str, Any]
) -> None:
    """Validation loss and a sheet of samples, with the averaged weights."""
    if not trainer.world.main:
        return
    model = objective.model
    model.eval()
    precise = recipe.schedule.precision == "float32"
    with trainer.ema.applied(), torch.autocast(trainer.device.type, torch.bfloat16, enabled=not precise):
        trainer.log(validate(objective, batch))
        sheet = list(_samples(model, recipe, batch["caption"]))
    write_sheet(trainer.run.samples / f"step-{step:08d}.png", sheet)


def _samples(model: LatentDiffusion, recipe: DiffusionRecipe, captions: list[str]) -> Iterator[Tensor]:
    """One picture per sample prompt, seeds 0, 1, 2 ..."""
    prompts = sample_prompts(model, recipe, captions)
    yield from draw(model, provenance_defaults(recipe), prompts, range(len(prompts)))


def provenance_defaults(recipe: DiffusionRecipe) -> dict[str, Any]:
    """The sampling settings as a request takes them."""
    return recipe.sampling.model_dump(mode="json", exclude={"prompts"})
