"""Class numbers come out of every kind of PNG that holds them, and out of nothing else."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentkit.data.maps import decode_map
from latentkit.data.pictures import BadPicture

NUMBERS = np.arange(30, dtype=np.uint8).reshape(5, 6)


def png(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def painted(numbers: np.ndarray, **how: Any) -> bytes:
    image = Image.fromarray(numbers)
    image.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    return png(image, **how)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(Image.fromarray(NUMBERS)), NUMBERS),
        (painted(NUMBERS), NUMBERS),
        (painted(NUMBERS % 4, bits=2), NUMBERS % 4),
        (png(Image.fromarray(NUMBERS.astype(np.uint16) * 100)), NUMBERS.astype(np.uint16) * 100),
        (png(Image.fromarray(NUMBERS % 2 == 1)), NUMBERS % 2),
    ],
    ids=["gray", "palette", "palette of 2 bits", "gray of 16 bits", "black and white"],
)
def test_numbers_come_out(data: bytes, expected: np.ndarray) -> None:
    found = decode_map(data, "map.png")
    assert found.array.dtype == (np.uint16 if expected.dtype == np.uint16 else np.uint8)
    assert np.array_equal(found.array[..., 0], expected)


def test_grays_of_four_bits_are_not_stretched() -> None:
    import struct
    import zlib

    rows = b"".join(b"\0" + bytes([0x01, 0x2F]) for _ in range(4))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode_map(data, "map.png").array[0, :, 0].tolist() == [0, 1, 2, 15]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(Image.new("RGB", (8, 8))), "is a PNG of mode RGB; a semantic map is"),
        (png(Image.new("L", (8, 8)), "JPEG"), "is a JPEG of mode L; a semantic map is"),
        (png(Image.new("L", (2, 8))), "is too small"),
        (png(Image.fromarray(NUMBERS))[:-30], "is a damaged PNG"),
    ],
)
def test_what_holds_no_class_numbers_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadPicture, match=message):
        decode_map(data, "map.png")
