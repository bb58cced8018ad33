"""What belongs to a request and is neither number nor word: pictures and models, known by their digests.

Only a digest is ever written into a file or read from one.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import PlainSerializer, PlainValidator

from latentkit.checkpoints.adapters.tiny_files import tiny_digest
from latentkit.checkpoints.files import Model, load
from latentkit.data.pictures import Picture, decode
from latentkit.errors import InputError

T = TypeVar("T")
MAX_PICTURE_BYTES = 1 << 28


@dataclass(frozen=True)
class Attachment:
    """A picture that belongs to a request: the sha256 of its pixels, and the picture where it is at hand."""

    digest: str
    picture: Picture | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def read(path: str | Path, decoder: Callable[[bytes, str], Picture] = decode) -> "Attachment":
        """The picture in a file (`decode_map`: a semantic map); InputError where it cannot be used."""
        try:
            if Path(path).stat().st_size > MAX_PICTURE_BYTES:
                raise InputError(f"{path}: is larger than {MAX_PICTURE_BYTES >> 20} MB")
            picture = decoder(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
        array = picture.array
        content = hashlib.sha256(f"{array.shape}{array.dtype}{picture.has_alpha}".encode() + array.tobytes())
        return Attachment(content.hexdigest(), picture)


@dataclass(frozen=True)
class Guide:
    """Another model of a request, its guidance model or refiner: the sha256 of its file, and itself where at hand."""

    digest: str
    model: Model | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def read(
        name: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        low_memory: bool = False,
    ) -> "Guide":
        """The model called `name` (see `load`); InputError where it cannot be used."""
        model = load(name, device, dtype, low_memory)
        return Guide(model.digest, model)


@dataclass(frozen=True)
class WeightsFile:
    """A request's LoRA, ControlNet, inversion or autoencoder: the sha256 of its files, where it lies, what it is."""

    digest: str
    path: Path | None = field(default=None, compare=False, repr=False)
    content: Any = field(default=None, compare=False, repr=False)

    @staticmethod
    def read(path: str | Path) -> "WeightsFile":
        """The file (or diffusers folder) there, its content yet unread; InputError where there is none."""
        return WeightsFile(tiny_digest(Path(path)), Path(path))


def _by_digest(kind: type[T], how: str) -> PlainValidator:
    """What takes a value of `kind`, or makes one of its digest; `how` says what else was to be given."""

    def taken(value: Any) -> T:
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
            return kind(value)  # type: ignore[call-arg]
        if isinstance(value, kind):
            return value
        raise ValueError(how)

    return PlainValidator(taken)


_DIGEST = PlainSerializer(lambda value: value.digest)
Attached = Annotated[Attachment, _by_digest(Attachment, "a picture is given as Attachment.read(path)"), _DIGEST]
Weights = Annotated[
    WeightsFile, _by_digest(WeightsFile, "a file of weights is given as WeightsFile.read(path)"), _DIGEST
]
Guiding = Annotated[Guide, _by_digest(Guide, "a model is given as Guide.read(path)"), _DIGEST]
