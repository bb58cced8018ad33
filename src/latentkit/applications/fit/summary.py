"""The report of a fit: what was found, how both stages learned, what the model draws and whether it copies."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from latentkit.applications.fit.division import MOST_COMPARED, MOST_HELD, MOST_REFERENCE, duration
from latentkit.applications.fit.plan import FitPlan, describe
from latentkit.applications.generate import draw
from latentkit.applications.pictures import open_data
from latentkit.applications.stages.train_autoencoder import pairs
from latentkit.applications.stages.train_diffusion import multiple
from latentkit.checkpoints.files import RUN_MODEL, load, load_autoencoder
from latentkit.data import report as counts
from latentkit.data.dataset import Pictures
from latentkit.data.pictures import to_png, visible
from latentkit.data.source import Item, Source, track
from latentkit.evaluation import report
from latentkit.evaluation.journal import curves, lines
from latentkit.evaluation.metrics.features import NETWORK, features
from latentkit.evaluation.metrics.kid import Kid, kid
from latentkit.evaluation.metrics.neighbours import Memorisation, memorisation
from latentkit.evaluation.reconstruction import reconstruction
from latentkit.evaluation.report import Figure

SHOWN = 24
PAIRS = 8
COPIED = 0.5  # of the usual distance to the nearest training picture
GAP = 4.0  # dB between pictures that were trained on and others
LITTLE = 24.0  # dB
LEAST_HELD = 8  # fewer held-out pictures are no scale


def write_report(plan: FitPlan, run: Path, model: Path, source: Source) -> str:
    """The page's HTML; draws the plan's number of pictures with seeds 0, 1, 2 ... to do so."""
    train, held = open_data(
        plan.diffusion.data, plan.asked.seed, multiple(plan.diffusion, plan.autoencoder.network.downsampling)
    )
    words = _words(plan, train, held, plan.expected.samples)
    network = load(model).network
    defaults = plan.diffusion.sampling.model_dump(mode="json", exclude={"prompts"})
    drawn = list(track(draw(network, defaults, words, range(len(words))), len(words), "drawing"))
    chosen = _evenly(len(train), MOST_REFERENCE)
    references = features(train.view(i, 0)[1] for i in chosen)
    apart = held.source is not train.source and len(held) >= LEAST_HELD
    unseen = features(held.view(i, 0)[1] for i in _evenly(len(held), MOST_HELD)) if apart else None
    found = features(drawn)
    copies = memorisation(found, unseen, references)
    figures = _figures(run, plan, found, unseen, references, copies)
    captions = [word or f"seed {seed}" for seed, word in enumerate(words)]
    sections = [
        ("What it draws", report.pictures([_figure(x, c, train.alpha) for x, c in list(zip(drawn, captions))[:SHOWN]])),
        ("What to make of it", report.verdict(_verdict(run, train, held, copies, len(drawn)))),
        ("In figures", report.table(figures)),
        ("First stage", _first_stage(run / "autoencoder", network.first_stage.latent_std)),
        ("Second stage", _second_stage(run / "diffusion")),
        ("Nearest training pictures", _neighbours(drawn, captions, train, chosen, copies)),
        ("Data", _data(source)),
        ("Plan, machine and time", _plan(plan, run)),
    ]
    lead = f"Trained on {plan.pictures.training} pictures of {plan.asked.folder} by latentkit fit."
    return report.page(plan.asked.name, lead, sections)


def _words(plan: FitPlan, train: Pictures, held: Pictures, count: int) -> list[str | None]:
    """What is asked for: captions or classes, first of held-out pictures, then of training pictures evenly taken."""

    def said(item: Item) -> str | None:
        return item.caption if plan.diffusion.text is not None else item.label

    if plan.diffusion.text is None and plan.diffusion.label is None:
        return [None] * count
    first = [said(held.source.items[i]) for i in _evenly(len(held), SHOWN)]
    rest = [said(train.source.items[i % len(train)]) for i in _evenly(max(count, len(train)), count)]
    return [*(word for word in first if word), *rest][:count]


def _evenly(length: int, most: int) -> list[int]:
    return [i * length // most for i in range(most)] if length > most else list(range(length))


def _figure(picture: Tensor, caption: str, alpha: bool) -> Figure:
    return Figure(to_png(visible(picture, alpha)), caption)


def _figures(
    run: Path, plan: FitPlan, drawn: Tensor, unseen: Tensor | None, references: Tensor, copies: Memorisation
) -> list[tuple[str, str, str]]:
    """Rows of name, value, and what it means."""
    rows = []
    names = {
        "psnr": ("PSNR of the first stage", "dB, held-out pictures given back; higher is better"),
        "psnr_box": ("PSNR inside the drawing", "dB, the box that is not plain white"),
        "structure": ("structural similarity", "1 is equal"),
    }
    last = _last(run / "autoencoder", "validation/psnr")
    if last.get("validation/psnr_box") == last.get("validation/psnr"):
        del names["psnr_box"]  # pictures without a plain white margin
    for key, (name, meaning) in names.items():
        if f"validation/{key}" in last:
            rows.append((name, f"{last[f'validation/{key}']:.2f}", meaning))
    last = _last(run / "diffusion", "validation/loss")
    if last:
        rows.append(("validation loss", f"{last['validation/loss']:.4f}", "held-out pictures, six fixed noise levels"))
    rows.append(("KID, drawn", *_distance(drawn, references)))
    if unseen is not None:
        rows.append(("KID, held-out pictures", *_distance(unseen, references, "what real pictures reach")))
    scale = "held-out pictures" if unseen is not None else "training pictures among themselves"
    meaning = f"median distance to the nearest training picture, over that of {scale}; {NETWORK}"
    rows.append(("memorisation ratio", f"{copies.ratio:.2f}", f"{meaning}; near 1: new pictures, near 0: copies"))
    rows.append(("nearer than any real one", f"{copies.copies} of {len(drawn)}", f"drawn pictures; scale: {scale}"))
    return rows


def _verdict(run: Path, train: Pictures, held: Pictures, copies: Memorisation, count: int) -> list[str]:
    """What the figures mean for who looks at the pictures, and what would help."""
    said = []
    if copies.ratio < COPIED:
        said.append(
            f"The model repeats its training pictures: {copies.copies} of {count} drawn pictures are nearer to one of "
            "them than real ones are to each other (see the nearest ones below). Do not take what it draws for new. "
            "More pictures help most, fewer steps help a little."
        )
    elif copies.copies:
        said.append(
            f"{copies.copies} of {count} drawn pictures are nearer to a training picture than real ones are to each "
            "other: copies or blurs, as the nearest ones below show."
        )
    else:
        said.append(f"None of {count} drawn pictures is a copy of a training picture.")
    autoencoder = load_autoencoder(run / "autoencoder" / RUN_MODEL).autoencoder
    assert autoencoder is not None
    known, other = (
        reconstruction(itertools.islice(pairs(autoencoder, pictures), MOST_COMPARED))["psnr"]
        for pictures in (train, held)
    )
    if other < known - GAP:
        said.append(
            f"The first stage gives its training pictures back at {known:.1f} dB and held-out ones at {other:.1f} dB: "
            "it knows its own pictures better than others. Editing other pictures will show it."
        )
    elif other < LITTLE:
        said.append(
            f"The first stage gives pictures back at {other:.1f} dB, which is blurred; nothing that is drawn can be "
            "sharper. More time helps."
        )
    return said


def _distance(first: Tensor, second: Tensor, note: str = "lower is better") -> tuple[str, str]:
    if min(len(first), len(second)) < 4:
        return "-", "needs at least four pictures on each side"
    value: Kid = kid(first, second)
    counted = f"{value.first} against {value.second} training pictures, {value.subsets} subsets of {value.size}"
    return f"{value.mean:.4f} +- {value.std:.4f}", f"{counted}; {NETWORK}; {note}"


def _first_stage(folder: Path, deviation: Tensor) -> str:
    loss = report.chart("training loss", {"loss": _curve(folder, "loss")}, log=True)
    quality = {"training": _curve(folder, "psnr"), "held out": _curve(folder, "validation/psnr")}
    parts = [report.beside(loss, report.chart("PSNR, dB", quality))]
    sheets = sorted((folder / "samples").glob("step-*.png"))
    if sheets:
        sheet = Figure(sheets[-1].read_bytes(), "held-out pictures above, given back by the first stage below")
        parts.insert(0, report.picture(sheet))
    low, high = float(deviation.min()), float(deviation.max())
    note = (
        f"The deviations of its {len(deviation)} latent channels, {low:.3g} to {high:.3g} over all training pictures, "
        "are brought to 1 for the second stage. Noise decoded by the first stage alone is no picture, in any such "
        "model: the second stage is what draws."
    )
    return "".join(parts) + report.paragraph(note)


def _second_stage(folder: Path) -> str:
    validation = {
        f"sigma {name.removeprefix('validation/sigma_')}": points
        for name, points in curves(folder / "metrics.jsonl").items()
        if name.startswith("validation/sigma_")
    }
    whole = {"training": _curve(folder, "loss"), "held out": _curve(folder, "validation/loss")}
    note = (
        "Held-out pictures with fixed noise, by noise level. Where it rises while the training loss falls, the model "
        "begins to learn its pictures by heart: fewer steps or more pictures help."
    )
    charts = report.beside(report.chart("loss", whole), report.chart("validation by noise level", validation, log=True))
    return charts + report.paragraph(note)


def _neighbours(
    drawn: Sequence[Tensor], captions: Sequence[str], train: Pictures, chosen: Sequence[int], copies: Memorisation
) -> str:
    """The drawn pictures that are nearest to a training picture, each beside it."""
    distance = copies.nearest.distance
    found = []
    for row in distance.argsort()[:PAIRS].tolist():
        index = chosen[int(copies.nearest.place[row])]
        share = f"{float(distance[row]) / copies.held:.2f} of the usual distance" if copies.held > 0 else "no scale"
        training = _figure(train.view(index, 0)[1], f"training: {train.source.items[index].key} ({share})", train.alpha)
        found.append((_figure(drawn[row], f"drawn: {captions[row]}", train.alpha), training))
    note = f"The {min(PAIRS, len(drawn))} of {len(drawn)} drawn pictures that lie nearest to a training picture."
    return report.paragraph(note) + report.pairs(found)


def _data(source: Source) -> str:
    found = counts.inspect(source)
    rejected = [(row["key"], row["reason"]) for row in found["rejected"]]
    parts = [report.folded("all counts", counts.describe(found))]
    parts.insert(0, report.paragraph(f"{found['pictures']} pictures used, {len(rejected)} files not used."))
    if rejected:
        parts.append(report.table(rejected, ("not used", "why")))
    return "".join(parts)


def _plan(plan: FitPlan, run: Path) -> str:
    stages = {"first stage": ("autoencoder", plan.expected.first), "second stage": ("diffusion", plan.expected.second)}
    times = []
    for name, (folder, expected) in stages.items():
        seconds, rate = _spent(run / folder)
        times.append((name, duration(expected), duration(seconds) if seconds else "-", f"{rate:.1f}"))
    machine = [(key, value) for key, value in plan.machine.items()]
    header = ("", "planned", "spent in steps", "pictures a second")
    recipes = {"plan.yaml": plan.model_dump(mode="json")}
    return "".join(
        (
            report.folded("the plan as it was printed", describe(plan)),
            report.table(times, header),
            report.table(machine),
            *(report.folded(name, yaml.safe_dump(v, sort_keys=False, width=110)) for name, v in recipes.items()),
        )
    )


def _curve(folder: Path, name: str) -> list[tuple[float, float]]:
    return curves(folder / "metrics.jsonl").get(name, [])


def _last(folder: Path, name: str) -> dict[str, Any]:
    """The last line of metrics that holds `name`."""
    return ([{}] + [line for line in lines(folder / "metrics.jsonl") if line.get(name) is not None])[-1]


def _spent(folder: Path) -> tuple[float, float]:
    """Seconds spent in steps, those repeated after a kill counted once, and pictures a second."""
    rates = {
        line["step"]: line["pictures_per_second"]
        for line in lines(folder / "timings.jsonl")
        if line.get("pictures_per_second")
    }
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    seconds, before = 0.0, 0
    for step, rate in sorted(rates.items()):
        seconds += (step - before) * recipe["schedule"]["batch"] / rate
        before = step
    return seconds, before * recipe["schedule"]["batch"] / seconds if seconds else math.nan
