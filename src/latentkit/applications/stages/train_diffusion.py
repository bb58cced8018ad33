"""Training a second stage from a recipe: latents cached once, then the U-Net and its conditioners."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentkit import __version__
from latentkit.applications.generate import draw
from latentkit.applications.pictures import open_data, write_sheet
from latentkit.checkpoints.files import save_model
from latentkit.data.dataset import Pictures
from latentkit.data.latents import LatentCache, cache_folder, open_latents
from latentkit.data.loader import Batch, Loader, Samples, collate
from latentkit.data.order import Order
from latentkit.data.range import check_same
from latentkit.data.source import Source
from latentkit.diffusion.noise import keyed_batch
from latentkit.errors import InputError
from latentkit.evaluation.first_stage import open_first_stage
from latentkit.model.conditioners.text import TextConditioner, train_tokenizer
from latentkit.model.first_stage import FirstStage
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.autoencoder import Autoencoder
from latentkit.training import distributed
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.recipe import DiffusionRecipe, resolved
from latentkit.training.run.progress import say
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

IDENTITY = "identity"
SHEET = 16
MOST_VALIDATED = 256
AT_ONCE = 64
VALIDATION_SIGMAS = (0.05, 0.15, 0.5, 1.5, 5.0, 15.0)


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
    train, held = open_data(recipe.data, recipe.seed, multiple(recipe, cell))
    model = build_model(recipe, autoencoder, train.source, train.shapes[train.commonest]).to(device)
    if world.main:
        _say_cut(model, train.source)
    data: Pictures | LatentCache = train
    held_data: Pictures | LatentCache = held
    if autoencoder is not None:
        data = _latents(model.first_stage, train, encoder_digest)
        held_data = _latents(model.first_stage, held, encoder_digest)
        mean, std = data.statistics()
        if not recipe.whitening:
            mean, std = torch.zeros_like(mean), _one_deviation(mean, std)
        model.first_stage.set_statistics(mean, std)
    order = Order(len(data), recipe.schedule.batch, recipe.seed, data.buckets)
    loader = Loader(
        data, order, recipe.schedule.micro_batch, world.rank, world.size, recipe.data.workers, recipe.data.keywords
    )
    model.denoiser.unet.checkpointing = recipe.checkpointing
    objective = DiffusionObjective(model, recipe.loss, recipe.seed)
    every = recipe.schedule.sample_every
    validation = validation_batches(held_data, held) if every else []

    def look(step: int, trainer: Trainer) -> None:
        _look(step, trainer, objective, recipe, validation, train.alpha)

    with RunFolder(folder, resolved(recipe), writes=world.main) as run:
        trainer = Trainer(
            objective,
            loader.batches,
            run,
            schedule=recipe.schedule,
            optimiser=recipe.optimiser,
            averaging=recipe.averaging,
            callbacks=[Callback(every, look)] if every else (),
            seed=recipe.seed,
        )
        trainer.train()
        path = folder / "model.safetensors"
        if world.main:
            with trainer.ema.applied():
                save_model(path, model, provenance(recipe, train, trainer.step), torch.bfloat16)
        distributed.barrier()
    return path


def provenance(recipe: DiffusionRecipe, train: Pictures, steps: int) -> dict[str, Any]:
    """Where a model came from, for its file."""
    return {
        "recipe": resolved(recipe),
        "data": train.source.fingerprint,
        "pictures": len(train),
        "alpha": train.alpha,
        "steps": steps,
        "licence": recipe.licence,
        "versions": {"latentkit": __version__, "torch": str(torch.__version__)},
        "defaults": sampling_defaults(recipe),
    }


def _one_deviation(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The deviation of all channels together, `c` times (Rombach et al. 2022, G)."""
    return ((std.square() + mean.square()).mean() - mean.mean().square()).sqrt().expand_as(std)


def _say_cut(model: LatentDiffusion, source: Source) -> None:
    """Tell how many captions are longer than what the text encoder reads."""
    text = dict(model.conditioners.items()).get("text")
    if isinstance(text, TextConditioner):
        captions = [item.caption for item in source.items if item.caption]
        long = sum(text.count(caption) > text.room for caption in captions)
        if long:
            say(f"{long} of {len(captions)} captions are longer than {text.room} tokens, which is what is read of each")


def _first_stage(recipe: DiffusionRecipe) -> tuple[FirstStage | None, str]:
    """The trained first stage and its encoder's digest; None for the identity."""
    if recipe.first_stage == IDENTITY:
        return None, IDENTITY
    opened = open_first_stage(recipe.first_stage, "cpu")
    first_stage = opened.first_stage
    check_same(f"first_stage {recipe.first_stage}", opened.values, recipe.data.transform.range)
    return first_stage, IDENTITY if first_stage.autoencoder is None else encoder_digest(first_stage.autoencoder)


def encoder_digest(autoencoder: Autoencoder) -> str:
    """sha256 of what latents depend on: shape and encoder, so that a decoder trained further leaves them valid."""
    found = hashlib.sha256(repr(autoencoder.config).encode())
    for name, value in autoencoder.state_dict().items():
        if name.startswith(("encoder.", "to_moments.")):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def multiple(recipe: DiffusionRecipe, cell: int) -> int:
    """What the sides of pictures must be multiples of, for a first stage of `cell` pixels a latent cell."""
    return cell << (len(recipe.network.multipliers) - 1)


