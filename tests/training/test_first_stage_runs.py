"""Runs of the adversarial first stage: resumed bit by bit, however divided one run, and back from a collapse."""

import itertools
import json
import math
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import digest

from latentkit.diffusion.noise import keyed_normal
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.critics import CriticConfig
from latentkit.training import distributed
from latentkit.training.collapse import Collapse
from latentkit.training.ema import Averaging
from latentkit.training.first_stage.adversarial import Adversarial
from latentkit.training.first_stage.autoencoder import AutoencoderObjective, ReconstructionLoss
from latentkit.training.first_stage.codebook import CodebookLoss
from latentkit.training.optimizers import Optimiser
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.trainer import Callback, Schedule, Trainer

LOSS = {
    "equivariance": 0.25,
    "latent_noise": 0.1,
    "adversarial": Adversarial(start=6, warmup=3, ramp=4, network=CriticConfig(channels=4, layers=1)),
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kl": ({}, {"output_variance": True}),
    "codes": ({"codes": 24, "latent_channels": 2}, {}),
    "levels": ({"levels": (3, 4), "latent_channels": 2}, {}),
    "running": ({"codes": 24, "latent_channels": 2}, {"codebook": CodebookLoss(running_mean=0.9)}),
}


class Kill(BaseException):
    """Stands for kill -9: nothing may catch it."""


def pixels_of(draw: int) -> Tensor:
    """A smooth picture, 12 by 8."""
    row = 0.3 * keyed_normal((3, 3, 2), 5, draw % 13)
    return torch.nn.functional.interpolate(row[None], (12, 8), mode="bilinear")[0].clamp(-1, 1)


def stream(batch: int, micro: int, rank: int, size: int, dtype: torch.dtype) -> Any:
    def start(step: int) -> Iterator[list[dict[str, Any]]]:
        while True:
            draws = torch.arange(step * batch, (step + 1) * batch)[rank::size]
            yield [
                {
                    "step": step,
                    "draw": part,
                    "index": part % 13,
                    "pixels": torch.stack([pixels_of(int(d)) for d in part]).to(dtype),
                }
                for part in draws.split(micro)
            ]
            step += 1

    return start


