"""Which first-stage option makes latents that diffusion learns better from: KID at equal time, on paired seeds.

    python benchmarks/latents.py FOLDER [--seeds 3] [--first-stage 2.5] [--second-stage 6] [--options plain noise ...]

A proxy of 32-pixel emoji: for every option and seed a first stage and an unconditional second stage are trained, each
in its minutes (an option that makes a step dearer gets fewer of them; the steps are measured once per option, so that
its seeds are equal runs), then pictures are drawn and their KID to the training pictures taken, with the feature
network that its name goes with. Every run resumes and every finished pair is kept in FOLDER: stop and start at will.
With the defaults a pair takes 9 minutes, all 18 of them two and three quarter hours on two cores. The verdict: an
option earns its place when its KID is below that of `plain` on each of three seeds or more.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from latentkit.applications.generate import draw
from latentkit.applications.pictures import open_data
from latentkit.applications.stages.train import train
from latentkit.checkpoints.files import load
from latentkit.evaluation.metrics.features import NETWORK, features
from latentkit.evaluation.metrics.kid import kid
from latentkit.training.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "equivariance": {"equivariance": 0.25},
    "noise": {"latent_noise": 0.2},
    "both": {"equivariance": 0.25, "latent_noise": 0.2},
    "weak-kl": {"kl": 1e-6},
    "strong-kl": {"kl": 1e-3},
    "one-factor": {},
}
DATA = {
    "path": str(ROOT / "data" / "emoji"),
    "split": "train",
    "holdout": "holdout",
    "transform": {"size": 32, "channels": 3, "background": "white"},
}
TRIAL, DRAWN, COMPARED, ENOUGH = 40, 1000, 2000, 3


def first_stage(option: str, seed: int, steps: int) -> dict[str, Any]:
    """The recipe of a first stage of f4 and four channels."""
    return {
        "stage": "autoencoder",
        "name": f"{option}-{seed}-first",
        "seed": seed,
        "data": DATA,
        "network": {"latent_channels": 4, "channels": 48, "multipliers": [1, 1], "blocks": 1, "stem": 2},
        "loss": {"l1": 1.0, "pyramid": 0.5, "structure": 0.1, "kl": 1e-4} | OPTIONS[option],
        "optimiser": {"name": "muon", "lr": 2e-3, "weight_decay": 0.01, "decay": 0.4},
        "averaging": {"decay": 0.995, "power": []},
        "schedule": {"steps": steps, "batch": 16, "precision": "bf16", "save_every": 200, "sample_every": steps},
    }


def second_stage(option: str, seed: int, steps: int, first: Path) -> dict[str, Any]:
    """The recipe of an unconditional second stage on its latents."""
    return {
        "stage": "diffusion",
        "name": f"{option}-{seed}-second",
        "seed": seed,
        "first_stage": str(first),
        "whitening": option != "one-factor",
        "data": DATA,
        "network": {"channels": 96, "multipliers": [1, 2], "blocks": 1, "depth": [0, 1], "heads": 4},
        "optimiser": {"name": "muon", "lr": 2e-3, "weight_decay": 0.01, "decay": 0.4},
        "averaging": {"decay": 0.998, "power": []},
        "schedule": {"steps": steps, "batch": 32, "precision": "bf16", "save_every": 200, "sample_every": steps},
        "sampling": {"guidance_scale": 1.0, "steps": 20},
    }


def steps_in(minutes: float, folder: Path, recipe: dict[str, Any]) -> int:
    """How many steps of a recipe fit, by the processor's time of a short trial; kept beside the runs."""
    record = folder.with_suffix(".steps")
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        times = []
        for steps in (TRIAL // 4, TRIAL):
            recipe["schedule"] |= {"steps": steps, "sample_every": steps, "log_every": steps}
            begun = time.process_time()
            train(parse_recipe(recipe), folder / f"{steps}")
            times.append(time.process_time() - begun)
        step = (times[1] - times[0]) / (TRIAL - TRIAL // 4) / torch.get_num_threads()
        record.write_text(str(max(TRIAL, int(60 * minutes / step))))
        shutil.rmtree(folder)
    return int(record.read_text())


def run(folder: Path, option: str, seed: int, minutes: tuple[float, float]) -> dict[str, Any]:
    """Train both stages of one option and seed and measure what they draw; at once if that was done before."""
    record = folder / f"{option}-{seed}.json"
    if record.exists():
        return dict(json.loads(record.read_text()))
    kind = option if OPTIONS[option] else "plain"  # whose first stage it is
    steps = steps_in(minutes[0], folder / f"{kind}-trial-first", first_stage(kind, 0, TRIAL))
    first = train(parse_recipe(first_stage(kind, seed, steps)), folder / f"{kind}-{seed}-first")
    more = steps_in(minutes[1], folder / "trial-second", second_stage("plain", 0, TRIAL, first))
    recipe = parse_recipe(second_stage(option, seed, more, first))
    model = load(train(recipe, folder / f"{option}-{seed}-second"))
    drawn = features(draw(model.network, model.provenance["defaults"], [None] * DRAWN, range(DRAWN)))
    pictures, _ = open_data(recipe.data, 0, 4)
    known = features(pictures.view(index, 0)[1] for index in range(min(COMPARED, len(pictures))))
    told = json.loads((folder / f"{kind}-{seed}-first" / "metrics.jsonl").read_text().splitlines()[-1])
    figures = {
        "option": option, "seed": seed, "kid": kid(drawn, known).mean, "network": NETWORK, "first_steps": steps,
        "second_steps": more, "psnr": told["validation/psnr"], "latent_std": told["validation/latent_std"],
    }  # fmt: skip
    record.write_text(json.dumps(figures) + "\n")
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """KID of every option by seed, beside `plain` of the same seed."""
    found = {(row["option"], row["seed"]): row for row in rows}
    lines = [
        "| option | first-stage steps | PSNR | KID x 1e3 by seed | less than plain | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for option in dict.fromkeys(row["option"] for row in rows):
        seeds = sorted(seed for name, seed in found if name == option)
        own = [found[option, seed] for seed in seeds]
        less = [found["plain", s]["kid"] - found[option, s]["kid"] for s in seeds if ("plain", s) in found]
        wins = "earns its place" if min(less, default=0.0) > 0 else "off"
        verdict = "-" if option == "plain" else wins if len(less) >= ENOUGH else "too few seeds"
        psnr = sum(row["psnr"] for row in own) / len(own)
        kids, gains = (" ".join(f"{1e3 * value:.2f}" for value in part) for part in ([row["kid"] for row in own], less))
        lines.append(f"| {option} | {own[0]['first_steps']} | {psnr:.2f} | {kids} | {gains} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, seed by seed, and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-stage", type=float, default=2.5, help="minutes (default 2.5)")
    parser.add_argument("--second-stage", type=float, default=6.0, help="minutes (default 6)")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(options.seeds):
        for option in dict.fromkeys(["plain", *options.options]):
            rows.append(run(folder, option, seed, (options.first_stage, options.second_stage)))
            print(table(rows), file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
