"""What every test of files shares."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

RUNS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.",
    "pickle.find_class",
)
seen: list[str] = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(RUNS) else None)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Whatever a gadget would call is caught, and nothing is run."""
    called: list[str] = []
    for module, name in ((os, "system"), (os, "popen"), (os, "execv"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: called.append(name))
    seen.clear()
    yield called
    assert called == seen == []


@pytest.fixture
def quiet(idle: list[str]) -> Iterator[list[str]]:
    """The same, and a second is the most that a refusal may take."""
    start = time.process_time()
    yield idle
    assert time.process_time() - start < 1
