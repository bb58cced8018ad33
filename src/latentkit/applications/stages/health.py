"""The health page of a first stage's run: what it gives back, how its latents lie, and what is wrong where it is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from latentkit.applications.pictures import open_data
from latentkit.applications.stages.train_autoencoder import OWN_PERCEPTUAL
from latentkit.checkpoints.files import RUN_MODEL, load_autoencoder
from latentkit.data.dataset import Pictures
from latentkit.data.pictures import to_png, visible
from latentkit.data.source import track
from latentkit.errors import InputError
from latentkit.evaluation import report
from latentkit.evaluation.first_stage import Codes, chosen_codes, usage
from latentkit.evaluation.journal import Curves, curves
from latentkit.evaluation.latents import Statistics, spectrum, statistics
from latentkit.evaluation.metrics.features import NETWORK
from latentkit.evaluation.metrics.similarity import ssim
from latentkit.evaluation.reconstruction import psnr, reconstruct
from latentkit.evaluation.report import Figure
from latentkit.model.first_stage import FirstStage
from latentkit.training.first_stage.autoencoder import DIFFERENCES
from latentkit.training.recipe import AutoencoderRecipe, read_recipe, resolved
from latentkit.training.run.store import Damaged, FileCalls, Store, replace_file

PAGE = "health.html"
MOST = 128
"""Held-out pictures that are looked at."""
EXTREMES = 6
"""Reconstructions that are shown, of the worst and of the best."""
A_CHART = 5
"""Channels in one histogram."""
MOST_CHANNELS = 20
TAIL = 0.1
"""Share of a curve that its end is the mean of."""

LITTLE = 24.0  # dB
GAP = 4.0  # dB
COST = 1.0  # dB that a critic may cost
WON, LOST = 0.95, 0.55  # of verdicts that are right
SLIGHT = 1e-3  # of the largest adaptive weight
SPARSE, FEW = 0.1, 0.5  # perplexity, and chosen codes, by codes
CELLS = 4  # a code, fewer of which say nothing of its use
DEAD = 0.02  # of the largest deviation of a channel
ALIKE = 0.8  # correlation
OUTLIERS = 20.0  # excess kurtosis
ROUGH = 0.5  # power of the highest quarter of frequencies by that of the lowest


class Found(NamedTuple):
    """What held-out pictures showed: rows are (PSNR, SSIM, place), worst first."""

    rows: list[tuple[float, float, int]]
    latents: Statistics
    codes: Codes | None
    before: list[tuple[float, float]]
    after: list[tuple[float, float]]
    """Spectra of the pictures and of what came back."""


def write_health(run: Path, progress: bool = True) -> Path:
    """Write the page into the run's folder (a fit's: into its first stage's), and return its path.

    The weights are the finished model's, else the newest whole checkpoint's, averaged; without any, or without the
    pictures, the page says so and shows the curves. Errors: InputError for a folder that is no first stage's run.
    """
    folder = _folder(run)
    recipe = read_recipe(str(folder / "recipe.yaml"), [])
    if not isinstance(recipe, AutoencoderRecipe):
        raise InputError(f"{folder} is a run of the second stage; the page is of first stages'", exit_code=2)
    known = curves(folder / "metrics.jsonl")
    notes, sections = [], []
    found = None
    try:
        first_stage, origin = _weights(folder, recipe)
        held = open_data(recipe.data, recipe.seed, recipe.network.downsampling)[1]
        found = look(first_stage, held, progress)
        sections = [("Reconstructions", _extremes(first_stage, held, found.rows))]
        sections.append(("In figures", _figures(found, origin)))
    except InputError as error:
        notes.append(f"Nothing could be reconstructed: {error}")
    sections.insert(0, ("What to make of it", report.verdict([*notes, *verdict(recipe, known, found)])))
    sections += _learning(recipe, known)
    if found is not None:
        sections.append(("Latents", _latents(found, known)))
    sections.append(("Recipe", report.folded("recipe.yaml", yaml.safe_dump(resolved(recipe), sort_keys=False))))
    text = report.page(f"{recipe.name}: first stage", f"The run in {folder}, by latentkit report.", sections)
    replace_file(FileCalls(), folder / PAGE, [text.encode()])
    return folder / PAGE


def _folder(run: Path) -> Path:
    if run.name == OWN_PERCEPTUAL and (run.parent / "recipe.yaml").is_file():
        raise InputError(f"{run} is the run of a loss's own network; name the run it is in: {run.parent}", exit_code=2)
    for folder in (run, run / "autoencoder"):
        if (folder / "recipe.yaml").is_file():
            return folder
    said = "holds no recipe.yaml; name the folder of a run, such as runs/NAME" if run.is_dir() else "is no folder"
    inside = sorted(str(path.parent) for path in run.glob("*/recipe.yaml"))
    if inside:
        said = f"is no run, and holds {len(inside)}; name one: {', '.join(inside[:8])}" + " ..." * (len(inside) > 8)
    raise InputError(f"{run} {said}", exit_code=2)


def _weights(folder: Path, recipe: AutoencoderRecipe) -> tuple[FirstStage, str]:
    """The run's first stage and where it is from."""
    if (folder / RUN_MODEL).is_file():
        return load_autoencoder(folder / RUN_MODEL), "the finished model"
    store = Store(folder / "checkpoints")
    for step in reversed(store.steps() if store.folder.is_dir() else []):
        try:
            tables = store.read(step).tables
        except Damaged:
            continue
        weights = {name.removeprefix("autoencoder."): value for name, value in tables["weights"].items()}
        first_stage = FirstStage(recipe.network, recipe.network.picture_channels)
        assert first_stage.autoencoder is not None
        wanted = first_stage.autoencoder.state_dict()
        averaged = {**weights, **tables["ema"]}
        first_stage.autoencoder.load_state_dict({name: averaged[name] for name in wanted})
        return first_stage.eval().requires_grad_(False), f"the averaged weights of step {step}"
    raise InputError("the run has no model and no whole checkpoint yet")