def build_model(
    recipe: DiffusionRecipe, autoencoder: FirstStage | None, source: Source, size: tuple[int, int]
) -> LatentDiffusion:
    """The untrained model, its weights a function of the recipe's seed, its first stage the trained one.

    `size` is the height and width that it draws unless told otherwise.
    """
    state: dict[str, Any] = {}
    if recipe.text is not None or recipe.clip is not None:
        captions = [item.caption for item in source.items if item.caption]
        if recipe.data.keywords:
            captions += [word for item in source.items for word in item.keywords]
        if not captions:
            raise InputError(f"the recipe has a text encoder, but no picture of {recipe.data.path} has a caption")
        if recipe.text is not None:
            state["text"] = {"tokenizer": train_tokenizer(captions, recipe.text.vocabulary)}
    if recipe.label is not None:
        if not source.classes:
            raise InputError(f"the recipe has classes, but no picture of {recipe.data.path} has a label")
        state["label"] = {"classes": source.classes}
    config = autoencoder.autoencoder.config if autoencoder and autoencoder.autoencoder else None
    architecture = Architecture(
        network=recipe.network,
        first_stage=config,
        picture_channels=recipe.data.transform.channels,
        size=size,
        schedule=recipe.noise,
        prediction=recipe.prediction,
        learned_variance=recipe.learned_variance,
        text=recipe.text,
        label=recipe.label,
        clip=recipe.clip,
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


def validation_batches(data: Samples, pictures: Pictures) -> list[Batch]:
    """Up to 256 pictures, evenly taken, in batches of one shape; `data` is them or their latents."""
    count = len(pictures)
    chosen = [i * count // MOST_VALIDATED for i in range(MOST_VALIDATED)] if count > MOST_VALIDATED else range(count)
    alike: dict[int, list[int]] = {}
    for index in chosen:
        alike.setdefault(pictures.bucket_of(index), []).append(index)
    parts = [rows[at : at + AT_ONCE] for rows in alike.values() for at in range(0, len(rows), AT_ONCE)]
    return [collate(data, 0, rows, [data.take(index, index) for index in rows]) for rows in parts]


@torch.inference_mode()
def validate(objective: DiffusionObjective, batches: Sequence[Batch]) -> dict[str, float]:
    """Loss on held-out pictures with noise fixed by their draws, per noise level and on average."""
    model = objective.model
    values: dict[str, float] = {}
    for level, sigma in enumerate(VALIDATION_SIGMAS):
        total = 0.0
        for batch in batches:
            clean = batch["moments"] if "moments" in batch else batch["pixels"]
            x0 = clean.to(model.first_stage.latent_mean.device)
            x0 = model.first_stage.from_moments(x0) if "moments" in batch else x0
            eps = keyed_batch(batch["draw"], x0.shape[1:], level, "validation").to(x0.device)
            told = {name: list(model.conditioner(name).from_batch(batch)) for name in model.conditioners}
            sigmas = torch.full((len(x0),), sigma, dtype=torch.float64)
            total += float(objective.errors(x0, sigmas, eps, told).sum())
        values[f"validation/sigma_{sigma:g}"] = total / sum(len(batch["draw"]) for batch in batches)
    return values | {"validation/loss": sum(values.values()) / len(values)}


def sample_prompts(model: LatentDiffusion, recipe: DiffusionRecipe, captions: list[str]) -> list[str | None]:
    """What the sample sheets ask for: the recipe's prompts, else held-out captions, the classes, or nothing."""
    words: list[str] = list(recipe.sampling.prompts)
    if not words and "text" in model.conditioners:
        words = [caption for caption in captions if caption]
    elif not words and recipe.label is not None:
        words = list(model.state()["label"]["classes"])
    return [*words[:SHEET]] or [None] * SHEET


def _look(
    step: int,
    trainer: Trainer,
    objective: DiffusionObjective,
    recipe: DiffusionRecipe,
    batches: Sequence[Batch],
    alpha: bool,
) -> None:
    """Validation loss and a sheet of samples, the last channel perhaps `alpha`, with the averaged weights."""
    if not trainer.world.main:
        return
    model = objective.model
    model.eval()
    prompts = sample_prompts(model, recipe, [caption for batch in batches for caption in batch["caption"]])
    precise = recipe.schedule.precision == "float32"
    with trainer.ema.applied(), torch.autocast(trainer.device.type, torch.bfloat16, enabled=not precise):
        trainer.log(validate(objective, batches))
        trainer.log({f"validation/{name}": value for name, value in objective.bound(batches[0]).items()})
        sheet = list(draw(model, sampling_defaults(recipe), prompts, range(len(prompts))))
    write_sheet(trainer.run.samples / f"step-{step:08d}.png", sheet, alpha=alpha)


def sampling_defaults(recipe: DiffusionRecipe) -> dict[str, Any]:
    """The sampling settings as a request takes them."""
    return recipe.sampling.model_dump(mode="json", exclude={"prompts"})
