"""Real training steps on this machine, timed, weighed and thrown away."""

import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from latentkit.applications.generate import draw
from latentkit.applications.stages.train_autoencoder import pairs
from latentkit.applications.stages.train_diffusion import build_model, sampling_defaults, validate
from latentkit.data.dataset import Pictures, free_memory
from latentkit.data.loader import Batch, Loader
from latentkit.data.order import Order
from latentkit.data.source import Source
from latentkit.errors import InputError
from latentkit.evaluation.reconstruction import reconstruction
from latentkit.model.first_stage import FirstStage
from latentkit.training import distributed
from latentkit.training.diffusion import DiffusionObjective
from latentkit.training.first_stage.autoencoder import AutoencoderObjective
from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe, resolved
from latentkit.training.run.interrupt import Stopped
from latentkit.training.run.progress import say
from latentkit.training.run.run_folder import RunFolder
from latentkit.training.trainer import Callback, Trainer

FOREVER = 10**9
WARM = 2  # steps that are not timed
LEAST_TIMED, MOST_TIMED = 4, 200  # steps
TIMED = 6.0  # seconds of steps
DISTINCT = 4  # batches that they go round
LOOKED = 4  # held-out pictures
DRAWN = 8
MEMORY_SHARE = 0.8  # of what is free, that a step may take

Batches = list[Batch]


