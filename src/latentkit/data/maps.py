"""Semantic maps: a PNG in which each pixel is the number of a class."""

import io

import numpy as np
from PIL import Image

from latentkit.data.pictures import BadPicture, Picture, decode

LESS = {2: 85, 4: 17}
"""What grays of fewer than 8 bits are multiplied with on reading."""


def decode_map(data: bytes, name: str) -> Picture:
    """The class numbers in a PNG, h w 1 in uint8 or uint16: palette entries by their numbers, or grays.

    `BadPicture` for one with colours or transparency, for other formats, and for anything damaged.
    """
    decode(data, name)  # refuses what is damaged, too small or too large
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I;16"):
        got = f"is a {image.format} of mode {image.mode}"
        raise BadPicture(name, f"{got}; a semantic map is a PNG in gray, or with a palette, of class numbers")
    numbers = np.asarray(image)
    if image.mode == "L":
        numbers = numbers // LESS.get(data[24], 1)
    return Picture(
        np.ascontiguousarray(numbers.astype(np.uint16 if image.mode == "I;16" else np.uint8)[..., None]), False
    )
