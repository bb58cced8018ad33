"""Real training steps on this machine, timed, weighed and thrown away."""

import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from latentkit.applications.train_diffusion import build_model
from latentkit.data.dataset import Pictures, free_memory
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.data.source import Source
from latentkit.errors import InputError
from latentkit.model.first_stage import FirstStage
from latentkit.training import distributed
from latentkit.training.autoencoder import AutoencoderObjective
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe, resolved
from latentkit.training.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

FOREVER = 10**9
WARM, TIMED = 2, 3  # steps
MEMORY_SHARE = 0.8  # of what is free, that a step may take

Batches = list[dict[str, Any]]


class Measured(BaseModel):
    """One stage on this machine: seconds a step, bytes at its peak, pictures a forward pass (None: the batch)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    memory: int
    micro_batch: int | None = None
    decode: float = 0.0
    """Seconds to read and scale one picture the first time."""


class _Enough(Exception):
    """Ends a rehearsal."""


def rehearse(
    recipe: AutoencoderRecipe | DiffusionRecipe,
    objective: Any,
    batches: Callable[[], Iterator[Batches]],
    watch: Callable[[int, float], bool],
) -> None:
    """Training steps of the recipe, by the trainer itself and without a fall of the learning rate.

    `watch(step, loss)` is called after each and ends them by True; loss is NaN for a step that was skipped. The
    objective keeps its weights, and nothing else remains.
    """
    never = {"steps": FOREVER, "save_every": FOREVER, "log_every": FOREVER, "sample_every": FOREVER}
    schedule = recipe.schedule.model_copy(update=never)
    before = 0.0

    def look(step: int, trainer: Trainer) -> None:
        nonlocal before
        total = trainer.window.get("loss", [0.0])[0]
        loss, before = total - before, total
        if watch(step, loss if trainer.skipped_in_a_row == 0 else float("nan")):
            raise _Enough

    with (
        tempfile.TemporaryDirectory(prefix="latentkit-") as folder,
        RunFolder(Path(folder, "r"), resolved(recipe)) as run,
    ):
        trainer = Trainer(
            objective,
            lambda _: batches(),
            run,
            schedule=schedule,
            optimiser=recipe.optimiser,
            averaging=recipe.averaging,
            callbacks=[Callback(1, look)],
            seed=recipe.seed,
        )
        trainer.progress.silent = True
        with suppress(_Enough):
            trainer.train()


def measure_autoencoder(recipe: AutoencoderRecipe, train: Pictures) -> Measured:
    """Time and memory of the first stage's step on pictures of the data set."""

    def objective() -> Any:
        torch.manual_seed(recipe.seed)
        first_stage = FirstStage(recipe.network, recipe.network.picture_channels)
        assert first_stage.autoencoder is not None
        return AutoencoderObjective(first_stage.autoencoder, recipe.loss, recipe.seed)

    begun = time.monotonic()
    (batch,) = next(Loader(train, Order(len(train), recipe.schedule.batch, recipe.seed)).batches())
    distinct = len(set(batch["index"].tolist()))
    decode = (time.monotonic() - begun) / distinct
    return _measure(recipe, objective, batch).model_copy(update={"decode": decode})


def measure_diffusion(recipe: DiffusionRecipe, autoencoder: AutoencoderRecipe, source: Source) -> Measured:
    """Time and memory of the second stage's step on latents drawn at random."""
    first_stage = FirstStage(autoencoder.network, autoencoder.network.picture_channels)

    def objective() -> Any:
        return DiffusionObjective(build_model(recipe, first_stage, source), recipe.loss, recipe.seed)

    side = recipe.data.transform.size // first_stage.downsampling
    latents = _Noise(source, torch.randn(2 * first_stage.latent_channels, side, side))
    (batch,) = next(Loader(latents, Order(len(source), recipe.schedule.batch, recipe.seed)).batches())
    return _measure(recipe, objective, batch)


class _Noise:
    """Latents of any picture before there is an encoder."""

    field = "moments"

    def __init__(self, source: Source, moments: Tensor) -> None:
        self.source = source
        self.moments = moments

    def take(self, index: int, draw: int) -> tuple[int, Tensor]:
        return index, self.moments


def _measure(recipe: Any, objective: Callable[[], Any], batch: dict[str, Any]) -> Measured:
    """First the memory at two small batches, then time and memory at the largest micro-batch that fits."""
    device = distributed.pick_device(recipe.schedule.device)
    size = recipe.schedule.batch
    allowed = MEMORY_SHARE * (available(device) + _used(device))
    try:
        pair = (max(1, size // 8), max(2, size // 4))
        weights = {count: _steps(recipe, objective(), batch, count, count, 2)[1] for count in pair}
    except torch.OutOfMemoryError:
        raise _too_large(f"{size // 4} pictures at a time do not fit", allowed) from None
    micro = portion(size, weights, allowed)
    seconds, memory = _steps(recipe, objective(), batch, size, micro, WARM + TIMED)
    return Measured(seconds=seconds, memory=memory, micro_batch=None if micro == size else micro)


def portion(batch: int, weights: dict[int, int], allowed: float) -> int:
    """The largest share of `batch` whose memory, on the line through two measured ones, is `allowed`.

    `weights` is pictures -> bytes. InputError where not even one picture at a time fits.
    """
    (small, low), (larger, high) = sorted(weights.items())
    slope = max(0.0, (high - low) / (larger - small))
    for micro in range(batch, 0, -1):
        if batch % micro == 0 and low + slope * (micro - small) <= allowed:
            return micro
    raise _too_large(f"one picture at a time takes {low / 1e9:.1f} GB", allowed)


def _too_large(what: str, allowed: float) -> InputError:
    return InputError(
        f"training takes too much memory: {what}, and {allowed / 1e9:.1f} GB can be used; "
        "ask for smaller pictures with --size, or free some memory"
    )


def _steps(recipe: Any, objective: Any, batch: dict[str, Any], size: int, micro: int, count: int) -> tuple[float, int]:
    """Median seconds of the later ones of `count` steps of `size` pictures, and the bytes at their peak."""
    device = distributed.pick_device(recipe.schedule.device)
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"batch": size})})
    parts = [_rows(batch, start, start + micro) for start in range(0, size, micro)]
    times: list[float] = []

    def watch(step: int, loss: float) -> bool:
        times.append(time.monotonic())
        return step == count

    _reset(device)
    rehearse(recipe, objective, lambda: itertools.repeat(parts), watch)
    taken = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(taken[min(WARM, len(taken)) - 1 :]), _peak(device)


def _rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: value if name == "step" else value[start:stop] for name, value in batch.items()}


def available(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _used(device: torch.device) -> int:
    """Bytes that this process holds there."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _status("VmRSS") or _largest()


def _reset(device: torch.device) -> None:
    """Begin to look for the peak anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or _largest()


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    return 0


def _largest() -> int:
    """The largest memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