class Measured(BaseModel):
    """One stage on this machine: seconds a step, bytes at its peak, pictures a forward pass (None: the batch).

    The rest is in seconds too: what all threads compute in a step; to write a checkpoint; to read a picture the first
    time; and, of a picture each, to encode it, to measure a held-out one in a look, to draw one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    memory: int
    micro_batch: int | None = None
    thread_seconds: float = 0.0
    save: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    look: float = 0.0
    draw: float = 0.0


class _Enough(Exception):
    """Ends a rehearsal."""


def rehearse(
    recipe: AutoencoderRecipe | DiffusionRecipe,
    objective: Any,
    batches: Callable[[], Iterator[Batches]],
    watch: Callable[[int, float], bool],
    after: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Training steps of the recipe, by the trainer itself and without a fall of the learning rate.

    `watch(step, loss)` is called after each and ends them by True; loss is NaN for a step that was skipped. `after`
    is called with the trainer when they have ended. The objective keeps its weights, and nothing else remains.
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
            try:
                trainer.train()
            except Stopped:
                say("stopped while steps were tried; run the same command to go on")
                raise
        after(trainer)


def measure_autoencoder(recipe: AutoencoderRecipe, train: Pictures) -> Measured:
    """Time and memory of the first stage on pictures of the data set."""
    torch.manual_seed(recipe.seed)
    first_stage = FirstStage(recipe.network, recipe.network.picture_channels)
    autoencoder = first_stage.autoencoder
    assert autoencoder is not None
    order = Order(len(train), recipe.schedule.batch, recipe.seed, train.buckets)
    loader = Loader(train, order, workers=recipe.data.workers)
    batches, first = _taken(loader)
    _, again = _taken(loader)
    drawn = [int(index) for (batch,) in batches for index in batch["index"]]
    kept = again < first / 2  # in memory, and read once
    found: dict[str, float] = {"decode": first / len(set(drawn) if kept else drawn)}

    def rest(trainer: Trainer) -> None:
        pixels = batches[0][0]["pixels"].to(trainer.device)
        with trainer.ema.applied():
            found["look"] = (
                _seconds(lambda: reconstruction(itertools.islice(pairs(autoencoder, train), LOOKED))) / LOOKED
            )
            with torch.inference_mode():
                found["encode"] = _seconds(lambda: first_stage.moments(pixels).cpu()) / len(pixels)

    def objective() -> Any:
        return AutoencoderObjective(autoencoder, recipe.loss, recipe.seed)

    # Pictures that are not kept in memory are read again in every step, beside it where there are workers.
    load = again / DISTINCT
    measured = _measure(recipe, objective, [batch for (batch,) in batches], rest)
    seconds = max(measured.seconds, load) if recipe.data.workers else measured.seconds + load
    return measured.model_copy(update={**found, "seconds": seconds})


def measure_diffusion(recipe: DiffusionRecipe, autoencoder: AutoencoderRecipe, train: Pictures) -> Measured:
    """Time and memory of the second stage on latents drawn at random."""
    first_stage = FirstStage(autoencoder.network, autoencoder.network.picture_channels)
    side = recipe.data.transform.size // first_stage.downsampling
    latents = _Noise(train.source, torch.randn(2 * first_stage.latent_channels, side, side))
    order = Order(len(train), recipe.schedule.batch, recipe.seed)
    batches = [batch for (batch,) in _taken(Loader(latents, order))[0]]
    model = build_model(recipe, first_stage, train.source, train.shapes[train.commonest])
    found: dict[str, float] = {}

    def objective() -> Any:
        return DiffusionObjective(model, recipe.loss, recipe.seed)

    def rest(trainer: Trainer) -> None:
        held = [{name: value if name == "step" else value[:LOOKED] for name, value in batches[0].items()}]
        defaults = sampling_defaults(recipe)
        model.eval()
        bf16 = recipe.schedule.precision == "bf16"
        with trainer.ema.applied(), torch.autocast(trainer.device.type, torch.bfloat16, enabled=bf16):
            found["look"] = _seconds(lambda: validate(trainer.objective, held)) / LOOKED
            found["draw"] = _seconds(lambda: list(draw(model, defaults, [None] * DRAWN, range(DRAWN)))) / DRAWN

    return _measure(recipe, objective, batches, rest).model_copy(update=found)


def _taken(loader: Loader) -> tuple[list[Batches], float]:
    """The first batches, and the seconds that they took."""
    begun = time.monotonic()
    return list(itertools.islice(loader.batches(), DISTINCT)), time.monotonic() - begun


def _seconds(action: Callable[[], Any]) -> float:
    """Seconds of what is done, warm: the mean of two times."""
    action()
    begun = time.monotonic()
    action()
    action()
    return (time.monotonic() - begun) / 2


class _Noise:
    """Latents of any picture before there is an encoder."""

    field = "moments"

    def __init__(self, source: Source, moments: Tensor) -> None:
        self.source = source
        self.moments = moments

    def take(self, index: int, draw: int) -> tuple[int, Tensor]:
        return index, self.moments


def _measure(
    recipe: Any, objective: Callable[[], Any], batches: list[Batch], rest: Callable[[Trainer], None]
) -> Measured:
    """First the memory at two small batches, then time and memory at the largest micro-batch that fits."""
    device = distributed.pick_device(recipe.schedule.device)
    size = recipe.schedule.batch
    allowed = MEMORY_SHARE * (available(device) + _used(device))
    try:
        pair = (max(1, size // 8), max(2, size // 4))
        weights = {count: _steps(recipe, objective(), batches[:1], count, count, 2).memory for count in pair}
    except torch.OutOfMemoryError:
        raise _too_large(f"{size // 4} pictures at a time do not fit", allowed) from None
    micro = portion(size, weights, allowed)
    saved: list[float] = []

    def after(trainer: Trainer) -> None:
        begun = time.monotonic()
        trainer.save()
        saved.append(time.monotonic() - begun)
        rest(trainer)

    timed = _steps(recipe, objective(), batches, size, micro, None, after)
    return Measured(**timed._asdict(), micro_batch=None if micro == size else micro, save=saved[0])


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


class _Timed(NamedTuple):
    """Seconds of a step, those that its threads computed, and bytes at most."""

    seconds: float
    thread_seconds: float
    memory: int


def _steps(
    recipe: Any,
    objective: Any,
    batches: list[Batch],
    size: int,
    micro: int,
    count: int | None,
    after: Callable[[Trainer], None] = lambda trainer: None,
) -> _Timed:
    """Means over the later of `count` steps of `size` pictures (None: as many as are timed)."""
    device = distributed.pick_device(recipe.schedule.device)
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"batch": size})})
    parts = [[_rows(batch, start, start + micro) for start in range(0, size, micro)] for batch in batches]
    times: list[float] = []
    computed: list[float] = []
    peak = 0

    def watch(step: int, loss: float) -> bool:
        times.append(time.monotonic())
        computed.append(time.process_time())
        if count is not None:
            return step == count
        timed = step - WARM
        return timed >= LEAST_TIMED and (timed >= MOST_TIMED or times[-1] - times[WARM - 1] >= TIMED)

    def ended(trainer: Trainer) -> None:
        nonlocal peak
        peak = _peak(device)
        after(trainer)

    _reset(device)
    rehearse(recipe, objective, lambda: itertools.cycle(parts), watch, ended)
    mean, busy = ((row[-1] - row[WARM - 1]) / max(1, len(row) - WARM) for row in (times, computed))
    return _Timed(mean, busy, peak)


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
