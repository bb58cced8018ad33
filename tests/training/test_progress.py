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


def test_portions_are_the_time_of_steps_alone(monkeypatch):
    """What lies between two steps is not counted; steps done again after a return begin a portion of their own."""
    now, busy = [0.0], [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "process_time", lambda: busy[0])

    def step(number, seconds):
        now[0] += 100  # samples, saving
        busy[0] += 50
        shown.begin()
        now[0] += seconds
        busy[0] += 2 * seconds
        shown.update(number, 0.5)

    with Progress(steps=20, batch=4, silent=True) as shown:
        assert shown.portion() == {}
        step(11, 1.0)
        step(12, 2.0)
        assert shown.portion() == {"since": 10, "seconds": 3.0, "thread_seconds": 6.0}
        assert shown.portion() == {}
        step(13, 4.0)
        step(9, 8.0)
        assert shown.portion() == {"since": 8, "seconds": 8.0, "thread_seconds": 16.0}


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
