"""What the drawing commands show and write: progress on stderr, new files and never old ones."""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from latentkit.errors import InputError

if TYPE_CHECKING:
    from latentkit.applications.generate import Progress

T = TypeVar("T")
WORTH_SHOWING = 2.0  # seconds of work below which nothing is shown
PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
LONGEST_NAME = 48


def show(events: "Iterator[Progress | T]") -> Iterator[T]:
    """The results among the events; progress with the remaining time goes to stderr where it is worth it."""
    from latentkit.applications.generate import Progress

    terminal = sys.stderr.isatty()
    quiet = not logging.getLogger("latentkit").isEnabledFor(logging.INFO)
    started = shown = time.monotonic()
    for event in events:
        if not isinstance(event, Progress):
            if terminal and shown > started:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            yield event
            continue
        now = time.monotonic()
        total = (now - started) / event.share
        if quiet or total < WORTH_SHOWING or not (terminal or now - shown >= PLAIN_EVERY):
            continue
        shown = now
        line = f"drawing {event.share:4.0%}  step {event.step}/{event.steps}  {total - (now - started):.0f} s left"
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


LONGEST_PART = 255
"""Bytes of a file's or folder's name that every system takes."""


def check_folder(folder: Path) -> None:
    """InputError where `write_new` could not write to the folder or make it; nothing is made yet."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if any(len(os.fsencode(part)) > LONGEST_PART for part in folder.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise InputError(f"pictures cannot go to {folder}: {error.strerror or error}", exit_code=2) from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise InputError(f"pictures cannot go to {folder}: {there} {why}; name another with --out", exit_code=2)


def slug(words: str) -> str:
    """Words as the beginning of a file name."""
    return re.sub(r"\W+", "-", words.lower()).strip("-")[:LONGEST_NAME].rstrip("-")


def write_new(folder: Path, name: str, suffix: str, data: bytes) -> Path:
    """Write `data` to `name.suffix`, or `name-2.suffix` and so on where that exists; returns the path.

    The folder is made where there is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"pictures cannot go to {folder}: {error.strerror or error}") from None
    number = 1
    while True:
        path = folder / (f"{name}.{suffix}" if number == 1 else f"{name}-{number}.{suffix}")
        try:
            with open(path, "xb") as file:
                try:
                    file.write(data)
                    file.flush()
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"{path} could not be written: {error.strerror or error}") from None
