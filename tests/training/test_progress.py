"""What is shown while a run goes on."""

import logging
import sys

from latentkit.training.run import progress
from latentkit.training.run.progress import Progress, clock, say, warn


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with Progress(steps=8, batch=20) as shown:
        for step in range(1, 9):
            shown.begin()
            shown.update(step, 0.25)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "step 2/8  loss 0.25  2 pictures/s  0:01:00 left"
    assert len(lines) == 4
    assert lines[-1].startswith("step 8/8")
    assert shown.rate == 2.0


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(steps=2, batch=4) as shown:
        shown.begin()
        shown.update(2, 0.5)
    captured = capsys.readouterr()
    assert "loss 0.5" in captured.err
    assert "2/2" in captured.err
    assert captured.out == ""


def test_other_ranks_are_silent(capsys):
    with Progress(steps=1, batch=4, silent=True) as shown:
        shown.begin()
        shown.update(1, 0.5)
    assert capsys.readouterr().err == ""


def test_silence_is_for_what_goes_well(capsys):
    log = logging.getLogger("latentkit")
    log.setLevel(logging.ERROR)
    try:
        say("all is well")
        with Progress(steps=1, batch=4) as shown:
            shown.begin()
            shown.update(1, 0.5)
        warn("a checkpoint is damaged")
    finally:
        log.setLevel(logging.NOTSET)
    assert capsys.readouterr().err == "a checkpoint is damaged\n"
    say("all is well")
    assert capsys.readouterr().err == "all is well\n"


def test_clock():
    assert clock(3723.4) == "1:02:03"
    assert clock(-1) == "0:00:00"