def look(first_stage: FirstStage, pictures: Pictures, progress: bool = False) -> Found:
    """Pass at most `MOST` pictures, evenly taken, through a first stage."""
    take, autoencoder = min(MOST, len(pictures)), first_stage.autoencoder
    assert autoencoder is not None
    rows: list[tuple[float, float, int]] = []
    latents: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    chosen: Counter[int] = Counter()
    for number in track(range(take), take, "reconstructing", progress):
        place = number * len(pictures) // take
        original = pictures.view(place, 0)[1]
        passed = reconstruct(first_stage, original)
        rows.append((psnr(original, passed.picture), ssim(original, passed.picture), place))
        latents.append(passed.latents)
        before.append(original)
        after.append(passed.picture)
        codes = chosen_codes(autoencoder, passed.latents)
        chosen.update(codes.tolist() if codes is not None else [])
    return Found(
        sorted(rows),
        statistics(latents),
        usage(autoencoder, chosen),
        spectrum(before),
        spectrum(after),
    )


def verdict(recipe: AutoencoderRecipe, known: Curves, found: Found | None) -> list[str]:
    """What is wrong, in plain words with what helps; one sentence that says so where nothing is."""
    said = [*_of_training(recipe, known), *(_of_latents(recipe, found) if found else ())]
    if found:
        quality = _mean([row[0] for row in found.rows])
        if quality < LITTLE:
            said.insert(0, f"Pictures come back poorly ({quality:.1f} dB): train longer, or use less downsampling.")
        training = _end(_curve(known, "psnr"))
        if training is not None and training - quality > GAP:
            said.append(
                f"It knows its training pictures by heart: they come back with {training:.1f} dB, others with "
                f"{quality:.1f}. More pictures, or a smaller network, help."
            )
    return said or ["Nothing stands out."]


def _of_training(recipe: AutoencoderRecipe, known: Curves) -> list[str]:
    said = []
    settings = recipe.loss.adversarial
    if attempts := known.get("attempt"):
        said.append(
            f"The run collapsed and went back to a checkpoint, {len(attempts)} times (first at step "
            f"{attempts[0][0]:.0f}); each time the critic's weight was halved. A later start or a smaller weight help."
        )
    told, weight = _end(_curve(known, "told_apart")), _end(_curve(known, "adaptive_weight"))
    if settings is not None and told is not None:
        if told > WON:
            said.append(
                f"The discriminator is winning: {told:.0%} of its verdicts are right, so it hardly teaches any more. "
                "A lower learning rate of its optimiser, more lecam or r1, or fewer layers help."
            )
        if told < LOST:
            said.append(
                f"The discriminator is guessing: {told:.0%} of its verdicts are right, and a half would be by chance. "
                "A longer warmup, a higher learning rate or a wider network help it."
            )
        if weight is not None and weight < SLIGHT * settings.most:
            said.append(f"The discriminator counts for nothing: its adaptive weight is {weight:.2g}.")
        quality = _curve(known, "validation/psnr")
        earlier = [value for step, value in quality if step < settings.start]
        if earlier and max(earlier) - quality[-1][1] > COST:
            said.append(
                f"Since the discriminator counts, PSNR fell from {max(earlier):.1f} to {quality[-1][1]:.1f} dB; up to "
                f"{COST:.0f} dB is usual. A smaller adversarial weight helps."
            )
    return said


