"""Checkpoints on disk, written so that no kill, full disk or flipped bit costs more than the save in hand.

A checkpoint is a folder `step-00001000` of safetensors tables, `state.json` and, written last, `manifest.json` with
the size and sha256 of each. It is written under a temporary name, flushed to the disk file by file and renamed whole.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from latentkit.errors import InputError
from latentkit.training.run.progress import warn

FORMAT = 1
WAITS = (0.1, 0.3, 1.0)  # seconds before each further try of a failed write
LARGEST_WRITE = 1 << 26
SMALL = 1 << 20  # bytes; smaller tensors are written together
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Tables = dict[str, dict[str, Tensor]]
T = TypeVar("T")


class FileCalls(NamedTuple):
    """Every call that changes the disk, in one table, so that a test can fail or kill each of them in turn."""

    mkdir: Callable[..., None] = os.mkdir
    open: Callable[..., int] = os.open
    write: Callable[..., int] = os.write
    truncate: Callable[..., None] = os.ftruncate
    fsync: Callable[..., None] = os.fsync
    close: Callable[..., None] = os.close
    rename: Callable[..., None] = os.rename
    unlink: Callable[..., None] = os.unlink
    rmdir: Callable[..., None] = os.rmdir
    sleep: Callable[..., None] = time.sleep


class SaveError(InputError):
    """The disk refused a save after every retry; nothing that was saved earlier is harmed."""


class Damaged(Exception):
    """A checkpoint does not hold what its manifest promises."""


class Checkpoint(NamedTuple):
    """What one checkpoint holds: tensors by table and name, and the JSON state."""

    step: int
    tables: Tables
    state: dict[str, Any]


def persist(calls: FileCalls, what: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again after short waits while the disk refuses; raises SaveError in the end."""
    for wait in (*WAITS, None):
        try:
            return action()
        except (OSError, Damaged) as error:
            if wait is None:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "free some space on that disk" if full else "look at the disk and its permissions"
                raise SaveError(
                    f"could not save {what}: {error}. What was saved before is unharmed; {advice}."
                ) from error
            calls.sleep(wait)
    raise AssertionError


