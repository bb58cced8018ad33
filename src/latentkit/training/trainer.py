"""The training loop: an objective's turns, micro-batches, optimisers, averages and checkpoints, resumed bit by bit."""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from latentkit import __version__
from latentkit.errors import InputError
from latentkit.training import distributed
from latentkit.training.collapse import Collapse
from latentkit.training.ema import Averaging, Ema
from latentkit.training.optimizers import Optimiser, Stepper
from latentkit.training.run.interrupt import Interrupt, Stopped
from latentkit.training.run.progress import Progress, say, warn
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.run.store import Checkpoint, Damaged, SaveError, Store, Tables, persist

MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient before the run stops
MOST_ATTEMPTS = 2  # returns to a checkpoint from before a collapse before the run stops


class Schedule(BaseModel):
    """How long a run is, in what portions, and how often it reports."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)  # pictures a step, over all processes
    micro_batch: int | None = Field(
        default=None, gt=0
    )  # pictures a forward pass, on one process; null: the whole batch
    save_every: int = Field(default=1000, gt=0)
    log_every: int = Field(default=50, gt=0)
    sample_every: int | None = Field(default=1000, gt=0)  # null: no samples and no figures of held-out pictures
    precision: Literal["bf16", "float32"] = "float32"
    device: str = "auto"

    @model_validator(mode="after")
    def _portions(self) -> Self:
        if self.micro_batch and self.micro_batch > self.batch:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch {self.batch}")
        return self


class Callback(NamedTuple):
    """Something that is done every so many steps, and after the last: called as call(step, trainer) on every rank."""

    every: int
    call: Callable[[int, "Trainer"], None]


class NotFinite(InputError):
    """Training stopped because losses or gradients were not finite many times in a row."""


class Trainer:
    """Trains an objective into a run folder, from the newest good checkpoint if there is one.

    `batches(step)` gives, from that step on, the lists of this rank's micro-batches. `optimiser` is one for all turns
    or one for each. The averages are those of the first turn's parameters.

    An objective may also have: `shared`, names of tensors that are kept from step to step; `summed`, names of what its
    losses leave to be added up over the global batch, for `settle(turn, step, sums, shared)` after the turn's weights
    moved, which returns what to log; `active(turn, step)`; `doubtful(shared)`, when nothing is saved; and `attempt`,
    the number of returns to an earlier checkpoint after a `Collapse`.
    """

    def __init__(
        self,
        objective: Any,
        batches: Callable[[int], Iterator[list[dict[str, Any]]]],
        run: RunFolder,
        *,
        schedule: Schedule,
        optimiser: Optimiser | Mapping[str, Optimiser],
        averaging: Averaging | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
    ) -> None:
        self.objective = objective
        self.batches = batches
        self.run = run
        self.schedule = schedule
        self.callbacks = callbacks
        self.seed = seed
        self.device = distributed.pick_device(schedule.device)
        self.world = distributed.join(self.device)
        self.module: nn.Module = objective.module.to(self.device).to(memory_format=torch.channels_last)
        self.turns: dict[str, list[tuple[str, nn.Parameter]]] = objective.turns()
        self.kept: Sequence[str] = getattr(objective, "shared", ())
        self.summed: Sequence[str] = getattr(objective, "summed", ())
        elementwise = getattr(objective, "elementwise", None)
        self.optimisers = {
            turn: Stepper(parameters, optimiser[turn] if isinstance(optimiser, Mapping) else optimiser, elementwise)
            for turn, parameters in self.turns.items()
        }
        self.averaging = averaging or Averaging()
        self.ema = Ema(next(iter(self.turns.values())), self.averaging)
        self.step = 0  # finished steps
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.shared: dict[str, Tensor] = {}  # what the objective keeps from step to step
        self.window: dict[str, list[float]] = {}  # name -> [weighted sum, weight] since the last line of metrics
        self.progress = Progress(schedule.steps, schedule.batch, silent=not self.world.main)

    def train(self) -> None:
        """Run to the last step.

        Raises Stopped(143 or 130) after saving on SIGTERM or Ctrl-C, NotFinite, or SaveError where the last
        checkpoint cannot be written.
        """
        with Interrupt() as interrupt:
            self._resume()
            if self.step == self.schedule.steps:
                return
            stream = self.batches(self.step)
            with self.progress:
                while self.step < self.schedule.steps:
                    self.progress.begin()
                    try:
                        loss = self._step([_moved(batch, self.device) for batch in next(stream)])
                    except (Collapse, NotFinite) as error:
                        self._return(error)
                        stream = self.batches(self.step)
                        continue
                    self.progress.update(self.step, loss)
                    self._report()
                    signal = distributed.largest(interrupt.signal)
                    last = signal > 0 or self.step == self.schedule.steps
                    if last or self.step % self.schedule.save_every == 0 or self._begins():
                        self.save(last)
                    self._stop(signal)
            self._stop(distributed.largest(interrupt.signal))  # one that came in the last save

    def _stop(self, signal: int) -> None:
        """Say that a signal ends the run, and end it; nothing where there was none."""
        if signal:
            if not self.progress.silent:
                say(f"stopped by signal {signal} after step {self.step}; run the same command to go on")
            raise Stopped(128 + signal)

    def log(self, values: Mapping[str, float]) -> None:
        """Write values of the present step into the metrics (for callbacks); they must not hold times."""
        self.run.log(self.step, dict(values))

    def rate(self, turn: str) -> float:
        """The learning rate of a turn at the present step."""
        return self.optimisers[turn].settings.rate(min(self.step, self.schedule.steps - 1), self.schedule.steps)

    def _step(self, batches: list[dict[str, Any]]) -> float:
        """One step of every turn; returns the first turn's loss over the global batch."""
        # Dropout is a function of (seed, step, rank), whatever ran before: no generator's state has to be kept.
        seed = self.seed + 7_919 * getattr(self.objective, "attempt", 0)
        torch.manual_seed(((seed * 1_000_003 + self.step) * 65_537 + self.world.rank) % 2**63)
        before = dict(self.shared)
        handed: list[dict[str, Tensor]] = [{} for _ in batches]
        values: dict[str, list[float]] = {}
        first = math.nan
        for turn, stepper in self.optimisers.items():
            if not self._active(turn, self.step):
                continue
            prefix = f"{turn}/" if len(self.turns) > 1 else ""
            loss, norm, logs, sums = self._gradients(turn, batches, handed)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.shared = before
                self._skip(turn, loss, norm, batches)
                return loss
            if stepper.settings.clip and norm > stepper.settings.clip:
                gradients = [p.grad for _, p in self.turns[turn] if p.grad is not None]
                torch._foreach_mul_(gradients, stepper.settings.clip / norm)
            stepper.step(self.rate(turn))
            for _, parameter in self.turns[turn]:
                parameter.grad = None
            if self.summed:
                settled = self.objective.settle(turn, self.step, sums, self.shared)
                logs |= {name: [value, 1.0] for name, value in settled.items()}
            values |= {prefix + name: pair for name, pair in logs.items()}
            values |= {f"{prefix}loss": [loss, 1.0], f"{prefix}grad_norm": [norm, 1.0]}
            first = loss if math.isnan(first) else first
        for name, (total, weight) in values.items():
            entry = self.window.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        self.ema.update()
        self.skipped_in_a_row = 0
        self.step += 1
        return first

    def _gradients(
        self, turn: str, batches: list[dict[str, Any]], handed: list[dict[str, Tensor]]
    ) -> tuple[float, float, dict[str, list[float]], dict[str, Tensor]]:
        """Leave a turn's gradients, of the mean over the global batch, in its parameters.

        Returns that mean, the gradients' norm, this rank's logs as [weighted sum, weight], and the global batch's sums.
        """
        if len(self.turns) > 1:
            for other, parameters in self.turns.items():
                for _, parameter in parameters:
                    parameter.requires_grad_(other == turn)
        bf16 = self.schedule.precision == "bf16"
        total = torch.zeros((), device=self.device)
        sums: dict[str, tuple[Tensor, float]] = {}
        added: dict[str, Tensor] = {}
        for batch, shared in zip(batches, handed, strict=True):
            weight = len(batch["draw"]) / self.schedule.batch
            shared |= self.shared
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss, logs = self.objective.loss(turn, batch, shared)
            (loss * weight).backward()
            total += loss.detach() * weight
            self.shared = {name: shared[name].detach() for name in self.kept if name in shared}
            for name in self.summed:
                if name in shared:
                    part = shared.pop(name).detach().float()
                    added[name] = added[name] + part if name in added else part
            for name, value in logs.items():
                sum_before, weight_before = sums.get(name, (0.0, 0.0))
                sums[name] = (sum_before + value.detach().float() * weight, weight_before + weight)
        gradients = []
        for _, parameter in self.turns[turn]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        distributed.sum_([*gradients, total, *added.values()])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        host = torch.stack([total, norm, *(value for value, _ in sums.values())]).tolist()
        logged = {name: [value, weight] for (name, (_, weight)), value in zip(sums.items(), host[2:], strict=True)}
        return host[0], host[1], logged, added

    def _skip(self, turn: str, loss: float, norm: float, batches: list[dict[str, Any]]) -> None:
        """Count and record a step whose loss or gradient is not finite; raises NotFinite after ten in a row."""
        for parameters in self.turns.values():
            for _, parameter in parameters:
                parameter.grad = None
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.step += 1
        used = [int(i) for part in distributed.gather(_indices(batches)) for i in part]
        self.run.log(self.step, {"skipped": self.skipped, "turn": turn, "loss": loss, "grad_norm": norm, "index": used})
        if self.world.main:
            row = self.skipped_in_a_row
            warn(f"step {self.step} skipped, {row} in a row: {turn} has loss {loss}, gradient norm {norm}")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise NotFinite(
                f"loss or gradient was not finite {MOST_SKIPPED} times in a row, up to step {self.step}: stopped. The "
                f"pictures of each skipped step are in metrics.jsonl. {self._advice()}"
            )

    def _active(self, turn: str, step: int) -> bool:
        active = getattr(self.objective, "active", None)
        return active is None or active(turn, step)

    def _begins(self) -> bool:
        """Whether a turn's first step is the next: from here on a run may have to go back."""
        return any(self._active(turn, self.step) and not self._active(turn, self.step - 1) for turn in self.turns)

    def _doubtful(self) -> bool:
        """Whether the present weights are not worth returning to."""
        known = getattr(self.objective, "doubtful", None)
        return known is not None and (self.skipped_in_a_row > 0 or known(self.shared))

    def _return(self, error: Exception) -> None:
        """Go back to the newest good checkpoint with the number of attempts raised, or raise the error."""
        tried = getattr(self.objective, "attempt", None)
        if tried is None or len(self.turns) == 1:
            raise error
        store = self.run.store
        step = distributed.largest(_newest_good(store) if self.world.main else -1)
        if tried >= MOST_ATTEMPTS or step < 0:
            why = (
                f"{tried} attempts from an earlier checkpoint ended like this" if step >= 0 else "no checkpoint is good"
            )
            raise type(error)(f"{error} Stopped at step {self.step}: {why}. {self._advice()}") from error
        if self.world.main:
            warn(f"{error} Step {self.step}: going back to step {step}, attempt {tried + 1} of {MOST_ATTEMPTS}")
        left, checkpoint = self.step, store.read(step)
        distributed.barrier()  # every process has read it
        if self.world.main:
            store.forget(step)
        self._restore(checkpoint)
        self.objective.attempt = tried + 1
        for _, parameter in self.module.named_parameters():
            parameter.grad = None
        self.run.resume(step, checkpoint.state["metrics_length"])
        self.log({"attempt": tried + 1, "back_from": left})

    def _advice(self) -> str:
        return (
            f"The checkpoints in {self.run.store.folder} are good. In a new run try a lower learning rate, a longer "
            "warm-up, or precision float32."
        )

    def _report(self) -> None:
        """Metrics, snapshots and callbacks of the step just finished."""
        last = self.step == self.schedule.steps
        if last or self.step % self.schedule.log_every == 0:
            merged = _merged(distributed.gather(self.window))
            self.window = {}
            rates = {"lr" if len(self.turns) == 1 else f"{turn}/lr": self.rate(turn) for turn in self.turns}
            self.log({name: total / weight for name, (total, weight) in merged.items()} | rates)
            rate = {"pictures_per_second": self.progress.rate, "unix_time": time.time()}
            self.run.time(self.step, rate | self.progress.portion())
        if self.averaging.snapshot_every and (last or self.step % self.averaging.snapshot_every == 0):
            try:
                self.run.snapshot(self.step, *self.ema.snapshot())
            except SaveError as error:
                warn(f"{error} Training goes on without this snapshot.")
        for callback in self.callbacks:
            if last or self.step % callback.every == 0:
                modes = [(module, module.training) for module in self.module.modules()]
                callback.call(self.step, self)
                for module, training in modes:
                    module.training = training

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of the present step; one that fails is tried again later unless it is the last."""
        windows = distributed.gather(self.window)
        if not self.world.main:
            return
        if not last and self._doubtful():
            warn(f"step {self.step} is not saved: it is worse than what was saved before")
            return
        tables: Tables = {"weights": self.module.state_dict(), **self.ema.tables()}
        tables |= {f"optimiser-{turn}": stepper.table() for turn, stepper in self.optimisers.items()}
        if self.shared:
            tables["shared"] = self.shared
        if not all(bool(torch.isfinite(t).all()) for t in tables["weights"].values() if t.is_floating_point()):
            if last:
                raise NotFinite(f"the weights of step {self.step} are not finite: not saved. {self._advice()}")
            warn(f"the weights of step {self.step} are not finite: not saved")
            return
        begun = time.monotonic()
        try:
            state = {
                "step": self.step,
                "ema_updates": self.ema.updates,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "attempt": getattr(self.objective, "attempt", 0),
                "doubtful": self._doubtful(),
                "windows": windows,
                "metrics_length": persist(self.run.calls, str(self.run.metrics.path), self.run.metrics.sync),
                "machine": _machine(self.world.size),
            }
            self.run.store.save(self.step, tables, state)
        except SaveError as error:
            if last:
                raise
            warn(f"{error} Training goes on; the next try is after {self.schedule.save_every} steps.")
            return
        self.run.time(self.step, {"save_seconds": time.monotonic() - begun, **self.progress.portion()})

    def _resume(self) -> None:
        """Take up the newest good checkpoint, the same on every rank."""
        checkpoint = self.run.store.load() if self.world.main else None
        step = distributed.largest(checkpoint.step if checkpoint else -1)
        if step < 0:
            self.run.resume(0, 0)
            distributed.broadcast_([*self.module.state_dict().values()])
            self.ema.restart()
            return
        checkpoint = checkpoint or self.run.store.read(step)
        try:
            self._restore(checkpoint)
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{self.run.store.path(step)} does not fit this network ({error}); it was written by other code. "
                "Nothing was changed: use the version that wrote it, or name another run."
            ) from error
        self.run.resume(step, checkpoint.state["metrics_length"])
        machine, here = checkpoint.state["machine"], _machine(self.world.size)
        if self.world.main:
            say(f"going on from step {step} of {self.schedule.steps}")
            changed = [
                f"{key} {machine.get(key)} -> {value}" for key, value in here.items() if machine.get(key) != value
            ]
            if changed:
                say(f"not as before ({', '.join(changed)}): the result may differ in the last bits")

    def _restore(self, checkpoint: Checkpoint) -> None:
        tables, state = checkpoint.tables, checkpoint.state
        self.module.load_state_dict(tables["weights"])
        self.ema.restore(tables, state["ema_updates"])
        for turn, stepper in self.optimisers.items():
            stepper.restore(tables[f"optimiser-{turn}"])
        self.shared = {name: value.to(self.device) for name, value in tables.get("shared", {}).items()}
        self.step = checkpoint.step
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if hasattr(self.objective, "attempt"):
            self.objective.attempt = state.get("attempt", 0)
        windows = state["windows"]
        if len(windows) == self.world.size:
            self.window = windows[self.world.rank]
        else:
            self.window = _merged(windows) if self.world.main else {}


def _newest_good(store: Store) -> int:
    """The step of the newest whole checkpoint that was not doubtful; -1 for none."""
    for step in reversed(store.steps()):
        try:
            if not store.read(step).state.get("doubtful", False):
                return step
        except Damaged:
            continue
    return -1


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _indices(batches: list[dict[str, Any]]) -> list[int]:
    return [int(i) for batch in batches for i in batch.get("index", batch["draw"])]


def _merged(windows: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Sums and weights of all ranks as one."""
    merged: dict[str, list[float]] = {}
    for window in windows:
        for name, (total, weight) in window.items():
            entry = merged.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
    return merged


def _machine(world: int) -> dict[str, Any]:
    """What equal bytes depend on besides the recipe."""
    return {
        "latentkit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": world,
    }