def _of_latents(recipe: AutoencoderRecipe, found: Found) -> list[str]:
    said = []
    codes, latents = found.codes, found.latents
    if codes is not None and _collapsed(codes):
        what, helps = "levels have", "Fewer help."
        if recipe.network.codes:
            what, helps = "codebook has", "Fewer codes, revive: true or a running_mean of 0.99 help."
        said.append(
            f"The {what} collapsed: {codes.chosen} of {codes.codes} codes are chosen, used like "
            f"{codes.perplexity:.0f} (perplexity). {helps}"
        )
    deviation = latents.std / latents.std.max().clamp_min(1e-12)
    dead = (deviation < DEAD).nonzero().flatten().tolist()
    if dead:
        said.append(
            f"Latents are not white: channels {_listed(dead)} hardly vary (less than {DEAD:.0%} of the widest), and "
            "would be noise once they are scaled for the second stage. Fewer latent_channels or less kl help."
        )
    apart = latents.correlation.abs() - torch.eye(len(latents.std), dtype=latents.correlation.dtype)
    if float(apart.max()) > ALIKE:
        a, b = divmod(int(apart.argmax()), len(latents.std))
        said.append(
            f"Latents are not white: channels {a} and {b} say much the same (correlation "
            f"{float(latents.correlation[a, b]):.2f}). Fewer latent_channels help."
        )
    wild = (latents.kurtosis > OUTLIERS).nonzero().flatten().tolist()
    if wild:
        said.append(
            f"Latents are not white: channels {_listed(wild)} have far outliers (kurtosis "
            f"{float(latents.kurtosis.max()):.0f}; a normal one has 0), which samplers meet badly. More kl helps."
        )
    roughness = _roughness(latents.spectrum)
    if roughness > ROUGH:
        said.append(
            f"Latents are as rough as noise: the finest quarter of their spectrum has {roughness:.0%} of the power of "
            "the coarsest. The second stage learns smooth latents better: try equivariance, or more kl."
        )
    return said


def _collapsed(codes: Codes) -> bool:
    few = codes.chosen < FEW * codes.codes or codes.perplexity < SPARSE * codes.codes
    return few and codes.cells >= CELLS * codes.codes


