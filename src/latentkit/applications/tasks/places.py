"""What a request wants where: boxes with classes, and semantic maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from latentkit.applications.request import Request, known
from latentkit.checkpoints.files import invalid
from latentkit.errors import InputError
from latentkit.model.conditioners.layout import Box, LayoutConditioner
from latentkit.model.conditioners.map import MapConditioner
from latentkit.model.latent_diffusion import LatentDiffusion

LARGEST = 1 << 20
"""Bytes of a layout's file."""


class _Object(BaseModel):
    model_config = ConfigDict(strict=True)

    label: str | int
    box: tuple[float, float, float, float]


class _Objects(BaseModel):
    model_config = ConfigDict(strict=True)

    objects: list[_Object]


def read_boxes(path: str | Path) -> list[list[Any]]:
    """The boxes of `{"objects": [{"label": "cat", "box": [left, top, right, bottom]}, ...]}`, or of that list alone.

    Labels are names or numbers, corners lie in 0..1, as in a line of an imagefolder's `metadata.jsonl`; each box comes
    as `Request.layout` takes it. Errors: InputError says what is wrong with the file.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}", exit_code=2) from None
    if len(text) > LARGEST:
        raise InputError(f"{path}: has more than {LARGEST} bytes; one layout has fewer")
    listed: Any = list[_Object] if text.lstrip().startswith(b"[") else _Objects
    try:
        found = TypeAdapter(listed).validate_json(text, strict=True)
    except ValidationError as error:
        wanted = '{"objects": [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}]}'
        raise InputError(f"{invalid(error, str(path))}; a layout is {wanted}") from None
    return [[one.label, *one.box] for one in (found.objects if isinstance(found, _Objects) else found)]


def check(request: Request, network: LatentDiffusion) -> None:
    """InputError where the model needs a map that is not given, or does not know its classes or those of the boxes."""
    for label, left, top, right, bottom in request.layout or ():
        if left >= right or top >= bottom:
            got = f"left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g}"
            raise InputError(f"the box of {label!r} is empty ({got}); corners go from the top left on", exit_code=2)
    if "layout" in network.conditioners:
        cast(LayoutConditioner, network.conditioner("layout")).tokens(_boxes(request))
    if "map" in network.conditioners:
        if request.semantic_map is None:
            raise InputError("this model draws by a semantic map: give --map PNG (class numbers)", exit_code=2)
        cast(MapConditioner, network.conditioner("map")).check(_numbers(request))


def placed(network: LatentDiffusion, requests: Sequence[Request]) -> dict[str, list[Any]]:
    """The layouts and maps of the requests, for the conditioners that the model has; maps at the size drawn."""
    said: dict[str, list[Any]] = {}
    if "layout" in network.conditioners:
        said["layout"] = [_boxes(request) for request in requests]
    if "map" in network.conditioners:
        said["map"] = [_covering(request) for request in requests]
    return said


def _boxes(request: Request) -> list[Box]:
    return [Box(*box) for box in request.layout or ()]


def _numbers(request: Request) -> Tensor:
    """The request's map, `h w` in its own pixels."""
    return torch.from_numpy(known(known(request.semantic_map).picture).array[..., 0].astype(np.int64))


def _covering(request: Request) -> Tensor:
    """The request's map scaled to cover what is drawn, no two classes mixed, and cut to it about the middle.

    One that is larger on both sides by less than a latent's worth of pixels is cut alone (its own size was asked for).
    """
    numbers, size = _numbers(request), (known(request.height), known(request.width))
    scale = max(wanted / side for wanted, side in zip(size, numbers.shape))
    scaled = [max(wanted, round(side * scale)) for wanted, side in zip(size, numbers.shape)]
    x = F.interpolate(numbers[None, None].double(), scaled, mode="nearest-exact")[0, 0].long()
    top, left = ((side - wanted) // 2 for side, wanted in zip(x.shape, size))
    return x[top : top + size[0], left : left + size[1]]