def write_file(calls: FileCalls, path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write and fsync one file; returns its `size` in bytes and `sha256`."""
    digest, size = hashlib.sha256(), 0
    descriptor = calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for chunk in _joined(chunks):
            view = memoryview(chunk)
            digest.update(view)
            size += len(view)
            while view:
                view = view[calls.write(descriptor, view[:LARGEST_WRITE]) :]
        calls.fsync(descriptor)
    finally:
        calls.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _joined(chunks: Iterable[Any]) -> Iterator[Any]:
    """The same bytes with small chunks put together."""
    pending = bytearray()
    for chunk in chunks:
        if len(chunk) >= SMALL:
            yield pending
            yield chunk
            pending = bytearray()
            continue
        pending += memoryview(chunk)
        if len(pending) >= SMALL:
            yield pending
            pending = bytearray()
    yield pending


def sync_folder(calls: FileCalls, folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = calls.open(folder, os.O_RDONLY)
    try:
        calls.fsync(descriptor)
    finally:
        calls.close(descriptor)


def make_folder(calls: FileCalls, folder: Path) -> None:
    """Make a folder, and its parents, durably; one that is there is left as it is."""
    if not folder.is_dir():
        make_folder(calls, folder.parent)
        calls.mkdir(folder)
        sync_folder(calls, folder.parent)


def replace_file(calls: FileCalls, path: Path, chunks: Iterable[Any]) -> None:
    """Write a whole file under a temporary name, then put it in place of `path` in one durable step."""
    temporary = path.with_name(f"tmp-{path.name}")
    write_file(calls, temporary, chunks)
    calls.rename(temporary, path)
    sync_folder(calls, path.parent)


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file, a tensor at a time, so that no second copy of a model is ever held."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Store:
    """The checkpoints of one run: saves, verifies, keeps the newest `keep`, falls back when one is damaged."""

    def __init__(self, folder: Path, calls: FileCalls | None = None, keep: int = 2) -> None:
        self.folder = folder
        self.calls = calls or FileCalls()
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of one step."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        matches = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def clean(self) -> None:
        """Remove what an interrupted save or removal left behind."""
        for leftover in self.folder.glob("tmp-*"):
            self._remove(leftover)

    def save(self, step: int, tables: Tables, state: dict[str, Any]) -> None:
        """Write, read back and verify a checkpoint, then let go of the oldest; raises SaveError."""
        persist(self.calls, f"checkpoint {self.path(step)}", lambda: self._write(step, tables, state))
        try:
            for old in self.steps()[: -self.keep]:
                self._discard(self.path(old))
        except OSError as error:
            warn(f"could not remove an old checkpoint: {error}")

    def forget(self, after: int) -> None:
        """Remove the checkpoints of steps later than `after`."""
        for step in self.steps():
            if step > after:
                persist(self.calls, f"the removal of {self.path(step)}", partial(self._discard, self.path(step)))

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None for a fresh run; damaged ones are renamed to `.bad`, loudly.

        Raises InputError when there were checkpoints and none of them is whole.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except Damaged as error:
                bad = persist(self.calls, f"the name of {self.path(step)}", partial(self._quarantine, step))
                warn(f"CHECKPOINT DAMAGED: {error}. Renamed to {bad.name}; trying the one before.")
        damaged = sorted(entry.name for entry in self.folder.glob("step-*.bad*"))
        if damaged:
            raise InputError(
                f"every checkpoint in {self.folder} is damaged ({', '.join(damaged)}). Put a good copy of one back "
                "under its name without .bad, or remove the damaged folders to begin this run again from its start."
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """One checkpoint, every byte of it verified; raises Damaged."""
        from safetensors.torch import load_file

        folder = self.path(step)
        try:
            files = self._verified(folder, step)
            state = json.loads((folder / "state.json").read_bytes())
            tables = {Path(name).stem: load_file(folder / name) for name in files if name.endswith(".safetensors")}
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EIO):
                raise Damaged(f"{folder}: {error}") from error
            raise InputError(f"could not read checkpoint {folder}: {error}. Nothing was changed.") from error
        return Checkpoint(step, tables, state)

    def _verified(self, folder: Path, step: int) -> dict[str, dict[str, Any]]:
        written = (folder / "manifest.json").read_bytes()
        try:
            manifest = json.loads(written)
            intact = written == _manifest_bytes(manifest["format"], manifest["step"], manifest["files"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{folder}: its manifest cannot be read ({error})") from error
        if not intact:
            raise Damaged(f"{folder}: its manifest was changed")
        if manifest["format"] != FORMAT:
            raise InputError(f"checkpoint {folder} has format {manifest['format']}; this version reads {FORMAT}.")
        if manifest["step"] != step:
            raise Damaged(f"{folder}: its manifest is of step {manifest['step']}")
        for name, promised in manifest["files"].items():
            with (folder / name).open("rb") as file:
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            if {"size": size, "sha256": digest} != promised:
                raise Damaged(f"{folder / name}: size or sha256 differs from the manifest")
        files: dict[str, dict[str, Any]] = manifest["files"]
        return files

    def _write(self, step: int, tables: Tables, state: dict[str, Any]) -> None:
        self.clean()
        final = self.path(step)
        if final.exists():  # an earlier try was renamed but not made durable
            self._discard(final)
        temporary = self.folder / f"tmp-{final.name}"
        try:
            self.calls.mkdir(temporary)
            files = {
                f"{name}.safetensors": write_file(
                    self.calls, temporary / f"{name}.safetensors", tensor_bytes(tensors, {"format": "pt"})
                )
                for name, tensors in tables.items()
            }
            files["state.json"] = write_file(self.calls, temporary / "state.json", [json.dumps(state).encode()])
            write_file(self.calls, temporary / "manifest.json", [_manifest_bytes(FORMAT, step, files)])
            sync_folder(self.calls, temporary)
            self._verified(temporary, step)
            self.calls.rename(temporary, final)
            sync_folder(self.calls, self.folder)
        except OSError:
            self._remove(temporary)  # gives a full disk its space back
            raise

    def _quarantine(self, step: int) -> Path:
        folder = self.path(step)
        names = (folder.with_name(f"{folder.name}.bad{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        bad = next(name for name in names if not name.exists())
        self.calls.rename(folder, bad)
        sync_folder(self.calls, self.folder)
        return bad

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint so that a kill in between leaves nothing that looks like one."""
        temporary = folder.with_name(f"tmp-old-{folder.name}")
        self.calls.rename(folder, temporary)
        self._remove(temporary)

    def _remove(self, entry: Path) -> None:
        """Remove one of our temporary folders or files; what the disk refuses is left for the next cleaning."""
        try:
            if entry.is_dir():
                for inside in entry.iterdir():
                    self.calls.unlink(inside)
                self.calls.rmdir(entry)
            elif entry.exists():
                self.calls.unlink(entry)
        except OSError:
            pass


def _manifest_bytes(version: int, step: int, files: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, its own sha256 in it."""
    body = {"format": version, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True).encode()
