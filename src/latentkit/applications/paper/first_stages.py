"""The paper's table 8 in miniature: first stages of every downsampling, trained for equal time and compared."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from latentkit.applications.fit.measure import measure_autoencoder
from latentkit.applications.paper.arms import (
    Arm,
    Asked,
    Plan,
    announce,
    costs,
    data_recipe,
    load,
    planned,
    save,
    times,
)
from latentkit.applications.paper.table import Columns, Row, kept, markdown, write
from latentkit.applications.pictures import open_data, write_sheet
from latentkit.applications.stages.train import train
from latentkit.checkpoints.files import RUN_MODEL, load_autoencoder
from latentkit.checkpoints.storage.digest import Digest
from latentkit.data.dataset import Pictures
from latentkit.data.source import open_source, track
from latentkit.errors import InputError
from latentkit.evaluation.first_stage import measure
from latentkit.evaluation.metrics.features import NETWORK
from latentkit.evaluation.reconstruction import reconstruct
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.training.ema import Averaging
from latentkit.training.first_stage.autoencoder import ReconstructionLoss
from latentkit.training.first_stage.codebook import CodebookLoss
from latentkit.training.optimizers import Optimiser
from latentkit.training.recipe import AutoencoderRecipe, DataRecipe
from latentkit.training.run.interrupt import told
from latentkit.training.run.progress import quiet
from latentkit.training.trainer import Schedule

COMMAND = "paper first-stages"
CHANNELS = 32
MULTIPLIERS = {2: (1,), 4: (1, 2), 8: (1, 2, 4), 16: (1, 2, 4, 4)}
LATENTS = {"kl": {2: 2, 4: 3, 8: 4, 16: 16}, "vq": {2: 2, 4: 3, 8: 4, 16: 8}}
"""Latent channels by bottleneck and downsampling, as in the paper's table 8."""
CODES = {2: 2048, 4: 8192, 8: 16384, 16: 16384}
TRAINING = 0.85
"""Of the minutes, that all arms train; the rest is for measuring speed and pictures."""
MOST = 512  # held-out pictures
SHEET = 12
FIGURES = "figures.json"


def networks(kind: str) -> dict[int, AutoencoderConfig]:
    """The networks of a bottleneck by downsampling: those of more have the levels of those of less, and one below."""
    return {
        factor: AutoencoderConfig(
            latent_channels=LATENTS[kind][factor],
            channels=CHANNELS,
            multipliers=multipliers,
            blocks=1,
            stem=2,
            attention=False,
            codes=CODES[factor] if kind == "vq" else None,
        )
        for factor, multipliers in MULTIPLIERS.items()
    }


def recipes(data: DataRecipe, seed: int, kinds: Sequence[str]) -> dict[str, AutoencoderRecipe]:
    """Every arm by its name, their lengths to be found."""
    return {
        f"{kind}-f{factor}": AutoencoderRecipe(
            stage="autoencoder",
            name=f"{kind}-f{factor}",
            seed=seed,
            data=data,
            network=network,
            loss=ReconstructionLoss(kl=1e-4, codebook=CodebookLoss(running_mean=0.99)),
            optimiser=Optimiser(name="muon", lr=2e-3, weight_decay=0.01, warmup=50, decay=0.4),
            averaging=Averaging(decay=0.995, power=()),
            schedule=Schedule(steps=1, batch=16, precision="bf16", sample_every=None),
        )
        for kind in kinds
        for factor, network in networks(kind).items()
    }


