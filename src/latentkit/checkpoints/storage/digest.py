"""What files are known by: the sha256 of their bytes."""

import hashlib
import threading
from pathlib import Path

from latentkit.errors import InputError


class Digest:
    """The sha256 of a file, or of all of a folder's files and their names, 64 hexadecimal digits when it is called.

    It is worked out at the first call, of the files that were there when this was made: they are held open until then.
    Errors: InputError for what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path.is_dir()
        self._lock = threading.Lock()
        self._found = ""
        self._files = []
        try:
            for file in sorted(p for p in path.rglob("*") if p.is_file()) if self._folder else [path]:
                self._files.append((str(file.relative_to(path)), open(file, "rb")))  # noqa: SIM115
        except OSError as error:
            raise self._unreadable(error) from None

    def __call__(self) -> str:
        """Threads that ask at once wait for one another."""
        with self._lock:
            if not self._found:
                try:
                    found = [(name, hashlib.file_digest(file, "sha256")) for name, file in self._files]
                except OSError as error:
                    raise self._unreadable(error) from None
                whole = hashlib.sha256(b"".join(name.encode() + own.digest() for name, own in found))
                self._found = (whole if self._folder else found[0][1]).hexdigest()
                self._close()
        return self._found

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        for _, file in self._files:
            file.close()
        self._files.clear()

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be read: {error.strerror or error}", exit_code=2)
