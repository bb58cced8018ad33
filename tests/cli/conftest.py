"""The command line as a person types it, inside of the test's process."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentkit import cli

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in the test's own folder, which is empty at first; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["latentkit", *words])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
            cli.LOG.setLevel("NOTSET")
        return 0

    return call
