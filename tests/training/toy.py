"""A toy run for the trainer's tests: a small convolutional denoiser with every kind of state that must survive a kill.

As a program, `python toy.py FOLDER key=value ...` trains into FOLDER as a user's command would, and `python toy.py
serve` is a warm process that forks such runs, so that a test can kill many of them.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentkit.diffusion.noise import keyed_normal, keyed_uniform
from latentkit.errors import InputError
from latentkit.training import distributed
from latentkit.training.ema import Averaging
from latentkit.training.optimizers import Optimiser
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.run.store import FileCalls
from latentkit.training.trainer import Callback, Schedule, Trainer

SHAPE = (2, 8, 8)
RECIPE = {
    "seed": 3,
    "steps": 12,
    "batch": 4,
    "micro_batch": 2,
    "save_every": 4,
    "log_every": 3,
    "optimiser": "muon",
    "precision": "float32",
    "turns": 1,
    "dropout": 0.1,
    "pause": 0.0,
    "broken": [],
    "broken_rank": 0,
    "unequal": False,
}


class ToyNet(nn.Module):
    """x -> x with convolutions, a norm, an embedding, a buffer and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 1)
        self.label_embedding = nn.Embedding(3, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(8, 2, 3, padding=1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)) + self.label_embedding(label)[:, :, None, None]
        hidden = hidden + self.wide(torch.nn.functional.silu(self.middle(torch.nn.functional.silu(hidden))))
        return self.last(self.dropout(hidden))


class ToyObjective:
    """Denoise keyed pictures; with two turns a critic learns to tell, and a running scale is kept in `shared`."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        torch.manual_seed(recipe["seed"] + (distributed.world().rank if recipe["unequal"] else 0))
        self.seed = recipe["seed"]
        self.module = nn.ModuleDict({"net": ToyNet(recipe["dropout"])})
        self.shared: tuple[str, ...] = ()
        if recipe["turns"] == 2:
            self.module["critic"] = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
            self.shared = ("scale",)

    def turns(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        named = list(self.module.named_parameters())
        turns = {"net": [pair for pair in named if pair[0].startswith("net.")]}
        if "critic" in self.module:
            turns["critic"] = [pair for pair in named if pair[0].startswith("critic.")]
        return turns

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        if turn == "critic":
            real, fake = self.module["critic"](pixels), self.module["critic"](shared["made"])
            loss = (1 - real).relu().mean() + (1 + fake).relu().mean()
            return loss, {"real": real.detach().mean()}
        draws = batch["draw"].tolist()
        noise = torch.stack([keyed_normal(SHAPE, self.seed, "noise", draw) for draw in draws])
        sigma = torch.cat([keyed_uniform((1,), self.seed, "sigma", draw) for draw in draws])[:, None, None, None]
        self.module["net"].seen += len(draws)
        made = self.module["net"](pixels + sigma * noise, batch["label"])
        loss = (made - pixels).square().mean()
        logs = {"largest": made.detach().abs().amax()}
        if "critic" in self.module:
            scale = shared.get("scale", torch.ones(())) * 0.9 + 0.1 * made.detach().square().mean()
            shared["scale"], shared["made"] = scale, made.detach()
            loss = loss - 0.01 * self.module["critic"](made).mean() / scale
        return loss, logs


def batches(recipe: dict[str, Any], rank: int = 0, size: int = 1):
    """The function from a step to the micro-batches of this rank."""

    def start(step: int) -> Iterator[list[dict[str, Any]]]:
        while True:
            draws = torch.arange(step * recipe["batch"], (step + 1) * recipe["batch"])[rank::size]
            parts = []
            for part in draws.split(recipe["micro_batch"]):
                pixels = torch.stack([keyed_normal(SHAPE, 99, int(draw) % 10) for draw in part])
                if step + 1 in recipe["broken"] and rank == recipe["broken_rank"]:
                    pixels[0, 0, 0, 0] = torch.nan
                parts.append({"step": step, "index": part % 10, "draw": part, "pixels": pixels, "label": part % 3})
            yield parts
            step += 1

    return start


def make(
    folder: Path | str,
    calls: FileCalls | None = None,
    objective: ToyObjective | None = None,
    callbacks: tuple[Callback, ...] = (),
    stream: Any = None,
    **changes: Any,
) -> Trainer:
    """A trainer of the toy run; close `trainer.run` afterwards."""
    recipe = {**RECIPE, **changes}
    schedule = Schedule(
        steps=recipe["steps"],
        batch=recipe["batch"],
        micro_batch=recipe["micro_batch"],
        save_every=recipe["save_every"],
        log_every=recipe["log_every"],
        precision=recipe["precision"],
        device="cpu",
    )
    world = distributed.join(torch.device("cpu"))
    return Trainer(
        objective or ToyObjective(recipe),
        stream or batches(recipe, *world),
        RunFolder(folder, recipe, calls, writes=world.main),
        schedule=schedule,
        optimiser=Optimiser(name=recipe["optimiser"], lr=0.01, warmup=2, weight_decay=0.01),
        averaging=Averaging(decay=0.9, snapshot_every=4),
        callbacks=callbacks,
        seed=recipe["seed"],
    )


def train(folder: Path | str, calls: FileCalls | None = None, **changes: Any) -> Trainer:
    """Train the toy run to its end and let go of its folder."""
    trainer = make(folder, calls, **changes)
    with trainer.run:
        trainer.train()
    return trainer


def digest(folder: Path) -> dict[str, str]:
    """sha256 of everything that must not depend on kills: the newest checkpoint, the snapshots and the metrics."""
    newest = max((folder / "checkpoints").glob("step-????????"))
    files = [*newest.iterdir(), *(folder / "snapshots").glob("*"), folder / "metrics.jsonl"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all that training changed."""
    tables = {"weights": trainer.module.state_dict(), **trainer.ema.tables()}
    tables |= {f"optimiser-{turn}": stepper.table() for turn, stepper in trainer.optimisers.items()}
    return {f"{table}/{name}": value.clone() for table, named in tables.items() for name, value in named.items()}


class Warm:
    """A process that has imported everything and forks runs on demand."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def start(self, folder: Path, environment: dict[str, str] | None = None, **changes: Any) -> int:
        """The process id of a run that was just begun; its stderr goes to FOLDER.log."""
        return self._ask({"folder": str(folder), "environment": environment or {}, "changes": changes})

    def wait(self, pid: int) -> int:
        """The run's exit status; minus the signal that ended it."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, question: dict[str, Any]) -> int:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        return int(self.process.stdout.readline())


def serve() -> None:
    """Answer a `Warm`."""
    print(0, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = ended(question["wait"])
        elif (answer := os.fork()) == 0:
            log = os.open(f"{question['folder']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            os.environ.update(question["environment"])
            os._exit(program(question["folder"], question["changes"]))
        print(answer, flush=True)


def ended(pid: int, patience: float = 60.0) -> int:
    """The exit status of a child; one that hangs is killed."""
    deadline = time.monotonic() + patience
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def program(folder: str, changes: dict[str, Any]) -> int:
    """Train as a command would; returns the exit status."""
    pause = changes.get("pause", RECIPE["pause"])
    slow = (Callback(1, lambda step, trainer: time.sleep(pause)),) if pause else ()
    try:
        train(folder, callbacks=slow, **changes)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        distributed.leave()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "serve":
        serve()
    else:
        asked = dict(argument.split("=", 1) for argument in sys.argv[2:])
        sys.exit(program(sys.argv[1], {key: json.loads(value) for key, value in asked.items()}))
