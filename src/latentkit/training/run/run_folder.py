"""The folder of a run: its recipe, its journals, its samples and its checkpoints, held by one process at a time."""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from latentkit.errors import InputError
from latentkit.training.run.progress import warn
from latentkit.training.run.store import FileCalls, Store, make_folder, persist, replace_file, tensor_bytes

OURS = {".lock", "tmp-recipe.yaml"}  # all that a run killed before its recipe was written can hold


class Journal:
    """A file of JSON lines that only grows; lines the disk refuses wait in memory for the next try."""

    def __init__(self, path: Path, calls: FileCalls) -> None:
        self.path = path
        self.calls = calls
        self.descriptor = calls.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.length = path.read_bytes().rfind(b"\n") + 1  # a torn last line is not kept
        self.pending = b""
        calls.truncate(self.descriptor, self.length)

    def cut(self, length: int) -> None:
        """Forget everything after `length` bytes."""
        if self.length < length:
            warn(f"{self.path} is shorter than at the checkpoint ({self.length} of {length} bytes): lines are missing.")
        self.length = min(length, self.length)
        self.pending = b""
        self.calls.truncate(self.descriptor, self.length)

    def add(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        self.pending += json.dumps({key: _finite(value) for key, value in line.items()}).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            warn(f"{self.path}: {error}; the line is kept and written with the next.")

    def sync(self) -> int:
        """Make every line durable; returns the length in bytes; raises OSError."""
        self._flush()
        self.calls.fsync(self.descriptor)
        return self.length

    def close(self) -> None:
        """Close the file."""
        self.calls.close(self.descriptor)

    def _flush(self) -> None:
        if not self.pending:
            return
        os.lseek(self.descriptor, self.length, os.SEEK_SET)
        view = memoryview(self.pending)
        while view:
            view = view[self.calls.write(self.descriptor, view) :]
        self.length += len(self.pending)
        self.pending = b""


class RunFolder:
    """One run on disk: `recipe.yaml`, `metrics.jsonl`, `timings.jsonl`, `samples/`, `checkpoints/`.

    `recipe` is the resolved recipe as plain values. Raises InputError when the folder holds another recipe (with the
    difference), something that is not a run, or is in use. With `writes` False (every rank but the first) nothing is
    made, locked or written.
    """

    def __init__(
        self, path: Path | str, recipe: dict[str, Any], calls: FileCalls | None = None, writes: bool = True
    ) -> None:
        self.path = Path(path)
        self.recipe = json.loads(json.dumps(recipe))
        self.calls = calls or FileCalls()
        self.samples = self.path / "samples"
        self.snapshots = self.path / "snapshots"
        self.store = Store(self.path / "checkpoints", self.calls)
        self.writes = writes
        self._board: Any = None
        if writes:
            self._lock = persist(self.calls, f"run folder {self.path}", self._claim)
            try:
                persist(self.calls, f"run folder {self.path}", self._open)
            except BaseException:
                os.close(self._lock)
                raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, step: int, metrics_length: int) -> None:
        """Cut metrics.jsonl back to where it stood at the checkpoint the run goes on from; opens TensorBoard's log."""
        if self.writes:
            persist(self.calls, str(self.metrics.path), lambda: self.metrics.cut(metrics_length))
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics: only what is the same on every repetition of the run belongs here."""
        if self.writes:
            self.metrics.add({"step": step, **values})
            for name, value in values.items():
                if self._board and isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def time(self, step: int, values: dict[str, Any]) -> None:
        """One line of timings.jsonl."""
        if self.writes:
            self.timings.add({"step": step, **values})

    def snapshot(self, step: int, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        """Store tensors as `snapshots/step-XXXXXXXX.safetensors`; raises SaveError."""
        target = self.snapshots / f"step-{step:08d}.safetensors"

        def write() -> None:
            make_folder(self.calls, self.snapshots)
            replace_file(self.calls, target, tensor_bytes(tensors, metadata))

        if self.writes:
            persist(self.calls, f"snapshot {target}", write)

    def close(self) -> None:
        """Let go of the folder."""
        if self.writes:
            self.metrics.close()
            self.timings.close()
            if self._board:
                self._board.close()
            os.close(self._lock)
            self.writes = False

    def _claim(self) -> int:
        """The descriptor of the lock, which a process that forks does not hand on and a kill sets free."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run folder {self.path} is a file; name another folder.")
        foreign = self.path.is_dir() and not (self.path / "recipe.yaml").exists()
        if foreign and (found := {entry.name for entry in self.path.iterdir()} - OURS):
            raise InputError(
                f"{self.path} is not a run folder (it has no recipe.yaml but holds {', '.join(sorted(found)[:3])}); "
                "name a new or an empty folder. Nothing was changed."
            )
        make_folder(self.calls, self.path)
        lock = self.calls.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(lock)
                raise InputError(f"{self.path} is in use by another process; wait or name another run.") from error
            warn(f"{self.path} cannot be locked ({error}): see that no other process trains into it")
        return lock

    def _open(self) -> None:
        recipe = self.path / "recipe.yaml"
        if recipe.exists():
            self._compare(recipe)
        else:
            replace_file(self.calls, recipe, [yaml.safe_dump(self.recipe, sort_keys=False).encode()])
        for folder in (self.samples, self.store.folder):
            make_folder(self.calls, folder)
        self.metrics = Journal(self.path / "metrics.jsonl", self.calls)
        self.timings = Journal(self.path / "timings.jsonl", self.calls)
        self.store.clean()

    def _compare(self, path: Path) -> None:
        try:
            known = json.loads(json.dumps(yaml.safe_load(path.read_bytes())))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); name another run folder.") from error
        if known != self.recipe:
            lines = "\n".join(f"  {line}" for line in _differences(known, self.recipe))
            raise InputError(
                f"{self.path} holds a run of another recipe (run folder -> asked for):\n{lines}\n"
                "Ask for the same recipe to go on with that run, or name another run folder. Nothing was changed."
            )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            below = f"{name}.{key}" if name else str(key)
            if key in old and key in new:
                yield from _differences(old[key], new[key], below)
            else:
                yield f"{below}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
    elif old != new:
        yield f"{name or 'recipe'}: {old} -> {new}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
