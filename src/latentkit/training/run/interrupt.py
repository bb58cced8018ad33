"""SIGTERM and Ctrl-C, noted and answered between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from latentkit.training.run.progress import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal ended what was done, in a state that can be taken up; the person was told."""


@contextmanager
def told() -> Iterator[None]:
    """Where a signal ends what is done in this context between its runs: say so, and raise Stopped."""
    try:
        yield
    except Stopped:
        raise
    except (KeyboardInterrupt, SystemExit) as end:
        say("stopped; run the same command to go on")
        raise Stopped(end.code if isinstance(end, SystemExit) else 128 + signal.SIGINT) from None


class Interrupt:
    """Within the context a signal sets `signal` and does nothing else: further ones during a save are harmless."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
