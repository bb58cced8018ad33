"""Every picture is either what a person sees within 1/255, or refused by name with a fixed reason."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from latentkit.data import pictures
from latentkit.data.pictures import BadPicture, Picture, decode, grid, resize, to_png, to_tensor, to_tiff
from latentkit.errors import InputError

RAMP = np.stack(
    [
        np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1)),
        np.tile(np.arange(0, 240, 15, dtype=np.uint8)[:, None], (1, 24)),
        np.full((16, 24), 77, np.uint8),
    ],
    axis=2,
)


def file_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, depth, colour, rows, *extra):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def icc(space, gamma):
    """A minimal profile with sRGB's primaries (or gray) and a pure power curve."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)}
    if space == b"RGB ":
        columns = {b"r": (0.4361, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7141)}
        for letter, column in columns.items():
            tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[letter + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = at + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    head = head + bytes(68 - len(head)) + fixed(0.9642, 1.0, 0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def linear_to_srgb(values):
    v = values / 255
    return 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


VALID = {
    "png": file_of(Image.fromarray(RAMP)),
    "jpeg": file_of(Image.fromarray(RAMP), "JPEG", quality=95),
    "progressive": file_of(Image.fromarray(RAMP), "JPEG", quality=95, progressive=True),
    "webp": file_of(Image.fromarray(RAMP), "WEBP", lossless=True),
    "tiff": to_tiff(torch.from_numpy(RAMP).permute(2, 0, 1).float() / 127.5 - 1, depth=8),
}


def tried(data, name):
    """The array of a picture, or the message that refused it."""
    try:
        return decode(data, name).array
    except BadPicture as error:
        return str(error)


@pytest.mark.parametrize("kind", VALID)
def test_truncated_anywhere_is_refused_or_whole(kind):
    data = VALID[kind]
    whole = decode(data, "a").array
    if kind != "tiff":
        assert np.array_equal(whole, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    refused = 0
    for at in sorted({*range(0, len(data), max(1, len(data) // 50)), *range(len(data) - 12, len(data))}):
        got = tried(data[:at], "cut.png")
        if isinstance(got, str):
            assert got.startswith("cut.png: ")
            assert "0x" not in got
            refused += 1
        else:
            assert np.array_equal(got, whole), at
    assert refused >= 45


@pytest.mark.parametrize("kind", VALID)
def test_flipped_bits_never_crash(kind):
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(VALID[kind])
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            got = tried(bytes(data), "flip")
            assert got.startswith("flip: ") if isinstance(got, str) else got.ndim == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = file_of(Image.fromarray(RAMP), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data, "a").array, expected)
    assert expected.shape[0] == (24 if orientation > 4 else 16)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_a_broken_tag_keeps_the_picture(exif):
    data = file_of(Image.fromarray(RAMP), "JPEG", quality=95, exif=exif)
    assert decode(data, "a").array.shape == (16, 24, 3)


def test_an_orientation_that_is_no_number_keeps_the_picture(monkeypatch):
    def broken(self):
        raise TypeError("bad tag")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", broken)
    picture = decode(VALID["png"], "a")
    assert np.array_equal(picture.array, RAMP)
    assert picture.notes == ("broken EXIF ignored",)


def test_sixteen_bit_gray_keeps_its_bits():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16) + 3
    data = file_of(Image.fromarray(ramp))
    picture = decode(data, "a")
    assert picture.array.dtype == np.uint16
    assert np.array_equal(picture.array[..., 0], ramp)
    again = to_png(to_tensor(picture, 1), depth=16)
    assert np.array_equal(decode(again, "b").array[..., 0], ramp)
    naive = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert (naive == 255).mean() > 0.9  # what convert() alone would have made of it


def test_a_profile_does_not_cost_sixteen_bit_gray_its_bits():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16) + 3
    picture = decode(file_of(Image.fromarray(ramp), icc_profile=icc(b"GRAY", 1.0)), "a")
    assert np.array_equal(picture.array[..., 0], ramp)
    assert picture.notes == ("colour profile of 16-bit gray ignored",)


def test_sixteen_bit_colour_is_read_and_said():
    row = struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF) * 8
    picture = decode(png(8, 8, 16, 2, [row] * 8), "a")
    assert picture.array[0, 0].tolist() == [0x12, 0x80, 0xFF]
    assert picture.notes == ("16-bit colour read as 8 bits",)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray_value_at_every_depth(depth):
    top = 2**depth - 1
    values = [0, top] * 8
    bits = "".join(f"{v:0{depth}b}" for v in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    picture = decode(png(16, 8, depth, 0, [row] * 8, chunk(b"tRNS", struct.pack(">H", top))), "a")
    assert picture.has_alpha
    assert picture.array.shape == (8, 16, 2)
    x = to_tensor(picture, 2)
    assert x[1, 0, :2].tolist() == [1, -1]
    assert to_tensor(picture, 1, "black")[0, 0, :2].tolist() == [-1, -1]


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_rgb_value(depth):
    scale = 257 if depth == 16 else 1
    pixels = [(10, 20, 30), (200, 20, 30)] * 4
    row = b"".join(struct.pack(">HHH" if depth == 16 else "BBB", *(v * scale for v in p)) for p in pixels)
    key = chunk(b"tRNS", struct.pack(">HHH", *(v * scale for v in pixels[0])))
    picture = decode(png(8, 8, depth, 2, [row] * 8, key), "a")
    assert picture.array[0, :2].tolist() == [[10, 20, 30, 0], [200, 20, 30, 255]]


def test_palette_with_transparency_is_seen_on_its_background():
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (8, 2)))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    data = file_of(image, transparency=bytes([0, 128, 255, 255]))
    picture = decode(data, "a")
    assert picture.array[0, :3].tolist() == [[255, 0, 0, 0], [0, 255, 0, 128], [0, 0, 255, 255]]
    seen = (to_tensor(picture, 3, "#102030")[:, 0, :3] + 1) * 127.5
    expected = [[16, 32, 48], [16 * 127 / 255, (255 * 128 + 32 * 127) / 255, 48 * 127 / 255], [0, 0, 255]]
    assert np.allclose(seen.T, expected, atol=1e-3)


def test_cmyk_without_a_profile():
    image = Image.fromarray(RAMP).convert("CMYK")
    data = file_of(image, "JPEG", quality=95)
    assert np.array_equal(decode(data, "a").array, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_profiles_are_converted_to_srgb(kind):
    linear = icc(b"RGB ", 1.0)
    if kind == "PNG":
        data = file_of(Image.fromarray(RAMP), icc_profile=linear)
    else:
        data = file_of(Image.fromarray(RAMP), "TIFF", icc_profile=linear)
    got = decode(data, "a").array.astype(float)
    assert np.abs(got - linear_to_srgb(RAMP)).max() <= 1.5
    assert np.abs(got - RAMP).max() > 50


def test_gray_profile_stays_gray():
    gray = RAMP[..., 0]
    got = decode(file_of(Image.fromarray(gray), icc_profile=icc(b"GRAY", 1.0)), "a").array
    assert got.shape == (16, 24, 1)
    assert np.abs(got[..., 0] - linear_to_srgb(gray)).max() <= 1.5


@pytest.mark.parametrize("profile", [b"nonsense" * 40, icc(b"RGB ", 1.0)[:200], icc(b"GRAY", 1.0)])
def test_a_broken_profile_is_ignored_and_said(profile):
    picture = decode(file_of(Image.fromarray(RAMP), icc_profile=profile), "a")
    assert np.array_equal(picture.array, RAMP)
    assert picture.notes == ("broken colour profile ignored",)


def test_a_huge_profile_is_not_parsed(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PROFILE_BYTES", 100)
    picture = decode(file_of(Image.fromarray(RAMP), icc_profile=icc(b"RGB ", 1.0)), "a")
    assert np.array_equal(picture.array, RAMP)


def test_a_profile_does_not_touch_alpha():
    array = np.dstack([RAMP, RAMP[..., 0]])
    got = decode(file_of(Image.fromarray(array), icc_profile=icc(b"RGB ", 1.0)), "a").array
    assert np.array_equal(got[..., 3], RAMP[..., 0])
    assert np.abs(got[..., :3] - linear_to_srgb(RAMP)).max() <= 1.5


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (10, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = decode(file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options), "a")
    assert (picture.array[..., :3] == 10).all()
    assert picture.notes == ("first of several frames",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0", "EPS"),
        (b"%PDF-1.7", "PDF"),
        (b"GIF89a\x01\0\x01\0", "GIF"),
        (b"BM\x3a\0\0\0", "BMP"),
        (b"just words", "is not a PNG"),
        (bytes(5000), "is not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff\xe0", "damaged JPEG"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "damaged WEBP"),
        (b"II*\0\x08\0\0\0", "damaged TIFF"),
        (png(65535, 65535, 8, 2, [b""]), "is too large"),
        (png(9000, 9900, 1, 0, [b""]), "is too large"),  # below Pillow's own limit
        (png(70000, 8, 1, 0, [b""]), "is too large"),
        (png(1, 1, 8, 0, [b"\0"]), "is too small"),
        (png(3, 900, 8, 0, [b"\0\0\0"] * 900), "is too small"),
    ],
)
def test_refused_by_a_fixed_reason(data, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadPicture, match=reason) as error:
            decode(data, "x.png")
    assert error.value.reason in str(error.value)


def test_a_bomb_takes_no_memory():
    rows = zlib.compress(bytes(8000 // 8 + 1) * 8001, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8001, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    code = (
        "import sys, resource\nfrom latentkit.data.pictures import decode, BadPicture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(sys.stdin.buffer.read(), 'bomb')\nexcept BadPicture: print('refused')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    assert done.stdout.split() == [b"refused", b"True"]


def test_a_renamed_picture_is_read_by_its_content():
    assert np.array_equal(decode(VALID["png"], "photo.jpg").array, RAMP)


def test_only_the_reader_of_its_format_sees_a_file(monkeypatch):
    Image.preinit()
    seen = []
    monkeypatch.setattr(Image, "ID", [*Image.ID, "OTHER"])
    monkeypatch.setitem(Image.OPEN, "OTHER", (lambda file, name: seen.append(name), None))
    for data in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBPVP8 "):
        with pytest.raises(BadPicture):
            decode(data, "a")
    assert seen == []


def test_tiff_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadPicture, match=r"pip install latentkit\[scientific\]"):
        decode(VALID["tiff"], "a.tif")
    with pytest.raises(InputError, match=r"pip install latentkit\[scientific\]"):
        to_tiff(torch.zeros(1, 4, 4))


def test_channels_asked_for():
    rgb = Picture(RAMP, False)
    rgba = Picture(np.dstack([RAMP, np.full((16, 24), 255, np.uint8)]), True)
    gray = to_tensor(rgb, 1)
    assert torch.allclose((gray[0] + 1) * 127.5, torch.tensor(RAMP @ [0.299, 0.587, 0.114]).float(), atol=1e-3)
    assert torch.equal(to_tensor(rgb, 4), to_tensor(rgba, 4))
    assert torch.equal(to_tensor(rgb, 3), to_tensor(rgba, 3))
    assert to_tensor(rgb, 2).shape == (2, 16, 24)
    assert torch.equal(to_tensor(Picture(RAMP[..., :1], False), 3)[2], to_tensor(Picture(RAMP[..., :1], False), 1)[0])
    bands = Picture(np.zeros((8, 8, 6), np.uint8), False)
    assert to_tensor(bands, 6).shape == (6, 8, 8)
    assert to_tensor(Picture(np.zeros((8, 8, 4), np.uint8), False), 4).shape == (4, 8, 8)
    for wrong in (3, 5):
        with pytest.raises(InputError, match="use 6"):
            to_tensor(bands, wrong)
    with pytest.raises(InputError, match="use 3"):
        to_tensor(rgb, 5)


def test_colours_that_cannot_be_seen_become_the_background():
    array = np.zeros((8, 8, 4), np.uint8)
    array[..., :3] = (200, 10, 10)
    array[:, 4:, 3] = 255
    x = to_tensor(Picture(array, True), 4, "white")
    assert (x[:3, :, :4] == 1).all()
    assert torch.allclose(to_tensor(Picture(array, True), 3, "black")[:, 0, 0], torch.tensor([-1.0, -1.0, -1.0]))
    half = resize(x, 4, 3, alpha=True)
    red = torch.tensor([200, 10, 10]) / 127.5 - 1
    mixed = half[3, 0, 1]
    assert -0.9 < mixed < 0.9
    assert torch.allclose(half[:3, 0, 1], red, atol=0.02)  # white does not bleed into the edge
    assert (resize(x, 4, 3)[:3, 0, 1] - red).abs().max() > 0.2  # as it does without alpha's weight


@pytest.mark.parametrize("background", ["wite", "#12345", "#gggggg"])
def test_wrong_background(background):
    with pytest.raises(InputError, match="white, black or #rrggbb"):
        to_tensor(Picture(RAMP, False), 3, background)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (32, 48)])
def test_resize_is_pillow_s_bicubic(size):
    x = to_tensor(Picture(RAMP, False), 3)
    got = resize(x, *size)
    expected = np.stack(
        [np.asarray(Image.fromarray(p.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)) for p in x]
    )
    assert np.abs(got.numpy() - expected.clip(-1, 1)).max() < 2 / 255
    assert got.min() >= -1
    assert got.max() <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.integers(0, 99))
def test_png_gives_back_its_samples(channels, height, width, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    x = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    data = to_png(x)
    assert np.array_equal(decode(data, "a").array, array)
    assert data == to_png(x)


def test_png_text_keeps_every_letter():
    text = {"parameters": "a cat\nSteps: 20", "latentkit": '{"prompt": "Häuser ☃ 猫"}'}
    data = to_png(torch.zeros(3, 8, 8), text)
    image = Image.open(io.BytesIO(data))
    image.load()
    assert {key: str(value) for key, value in image.text.items()} == text
    assert b"tEXtparameters" in data
    assert b"iTXtlatentkit" in data


def test_what_png_cannot_hold_is_refused():
    with pytest.raises(InputError, match="5 channels"):
        to_png(torch.zeros(5, 8, 8))
    with pytest.raises(InputError, match="16 bits"):
        to_png(torch.zeros(3, 8, 8), depth=16)
    with pytest.raises(InputError, match="NaN"):
        to_png(torch.full((3, 8, 8), float("nan")))


def test_grid_places_pictures_in_equal_cells():
    sheet = grid([torch.full((1, 4, 4), -1.0), torch.full((1, 2, 4), 0.0), torch.full((1, 4, 4), 0.5)], 2, gap=1)
    assert sheet.shape == (1, 11, 11)
    assert (sheet[0, 1:5, 1:5] == -1).all()
    assert (sheet[0, 2:4, 6:10] == 0).all()
    assert (sheet[0, 6:10, 1:5] == 0.5).all()
    assert sheet[0, 0, 0] == 1
    with pytest.raises(InputError):
        grid([])
