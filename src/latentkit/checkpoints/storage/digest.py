"""What files are known by: the sha256 of their bytes."""

import hashlib
import os
from pathlib import Path

from latentkit.errors import InputError


class Digest:
    """The sha256 of a file, or of all of a folder's files and their names, 64 hexadecimal digits when it is called.

    It is worked out at the first call. Errors: InputError for what cannot be read, or was changed since this was made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = ""
        try:
            self._folder = path.is_dir()
            files = sorted(p for p in path.rglob("*") if p.is_file()) if self._folder else [path]
            self._marks = [(file, _mark(os.stat(file))) for file in files]
        except OSError as error:
            raise self._unreadable(error) from None

    def __call__(self) -> str:
        """Threads that ask at once may each work it out."""
        if not self._found:
            whole = hashlib.sha256()
            for path, mark in self._marks:
                try:
                    with open(path, "rb") as file:
                        own = hashlib.file_digest(file, "sha256")
                        if _mark(os.fstat(file.fileno())) != mark:
                            raise InputError(f"{path}: was changed after it was read", exit_code=2)
                except OSError as error:
                    raise self._unreadable(error) from None
                if not self._folder:
                    whole = own
                    break
                whole.update(str(path.relative_to(self.path)).encode() + own.digest())
            self._found = whole.hexdigest()
        return self._found

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be read: {error.strerror or error}", exit_code=2)


def _mark(found: os.stat_result) -> tuple[int, ...]:
    """What is another when a file has been replaced or written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