def make(
    folder: Path,
    kind: str = "codes",
    micro: int = 4,
    objective: Any = AutoencoderObjective,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Trainer:
    network, loss = KINDS[kind]
    torch.manual_seed(1)
    config = AutoencoderConfig(channels=8, multipliers=(1,), blocks=1, stem=2, attention=False, **network)
    schedule = {"steps": 12, "save_every": 4, "log_every": 3, "device": "cpu"} | changes
    weights = ReconstructionLoss(**LOSS | loss)
    world = distributed.join(torch.device("cpu"))
    made = objective(Autoencoder(config), weights, 2)
    made.module.to(dtype)
    return Trainer(
        made,
        stream(4, micro, *world, dtype),
        RunFolder(folder, {"kind": kind}, writes=world.main),
        schedule=Schedule(batch=4, micro_batch=micro, **schedule),
        optimiser={"autoencoder": Optimiser(lr=0.01, warmup=0, decay=0), "critic": Optimiser(lr=0.01, warmup=0)},
        averaging=Averaging(decay=0.9, power=()),
        seed=3,
    )


def train(folder: Path, **changes: Any) -> Trainer:
    trainer = make(folder, **changes)
    with trainer.run:
        trainer.train()
    return trainer


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tables(folder: Path) -> dict[str, Tensor]:
    newest = max((folder / "checkpoints").glob("step-????????"))
    return {f"{f.stem}/{name}": value for f in newest.glob("*.safetensors") for name, value in load_file(f).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_any_step_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    train(tmp_path / "whole", kind=kind)
    expected = digest(tmp_path / "whole")
    for k in (3, 7, 10) if kind == "codes" else (7,):
        trainer = make(tmp_path / f"{k}", kind=kind)
        trainer.schedule = trainer.schedule.model_copy(update={"save_every": k})
        batches = trainer.batches

        def limited(step: int, batches: Any = batches, k: int = k) -> Iterator[Any]:
            yield from itertools.islice(batches(step), k)
            raise Kill

        trainer.batches = limited
        with trainer.run, pytest.raises(Kill):
            trainer.train()
        train(tmp_path / f"{k}", kind=kind)
        assert digest(tmp_path / f"{k}") == expected, f"killed after step {k}"


def test_a_run_killed_between_its_turns_ends_with_the_same_bytes(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    for k in (3, 7):
        trainer = make(tmp_path / f"{k}")
        loss = trainer.objective.loss

        def mortal(turn: str, batch: Any, shared: Any, k: int = k, loss: Any = loss) -> Any:
            if turn == "critic" and batch["step"] == k:
                raise Kill  # the autoencoder has moved already
            return loss(turn, batch, shared)

        trainer.objective.loss = mortal
        with trainer.run, pytest.raises(Kill):
            trainer.train()
        train(tmp_path / f"{k}")
        assert digest(tmp_path / f"{k}") == digest(tmp_path / "whole")


SHORT = {"steps": 9, "dtype": torch.float64}
"""In float64, as in float32 Adam makes large steps of gradients that are nothing but rounding."""


def same_run(one: Path, other: Path) -> None:
    """Equal up to the rounding of sums, which are exchanged in float32."""
    ours, theirs = tables(one), tables(other)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(lines(one), lines(other), strict=True):
        assert set(a) == set(b)
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_is_the_same_run(tmp_path: Path, kind: str) -> None:
    """Adaptive weight, running verdicts, codebook statistics and revival included."""
    train(tmp_path / "one", kind=kind, **SHORT)
    train(tmp_path / "parts", kind=kind, micro=1, **SHORT)
    same_run(tmp_path / "one", tmp_path / "parts")


def _rank(folder: str, rank: int, port: int, changes: dict[str, Any]) -> None:
    os.environ |= {
        "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    trainer = train(Path(folder), micro=2, **changes)
    torch.save({"attempt": trainer.objective.attempt, **trainer.module.state_dict()}, f"{folder}-rank-{rank}.pt")
    distributed.leave()


def train_by_two(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train on two processes; returns what each of them ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_rank, args=(str(folder), rank, port, changes)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(f"{folder}-rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_the_same_run(tmp_path: Path, kind: str) -> None:
    train_by_two(tmp_path / "two", kind=kind, **SHORT)
    train(tmp_path / "one", kind=kind, **SHORT)
    same_run(tmp_path / "one", tmp_path / "two")


def test_what_the_health_page_needs_is_logged(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run")
    logged = set().union(*lines(tmp_path / "run"))
    own = {"psnr", "adaptive_weight", "verdict", "codebook_perplexity", "codebook_chosen", "codebook_revived"}
    assert {f"autoencoder/{name}" for name in own} <= logged
    assert {"critic/real", "critic/fake", "critic/told_apart", "critic/loss"} <= logged
    assert trainer.shared["latent_moments"].shape == (2, 2)
    first, *_, last = (line for line in lines(tmp_path / "run") if "autoencoder/loss" in line)
    assert "critic/loss" not in first, "it does not learn before its warm-up"
    assert last["autoencoder/adaptive_weight"] > 0


def test_the_use_of_levels_is_logged_as_that_of_codes(tmp_path: Path) -> None:
    train(tmp_path / "run", kind="levels")
    last = lines(tmp_path / "run")[-1]
    assert 1 < last["autoencoder/codebook_perplexity"] <= 12
    assert 1 / 12 <= last["autoencoder/codebook_chosen"] <= 1
    assert "autoencoder/codebook_revived" not in last


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_reaches_every_micro_batch_of_the_next_step(tmp_path: Path, kind: str) -> None:
    trainer = make(tmp_path / "run", kind=kind, micro=2)
    settle, loss, kept = trainer.objective.settle, trainer.objective.loss, {}

    def settling(turn: str, step: int, sums: Any, shared: Any) -> Any:
        logs = settle(turn, step, sums, shared)
        kept.update({name: value.clone() for name, value in shared.items()})
        return logs

    def looking(turn: str, batch: Any, shared: Any) -> Any:
        for name, value in kept.items():
            assert torch.equal(shared[name], value), (name, batch["step"])
        return loss(turn, batch, shared)

    trainer.objective.settle, trainer.objective.loss = settling, looking
    with trainer.run:
        trainer.train()
    assert set(kept) == set(trainer.shared) <= set(trainer.objective.shared)
    expected = {"adaptive_weight", "anchor_real", "anchor_fake", "latent_moments", "psnr_now", "psnr_before"}
    expected |= {"codebook_usage"} if kind != "kl" else set()
    expected |= {"codebook_counts", "codebook_means"} if kind == "running" else set()
    assert set(kept) == expected


class Breaking(AutoencoderObjective):
    """Its decoder is torn apart at every step from one on, for so many attempts."""

    times, at = 1, 26

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "autoencoder" and batch["step"] >= self.at and self.attempt < self.times:
            with torch.no_grad():
                weight = self.autoencoder.decoder.conv_out.weight
                weight.normal_(0, 3, generator=torch.Generator().manual_seed(batch["step"]))
        return super().loss(turn, batch, shared)


LONG = {"steps": 45, "save_every": 5, "log_every": 5, "kind": "kl"}


@pytest.fixture(scope="module")
def returned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("returned") / "run"
    return folder, train(folder, objective=Breaking, **LONG)


def test_a_collapsed_run_goes_back_and_tries_again(returned: tuple[Path, Trainer]) -> None:
    folder, trainer = returned
    (back,) = [line for line in lines(folder) if "attempt" in line]
    assert back["attempt"] == 1
    assert 26 < back["back_from"] < 45
    assert back["step"] == 25, "the newest from before: nothing is saved while it falls"
    assert trainer.objective.attempt == 1
    state = json.loads((folder / "checkpoints" / "step-00000045" / "state.json").read_bytes())
    assert state["attempt"] == 1
    assert state["doubtful"] is False
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted(steps), "what was given up is not in the metrics"
    assert lines(folder)[-1]["autoencoder/psnr"] > 15


def test_a_run_killed_after_it_went_back_ends_with_the_same_bytes(
    returned: tuple[Path, Trainer], tmp_path: Path
) -> None:
    """Also where a signal had made it save the broken weights: they are not what it goes on from."""
    folder, _ = returned
    trainer = make(tmp_path / "run", objective=Breaking, **LONG)
    settle = trainer.objective.settle

    def signalled(step: int, trainer: Trainer) -> None:
        if step == 38 and trainer.objective.attempt == 0:
            trainer.save(last=True)

    trainer.callbacks = (Callback(1, signalled),)

    def mortal(turn: str, step: int, sums: Any, shared: Any) -> Any:
        if trainer.objective.attempt and step == 33:
            raise Kill
        return settle(turn, step, sums, shared)

    trainer.objective.settle = mortal
    with trainer.run, pytest.raises(Kill):
        trainer.train()
    assert trainer.run.store.steps() == [25, 30]
    train(tmp_path / "run", objective=Breaking, **LONG)
    assert digest(tmp_path / "run") == digest(folder)


def test_two_processes_go_back_to_one_attempt(tmp_path: Path) -> None:
    """Both from the same checkpoint to the same weights, and the same bytes when it is done again."""
    one, other = train_by_two(tmp_path / "run", objective=Breaking, **LONG)
    assert (one.pop("attempt"), other.pop("attempt")) == (1, 1)
    assert all(torch.equal(other[name], value) for name, value in one.items())
    (back,) = [line for line in lines(tmp_path / "run") if "attempt" in line]
    assert back["step"] == 25
    train_by_two(tmp_path / "again", objective=Breaking, **LONG)
    assert digest(tmp_path / "again") == digest(tmp_path / "run")


class Endless(AutoencoderObjective):
    """Its critic's loss is not finite from a step on, in the first attempt."""

    def loss(self, turn: str, batch: dict[str, Any], shared: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().loss(turn, batch, shared)
        return (loss * math.inf if turn == "critic" and batch["step"] >= 22 and not self.attempt else loss), logs


def test_losses_that_stay_infinite_are_a_collapse_too(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", objective=Endless, **LONG)
    (back,) = [line for line in lines(tmp_path / "run") if "attempt" in line]
    assert (back["back_from"], back["step"]) == (32, 20), "nothing is saved while steps are skipped"
    assert trainer.skipped == 0, "what was given up is not counted"


def test_after_two_returns_it_stops_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaking, "times", 3)
    with pytest.raises(Collapse, match=r"fell from .* dB.*Stopped at step \d+: 2 attempts .* ended like this"):
        train(tmp_path / "run", objective=Breaking, **LONG)
    steps = [int(entry.name[5:]) for entry in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == 25, "no checkpoint of a broken attempt is kept"
    assert not [line for line in lines(tmp_path / "run") if "attempt" in line and line["attempt"] > 2]


def test_a_checkpoint_is_made_before_the_critic_first_learns(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", steps=4, save_every=100)
    with trainer.run:
        trainer.train()
    assert trainer.run.store.steps() == [3, 4]


def test_without_a_checkpoint_a_collapse_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path / "run", objective=Breaking, **LONG)
    monkeypatch.setattr(trainer, "save", lambda last=False: None)
    with trainer.run, pytest.raises(Collapse, match="no checkpoint is good"):
        trainer.train()


STARTED = {"steps": 96, "save_every": 48, "log_every": 10, "kind": "kl"}
FROM, BACK = 40, 36
"""The step from which the critic counts, and the steps after it in which the reconstruction has to be back."""


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_the_start_of_the_critic_does_no_lasting_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Ten seeds (eight of them slow): nothing not finite, and the error back within 10 %."""
    settings = Adversarial(start=FROM, warmup=12, ramp=12, network=CriticConfig(channels=8, layers=1))
    for name, value in {"adversarial": settings, "equivariance": 0.0, "latent_noise": 0.0}.items():
        monkeypatch.setitem(LOSS, name, value)
    trainer = make(tmp_path / "run", objective=lambda net, weights, _: _seeded(net, weights, seed), **STARTED)
    with trainer.run:
        trainer.train()
    assert trainer.skipped == 0
    assert trainer.objective.attempt == 0
    errors = {line["step"]: line["autoencoder/l1"] for line in lines(tmp_path / "run") if "autoencoder/l1" in line}
    assert all(torch.isfinite(value).all() for value in tables(tmp_path / "run").values() if value.is_floating_point())
    before = sum(errors[step] for step in (FROM - 10, FROM)) / 2
    after = [errors[step] for step in errors if step > FROM + BACK]
    assert max(after) < 1.1 * before
    weights = [value for line in lines(tmp_path / "run") if (value := line.get("autoencoder/adaptive_weight"))]
    assert min(weights) > 0.001, "it does count"


def _seeded(net: Autoencoder, weights: ReconstructionLoss, seed: int) -> AutoencoderObjective:
    torch.manual_seed(seed)
    return AutoencoderObjective(Autoencoder(net.config), weights, seed)
