"""The description in a model file, changed without touching its weights."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from latentkit.errors import InputError
from latentkit.model.latent_diffusion import Architecture


def describe(source: Path, target: Path, architecture: Architecture) -> None:
    """Write the model file `source` to `target`, which may be the same, with `architecture` in its description.

    A file that was at `target` before is unharmed until the new one is whole. Errors: InputError.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(source, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            document = json.loads(header["__metadata__"]["latentkit"]) | {"architecture": asdict(architecture)}
            header["__metadata__"]["latentkit"] = json.dumps(document, ensure_ascii=False, allow_nan=False)
            head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            head += b" " * (-len(head) % 8)
            with open(temporary, "wb") as copy:
                copy.write(len(head).to_bytes(8, "little") + head)
                shutil.copyfileobj(file, copy, 1 << 22)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{source} could not be written to {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
