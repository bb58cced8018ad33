"""Loading a full-size Stable Diffusion 1.5 file: time to the first step against diffusers, and peak memory.

Random weights are written to a temporary folder (2.1 and 4.3 GB at a time) in the released layout; every run is a
process of its own, its libraries imported before the clock starts, the file just read, so that it lies in the system's
cache. Both sides take turns in beginning a pair; of each the run of the median time counts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PROMPT, SIZE, EVERY = "a cat with sunglasses", 512, 0.01
PRECISIONS = {"float32": 4, "float16": 2}


def write(folder: Path, precision: str) -> None:
    """The model file, without any description, and the configs that diffusers asks for, without weights."""
    import torch

    from latentkit.checkpoints import diffusers_folder
    from latentkit.checkpoints.files import Shapes
    from latentkit.checkpoints.ldm_file import single_pairs
    from latentkit.checkpoints.names.rename import given
    from latentkit.checkpoints.storage.tensors import write_tensors
    from latentkit.model.latent_diffusion import LatentDiffusion
    from latentkit.model.presets import preset

    with torch.device("meta"), Shapes():
        model = LatentDiffusion(preset("sd1.5"), {})
    dtype, drawn = getattr(torch, precision), torch.randn(1 << 20)
    for name, parameter in model.named_parameters():
        values = drawn.repeat(-(-parameter.numel() // len(drawn)))[: parameter.numel()].view(parameter.shape)
        size = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        values = values * size + float(parameter.ndim < 2 and "norm" in name and name.endswith("weight"))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(values.to(dtype), False))
    write_tensors(folder / "model.safetensors", given(single_pairs(model), model.state_dict()), {})
    model.first_stage.latent_mean = torch.zeros(4)
    model.first_stage.latent_std = torch.full((4,), 1 / 0.18215)
    vars(diffusers_folder)["write_tensors"] = lambda *content: None
    diffusers_folder.write_folder(folder / "config", model)


class Peaks:
    """The largest values of this process's memory, looked at all the time, in bytes."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY)

    def look(self) -> None:
        """Take today's values in."""
        for name, kilobytes in re.findall(
            r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", Path("/proc/self/status").read_text()
        ):
            self.found[name] = max(self.found.get(name, 0), int(kilobytes) << 10)


def ours(folder: Path, low_memory: bool, whole: bool) -> None:
    """Load and draw until the first step, or the picture, is done."""
    from latentkit.applications.generate import generate
    from latentkit.applications.request import TextToImage
    from latentkit.checkpoints.files import load

    request = TextToImage(prompt=PROMPT, seed=1, steps=1 if whole else 20, guidance_scale=7.5, width=SIZE, height=SIZE)
    measured(lambda: _drawn(generate(load(folder / "model.safetensors", "cpu", low_memory=low_memory), request), whole))


def _drawn(events: Any, whole: bool) -> None:
    next(events)
    if whole:
        list(events)


def theirs(folder: Path) -> None:
    """The same by diffusers, until the first step is done."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()

    class DoneError(Exception):
        pass

    def stop(*state: Any) -> dict[str, Any]:
        raise DoneError

    def work() -> None:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(folder / "model.safetensors"),
            config=str(folder / "config"),
            local_files_only=True,
            torch_dtype=torch.float32,
        )
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 20, "guidance_scale": 7.5, "height": SIZE, "width": SIZE}
        with suppress(DoneError):
            pipeline(PROMPT, callback_on_step_end=stop, **options)

    measured(work)


def measured(work: Any) -> None:
    """Print seconds and peaks of `work` as JSON."""
    peaks, started = Peaks(), time.perf_counter()
    peaks.look()
    before = dict(peaks.found)
    work()
    seconds = time.perf_counter() - started
    peaks.look()
    print(json.dumps({"seconds": seconds, "before": before, **peaks.found}))


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a process of its own prints."""
    if (model := folder / "model.safetensors").exists():
        with model.open("rb") as file:
            while file.read(1 << 24):
                pass
    command = [sys.executable, __file__, "--worker", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    return found


def told(title: str, found: dict[str, Any], size: int) -> str:
    """One line of the table; memory is what was added to that of the libraries."""
    peak = found["VmHWM"] - found["before"]["VmHWM"]
    anonymous = found["RssAnon"] - found["before"]["RssAnon"]
    gigabytes = f"peak {peak / 1e9:5.2f} GB ({peak / size:4.0%} of the file), not of files {anonymous / 1e9:5.2f} GB"
    return f"{title:34s} {found['seconds']:6.1f} s   {gigabytes}"


def main() -> None:
    """Print the table; with --out, write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side to the first step (default 5)")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        folder, what, *rest = asked.worker
        if what == "write":
            write(Path(folder), rest[0])
        elif what == "theirs":
            theirs(Path(folder))
        else:
            ours(Path(folder), "low" in rest, "whole" in rest)
        return
    figures: dict[str, Any] = {}
    for precision in asked.precisions:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            run(folder, "write", precision)
            size = (folder / "model.safetensors").stat().st_size
            print(f"{precision}: a file of {size / 1e9:.2f} GB", flush=True)
            os.sync()
            pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
            for index in range(asked.pairs):
                sides = ("theirs", "ours") if index % 2 else ("ours", "theirs")
                done = {side: run(folder, side) for side in sides}
                pairs.append((done["ours"], done["theirs"]))
            ours_, theirs_ = (sorted(runs, key=lambda run: run["seconds"])[asked.pairs // 2] for runs in zip(*pairs))
            for title, found in {
                "latentkit, to the first step": ours_,
                "diffusers, to the first step": theirs_,
                "latentkit, picture of 1 step": run(folder, "ours", "whole"),
                "latentkit, the same, --low-memory": run(folder, "ours", "whole", "low"),
            }.items():
                figures[f"{precision} {title}"] = found | {"size": size}
                print(told(title, found, size), flush=True)
            ratios = sorted(other["seconds"] / mine["seconds"] for mine, other in pairs)
            figures[f"{precision} diffusers' time / ours"] = ratios
            print("diffusers' time / ours, by pairs: " + " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
