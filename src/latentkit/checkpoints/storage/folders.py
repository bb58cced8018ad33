"""Files and folders that are whole or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentkit.errors import InputError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path`, empty or not there yet, in the end; nothing stays where that fails.

    Errors: InputError for a disk that refuses; those that name the folder written to name `path`.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), str(path)), exit_code=error.exit_code) from None
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def undone(path: Path) -> Iterator[None]:
    """Take away what was written to `path`, which was not there before, where anything fails inside."""
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise
