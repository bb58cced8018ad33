"""Captions obeyed per minute of training: both emoji stages from nothing in a given time, then `retrieval.py`.

    python benchmarks/minutes.py FOLDER [--first-stage 7] [--second-stage 35] [--threads N]

Each stage is its committed recipe with `schedule.steps` cut to what fits: a short trial measures what a step and what
all else costs, and the whole command (data, training, sheets, cached latents, writing the model) has to end within its
minutes. FOLDER keeps the runs; a stage that is there already is not trained again. For comparison: diffusers' modules
as a 2.2-million-parameter autoencoder (7 minutes) and a 16.7-million-parameter U-Net (35 minutes) on two AVX-512 cores
obeyed 1.9 % of 1,382 captions, 6.6 % within the first five.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from latentkit.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
TRIAL = 40
SLACK = 0.96


def run(recipe: str, folder: Path, *overrides: str) -> float:
    """Train by a recipe; the seconds of the whole command."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "latentkit", "train", f"recipes/{recipe}.yaml", "--into", str(folder), *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def stage(recipe: str, folder: Path, minutes: float, *overrides: str) -> dict[str, float]:
    """One stage in `minutes`, trial left out; what it took."""
    record = folder.with_suffix(".json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    batch = read_recipe(str(ROOT / f"recipes/{recipe}.yaml"), list(overrides)).schedule.batch
    trial = folder.with_name(f"{folder.name}-trial")
    shutil.rmtree(trial, ignore_errors=True)
    whole = run(recipe, trial, f"schedule.steps={TRIAL}", "schedule.log_every=10", *overrides)
    lines = [json.loads(line) for line in (trial / "timings.jsonl").read_text().splitlines()]
    rates = sorted(line["pictures_per_second"] for line in lines if "pictures_per_second" in line)
    step = batch / rates[len(rates) // 2]
    steps = int((60 * minutes * SLACK - (whole - TRIAL * step)) / step)
    print(f"{recipe}: {batch / step:.0f} pictures a second, {steps} steps in {minutes:g} minutes", file=sys.stderr)
    shutil.rmtree(trial)
    spent = run(recipe, folder, f"schedule.steps={steps}", f"schedule.sample_every={steps}", *overrides)
    told = {"minutes": spent / 60, "steps": steps, "batch": batch, "pictures": steps * batch}
    record.write_text(json.dumps(told) + "\n")
    return told


def main() -> None:
    """Train both stages, draw every training caption once, print what was obeyed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first-stage", type=float, default=7.0, help="minutes (default 7)")
    parser.add_argument("--second-stage", type=float, default=35.0, help="minutes (default 35)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    first = stage("emoji-autoencoder", folder / "first-stage", options.first_stage)
    second = stage("emoji", folder / "second-stage", options.second_stage, f"first_stage={folder / 'first-stage'}")
    model = str(folder / "second-stage" / "model.safetensors")
    measure = [sys.executable, str(ROOT / "benchmarks" / "retrieval.py"), "-m", model, "--only-captions"]
    told = json.loads(subprocess.run(measure, check=True, stdout=subprocess.PIPE, text=True).stdout)
    figures = {"threads": options.threads, "first stage": first, "second stage": second, "captions": told["captions"]}
    text = json.dumps(figures, indent=2)
    (folder / "minutes.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