@told()
def first_stages(
    data: str, folder: Path, *, minutes: float, size: int = 64, seed: int = 0, kinds: Sequence[str] = ("kl", "vq")
) -> Path:
    """Train and measure every first stage in `folder`; returns the path of the table. The same call goes on.

    `minutes` of computing are shared equally. Errors: InputError, also for a folder made by other settings.
    """
    if size % max(MULTIPLIERS):
        raise InputError(f"size {size} is no multiple of {max(MULTIPLIERS)}, the largest downsampling", exit_code=2)
    source = open_source(data)
    command = f"{COMMAND} ({', '.join(kinds)})"
    asked = Asked(command=command, data=data, pictures=source.fingerprint, size=size, minutes=minutes, seed=seed)
    plan = load(folder, asked)
    if plan is None:
        plan = _plan(folder, asked, recipes(data_recipe(data, source, size), seed, kinds))
        save(folder, plan)
    rows = []
    for number, arm in enumerate(plan.arms):
        announce(plan, number)
        rows.append(_finished(arm, folder / arm.name, plan))
    _sheet(plan, folder)
    lead = (
        f"First stages trained for {plan.seconds:.0f} thread-seconds each on pictures of {size} px, and measured on "
        f"{rows[0]['pictures']} held-out ones; rFD is the Frechet distance in features of {NETWORK}."
    )
    return write(folder, plan, rows, f"{lead}\n\n{markdown(COLUMNS, rows)}", network=NETWORK)


def _plan(folder: Path, asked: Asked, found: Mapping[str, AutoencoderRecipe]) -> Plan:
    """Measure every arm and give each as many steps as fit into its share."""
    measured = costs(folder, asked, found, lambda name: measure_autoencoder(found[name], _data(found[name])[0]))
    return planned(asked, TRAINING, found, measured)


def _data(recipe: AutoencoderRecipe) -> tuple[Pictures, Pictures]:
    return open_data(recipe.data, recipe.seed, recipe.network.downsampling)


def _held(recipe: AutoencoderRecipe, most: int) -> Iterator[Tensor]:
    """Held-out pictures, evenly taken."""
    held = _data(recipe)[1]
    count = min(most, len(held))
    yield from (held.view(place * len(held) // count, 0)[1] for place in range(count))


def _finished(arm: Arm, run: Path, plan: Plan) -> Row:
    """Train an arm and measure it, or take what is there."""
    model = train(arm.recipe, run)
    return kept(run / FIGURES, lambda: _figures(arm, model)) | times(arm, run, plan)


def _figures(arm: Arm, model: Path) -> Row:
    """What an arm's model does to held-out pictures."""
    recipe, stage = arm.recipe, load_autoencoder(model)
    assert isinstance(recipe, AutoencoderRecipe)
    assert stage.autoencoder is not None
    found = measure(stage, track(_held(recipe, MOST), MOST, f"reconstructing by {arm.name}", not quiet()))
    network, side = recipe.network, recipe.data.transform.size // stage.downsampling
    return {
        "name": arm.name,
        "bottleneck": "VQ" if network.codes else "KL",
        "downsampling": stage.downsampling,
        "channels": network.latent_channels,
        "numbers": network.latent_channels * side * side,
        "parameters": sum(p.numel() for p in stage.autoencoder.parameters()),
        "digest": Digest(model)(),
        **found.document(),
    }


def _sheet(plan: Plan, folder: Path) -> None:
    """Held-out pictures, and below them what each arm gives back, a row each."""
    first = plan.arms[0].recipe
    assert isinstance(first, AutoencoderRecipe)
    originals = list(_held(first, SHEET))
    sheet = list(originals)
    for arm in plan.arms:
        stage = load_autoencoder(folder / arm.name / RUN_MODEL)
        sheet += [reconstruct(stage, original).picture for original in originals]
    write_sheet(folder / "reconstructions.png", sheet, len(originals))


def _codes(row: Row) -> str:
    return f"{row['codes']['chosen']} of {row['codes']['codes']}" if row["codes"] else "-"


COLUMNS: Columns = {
    "first stage": lambda row: f"{row['bottleneck']} f{row['downsampling']} c{row['channels']}",
    "numbers a picture": lambda row: f"{row['numbers']:,}",
    "PSNR, dB": lambda row: f"{row['psnr']:.2f}",
    "SSIM": lambda row: f"{row['ssim']:.4f}",
    "rFD": lambda row: f"{row['frechet']:.3f}" if row["frechet"] is not None else "-",
    "codes chosen": _codes,
    "perplexity": lambda row: f"{row['codes']['perplexity']:.0f}" if row["codes"] else "-",
    "seconds": lambda row: f"{row['computed']:.0f}",
    "pictures seen": lambda row: f"{row['trained_on']:,}",
    "pictures/s": lambda row: f"{row['training_speed']:.0f}",
}
