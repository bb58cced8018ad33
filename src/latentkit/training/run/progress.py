"""What a person sees on stderr while a run goes on."""

import logging
import sys
import time
from collections.abc import Callable

PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
SMOOTHING = 0.95  # of the measured step time, per step


def quiet() -> bool:
    """Whether the person asked for silence: the logger `latentkit` passes on errors only."""
    return logging.getLogger("latentkit").getEffectiveLevel() >= logging.ERROR


def say(message: str) -> None:
    """One line for the person who watches, on stderr, unless they asked for silence."""
    if not quiet():
        warn(message)


def warn(message: str) -> None:
    """One line on stderr about what went wrong, also where silence was asked for."""
    print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """A bar on a terminal, a plain line every half minute elsewhere; silent on all ranks but the first."""

    def __init__(self, steps: int, batch: int, silent: bool = False) -> None:
        self.steps = steps
        self.batch = batch
        self.silent = silent or quiet()
        self.step_time: float | None = None
        self._portion: dict[str, float] = {}
        self._finished = -1
        self._show: Callable[[int, str], None] | None = None
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> "Progress":
        self._last = self._shown = time.monotonic()
        self._computed = time.process_time()
        if not self.silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            bar = Bar(*columns, console=Console(stderr=True))
            task = bar.add_task("", total=self.steps)
            bar.start()
            self._show = lambda step, text: bar.update(task, completed=step, description=text)
            self._close = bar.stop
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def rate(self) -> float:
        """Pictures per second of the training steps alone, smoothed."""
        return self.batch / self.step_time if self.step_time else 0.0

    def begin(self) -> None:
        """Start the clock of a step: what went before (samples, saving) is not counted."""
        self._last = time.monotonic()
        self._computed = time.process_time()

    def portion(self) -> dict[str, float]:
        """The steps since the last call: the step before them (`since`), their seconds and their `thread_seconds`.

        Those are what all threads of the process computed. Nothing where there was no step.
        """
        found, self._portion = self._portion, {}
        return found

    def update(self, step: int, loss: float) -> None:
        """Show that `step` steps are finished."""
        now = time.monotonic()
        taken = now - self._last
        if step != self._finished + 1 or not self._portion:
            self._portion = {"since": step - 1, "seconds": 0.0, "thread_seconds": 0.0}
        self._portion["seconds"] += taken
        self._portion["thread_seconds"] += time.process_time() - self._computed
        self._finished = step
        self.step_time = taken if self.step_time is None else SMOOTHING * self.step_time + (1 - SMOOTHING) * taken
        if self.silent:
            return
        remaining = clock((self.steps - step) * self.step_time)
        text = f"loss {loss:.4g}  {self.rate:.4g} pictures/s  {remaining} left"
        if self._show:
            self._show(step, text)
        elif now - self._shown >= PLAIN_EVERY or step == self.steps:
            self._shown = now
            say(f"step {step}/{self.steps}  {text}")