def _roughness(points: Sequence[tuple[float, float]]) -> float:
    quarter = max(1, len(points) // 4)
    low, high = (_mean([power for _, power in part]) for part in (points[:quarter], points[-quarter:]))
    return high / low if low else 0.0


def _listed(channels: Sequence[int]) -> str:
    return ", ".join(map(str, channels[:8])) + (f" and {len(channels) - 8} more" if len(channels) > 8 else "")


def _curve(known: Curves, name: str) -> list[tuple[float, float]]:
    """A curve by its name, also where a run of two turns puts the turn's before it."""
    return next((known[key] for key in (name, f"autoencoder/{name}", f"critic/{name}") if key in known), [])


def _end(points: Sequence[tuple[float, float]]) -> float | None:
    """The mean of a curve's last tenth."""
    return _mean([value for _, value in points[-max(1, round(TAIL * len(points))) :]]) if points else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _extremes(first_stage: FirstStage, held: Pictures, rows: Sequence[tuple[float, float, int]]) -> str:
    """The worst and the best reconstructions, each beside its picture."""
    parts = []
    for title, chosen in (("The worst", rows[:EXTREMES]), ("The best", rows[::-1][:EXTREMES])):
        figures = []
        for quality, _, place in chosen:
            original = held.view(place, 0)[1]
            other = reconstruct(first_stage, original).picture
            name = held.source.items[place].key
            panes = [to_png(visible(x, held.alpha)) for x in (original, other)]
            figures.append((Figure(panes[0], name), Figure(panes[1], f"{quality:.1f} dB")))
        parts.append(report.paragraph(f"{title}, each picture beside its reconstruction:") + report.pairs(figures))
    return "".join(parts)


def _figures(found: Found, origin: str) -> str:
    quality, similarity = ([row[i] for row in found.rows] for i in (0, 1))
    rows = [
        ("weights", origin),
        ("held-out pictures", len(found.rows)),
        ("PSNR", f"{_mean(quality):.2f} dB, {quality[0]:.2f} at worst"),
        ("SSIM", f"{_mean(similarity):.4f}, {min(similarity):.4f} at worst"),
    ]
    if found.codes is not None:
        codes, chosen, perplexity, cells = found.codes
        rows.append(("codes", f"{chosen} of {codes} chosen in {cells} cells, perplexity {perplexity:.1f}"))
    return report.table(rows)


def _learning(recipe: AutoencoderRecipe, known: Curves) -> list[tuple[str, str]]:
    """The curves of the run, in sections."""

    def chart(title: str, names: Mapping[str, str], log: bool = False) -> str:
        return report.chart(title, {label: _curve(known, name) for label, name in names.items()}, log=log)

    quality = chart("PSNR, dB", {"training": "psnr", "held out": "validation/psnr", "inked": "validation/psnr_box"})
    similar = {"over three scales": "validation/structure", "published (SSIM)": "validation/ssim"}
    structure = chart("structural similarity of held-out pictures", similar)
    distances = [
        chart(title, {"held out": name}, log=True)
        for title, name in (("LPIPS", "validation/lpips"), (f"Frechet distance by {NETWORK}", "validation/frechet"))
        if _curve(known, name)
    ]
    parts = ("codes", "commitment", "equivariance", "kl", "perceptual", *DIFFERENCES)
    losses = chart("parts of the loss", {name: name for name in sorted(parts) if _curve(known, name)}, log=True)
    signed = {"critic's verdict": "verdict", "log of the output variance": "log_variance"}
    signs = {label: name for label, name in signed.items() if _curve(known, name)}
    whole = chart("loss", {"loss": "loss"}, log=all(value > 0 for _, value in _curve(known, "loss")))
    sections = [
        ("Quality", report.beside(quality, structure, *distances)),
        ("Losses", report.beside(whole, losses, chart("parts of either sign", signs) if signs else "")),
    ]
    if recipe.loss.adversarial is not None:
        start = (
            f"It counts from step {recipe.loss.adversarial.start}; right verdicts of a half are chance, of all a win."
        )
        balance = chart("verdicts that are right", {"share": "told_apart"})
        verdicts = chart("verdicts", {"on pictures": "real", "on reconstructions": "fake"})
        weight = chart("adaptive weight", {"weight": "adaptive_weight"})
        sections.append(("Discriminator", report.beside(balance, weight, verdicts) + report.paragraph(start)))
    if recipe.network.codes or recipe.network.levels:
        usage = chart("perplexity", {"perplexity": "codebook_perplexity"})
        chosen = chart("share of codes chosen in a batch", {"share": "codebook_chosen"})
        revived = chart("codes revived", {"revived": "codebook_revived"}) if recipe.network.codes else ""
        sections.append(("Codebook", report.beside(usage, chosen, revived)))
    return sections


def _latents(found: Found, known: Curves) -> str:
    latents = found.latents
    channels = range(len(latents.std))
    rows = [
        (i, *(f"{float(part[i]):.3f}" for part in (latents.mean, latents.std, latents.kurtosis)), _nearest(latents, i))
        for i in channels
    ]
    header = ("channel", "mean", "deviation", "excess kurtosis", "most like")
    normal = [(x, 0.3989422804 * 2.718281828 ** (-x * x / 2)) for x, _ in latents.histograms[0]]
    charts = [
        report.chart(
            "values in deviations from their mean",
            {**{f"channel {i}": latents.histograms[i] for i in group}, "normal": normal},
            over_time=False,
        )
        for group in (channels[i : i + A_CHART] for i in range(0, min(len(channels), MOST_CHANNELS), A_CHART))
    ]
    own, both = {"latents": latents.spectrum}, {"pictures": found.before, "reconstructions": found.after}
    white = "latents: power by frequency (cycles a cell); white noise has 1"
    spectra = report.beside(
        report.chart(white, own, log=True, over_time=False),
        report.chart("pictures: power by frequency (cycles a pixel)", both, log=True, over_time=False),
    )
    return report.table(rows, header) + _widths(known) + report.beside(*charts) + spectra


def _widths(known: Curves) -> str:
    """The deviation of the narrowest and of the widest channel while the run went on."""
    steps: dict[float, list[float]] = {}
    for name, points in known.items():
        if name.startswith("validation/latent_std/"):
            for step, value in points:
                steps.setdefault(step, []).append(value)
    ends = {
        name: [(step, choose(values)) for step, values in sorted(steps.items())]
        for name, choose in (("narrowest", min), ("widest", max))
    }
    return report.chart("deviation of latent channels", ends) if steps else ""


def _nearest(latents: Statistics, channel: int) -> str:
    """The channel that says most of the same, with its correlation."""
    row = latents.correlation[channel].clone()
    row[channel] = 0
    other = int(row.abs().argmax())
    return f"{other} ({float(row[other]):+.2f})" if len(row) > 1 else "-"
