"""Picture files in, picture tensors out: decoding, channels, resizing, and PNG and TIFF writing.

Everything a person sees when looking at the file is what comes out: orientation, colour profile, palette and
transparency are applied. What cannot be used is a `BadPicture` with a fixed reason; nothing is repaired by guessing.
"""

import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from latentkit.data.range import SAMPLES, Range
from latentkit.errors import InputError

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_500
MIN_SIDE = 4
MAX_SAMPLES = 4 * MAX_PIXELS
MAX_PROFILE_BYTES = 4 << 20
EXTRA = "needs tifffile: pip install latentkit[scientific]"

# What a file is not, by how it begins.
_REFUSED = {
    b"%!PS": "is EPS or PostScript, which is a program and not a picture",
    b"\xc5\xd0\xd3\xc6": "is EPS or PostScript, which is a program and not a picture",
    b"%PDF": "is PDF, which is not read; save its pages as PNG",
    b"GIF8": "is GIF, which is not read; save it as PNG or WebP",
    b"BM": "is BMP, which is not read; save it as PNG",
    b"8BPS": "is PSD, which is not read; save it as PNG or TIFF",
    b"\x00\x00\x00\x0cjP": "is JPEG 2000, which is not read; save it as PNG or TIFF",
}
_TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


class BadPicture(InputError):
    """A picture that cannot be used: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Picture(NamedTuple):
    """A decoded picture: `array` is h w c in uint8, uint16 or float32 (0..1), the last channel alpha if `has_alpha`.

    `notes` says what was passed over on the way (a broken profile, further frames). `samples` is the type of the
    file's samples where they passed a stated range.
    """

    array: np.ndarray
    has_alpha: bool
    notes: tuple[str, ...] = ()
    samples: str | None = None

    @property
    def colours(self) -> int:
        """Channels, alpha apart."""
        return int(self.array.shape[2]) - self.has_alpha


def decode(data: bytes, name: str, values: Range | None = None) -> Picture:
    """The picture in the bytes of a PNG, JPEG, WebP or TIFF file; `BadPicture` for anything else or anything damaged.

    With `values` samples of any sign and size are read by that range, and come out as float32. The size is read from
    the header and refused there: sides of 4 to 65,500 pixels, at most 64 million pixels.
    """
    if data.startswith(_TIFF_STARTS):
        picture = _decode_tiff(data, name, stated=values is not None)
    else:
        picture = _decode_pillow(data, name)
    if values is not None:
        return _ranged(picture, name, values)
    array = picture.array
    if array.dtype == np.float32:
        if not np.isfinite(array).all():
            raise BadPicture(name, "holds NaN or infinite samples")
        if array.min() < -1e-3 or array.max() > 1 + 1e-3:
            got = f"{array.min():.4g}..{array.max():.4g}"
            said = "they must lie in 0..1, or in a range that is stated"
            raise BadPicture(name, f"holds floating-point samples in {got}; {said}")
        array = array.clip(0, 1)
    return picture._replace(array=np.ascontiguousarray(array))


def _ranged(picture: Picture, name: str, values: Range) -> Picture:
    """The picture's colours by a stated range, its alpha by its type, as float32 in 0..1."""
    colours = picture.array[..., : picture.array.shape[2] - picture.has_alpha]
    if not np.isfinite(picture.array).all():
        raise BadPicture(name, "holds NaN or infinite samples")
    try:
        parts = [values.to_unit(colours)]
    except InputError as error:
        raise BadPicture(name, str(error)) from None
    if picture.has_alpha:
        alpha = picture.array[..., -1:]
        top = 1.0 if alpha.dtype == np.float32 else np.iinfo(alpha.dtype).max
        parts.append((alpha.astype(np.float32) / top).clip(0, 1))
    return picture._replace(array=np.concatenate(parts, axis=2), samples=str(picture.array.dtype))


def _format(data: bytes, name: str) -> str:
    if not data:
        raise BadPicture(name, "is empty (0 bytes)")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for start, reason in _REFUSED.items():
        if data.startswith(start):
            raise BadPicture(name, reason)
    if b"<svg" in data[:4096].lower():
        raise BadPicture(name, "is SVG, which is a drawing program and not a picture; save it as PNG")
    raise BadPicture(name, "is not a PNG, JPEG, WebP or TIFF picture")


def _check_size(name: str, width: int, height: int, channels: int = 1) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS or width * height * channels > MAX_SAMPLES:
        limit = f"sides up to {MAX_SIDE:,} and {MAX_PIXELS // 10**6} million pixels in all are read"
        raise BadPicture(name, f"is too large ({width}x{height}, {channels} channels); {limit}")
    if min(width, height) < MIN_SIDE:
        raise BadPicture(name, f"is too small ({width}x{height}); each side needs at least {MIN_SIDE} pixels")


def _decode_pillow(data: bytes, name: str) -> Picture:
    image: Image.Image
    kind = _format(data, name)
    notes: list[str] = []
    try:
        opened = image = Image.open(io.BytesIO(data), formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"at most {MAX_PIXELS // 10**6} million pixels are read"
        raise BadPicture(name, f"is too large; {limit}") from None
    except Exception:  # Pillow's readers raise many types on hostile bytes, and their text may hold addresses
        raise BadPicture(name, f"is a damaged {kind}: its header cannot be read") from None
    _check_size(name, *image.size)
    if getattr(image, "n_frames", 1) > 1:
        notes.append("first of several frames")
    try:
        image.load()
    except Exception:
        raise BadPicture(name, f"is a damaged {kind}: truncated or corrupt") from None

    sixteen = kind == "PNG" and data[24] == 16
    alpha = _key_alpha(image, data) if kind == "PNG" else None
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
    if image.mode != "I;16":
        if sixteen:
            notes.append("16-bit colour read as 8 bits")
        colour = {"1": "L", "LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
        flat = image.convert(colour) if colour != image.mode else image
        image, note = _to_srgb(flat, image.info.get("icc_profile"))
        notes += note
    elif "icc_profile" in image.info:
        notes.append("colour profile of 16-bit gray ignored")
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if alpha is not None:
        array = np.concatenate([array, alpha[..., None]], axis=2)
    try:
        orientation = opened.getexif().get(0x0112, 1)
    except Exception:  # a broken tag never drops the picture
        orientation, notes = 1, [*notes, "broken EXIF ignored"]
    return Picture(_orient(array, orientation), alpha is not None, tuple(notes))


def _key_alpha(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Alpha of a gray or RGB PNG whose tRNS chunk names one transparent value, h w."""
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "RGB", "I;16"):
        return None
    depth = data[24]
    array = np.asarray(image)
    if image.mode == "1":
        return np.where(array == (key > 127), 0, 255).astype(np.uint8)
    if image.mode == "RGB":
        match = (array == np.array(key) // (256 if depth == 16 else 1)).all(axis=2)
        return np.where(match, 0, 255).astype(np.uint8)
    scaled = key * {2: 85, 4: 17}.get(depth, 1)
    return np.where(array == scaled, 0, np.iinfo(array.dtype).max).astype(array.dtype)


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> Any:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[str]]:
    """`image` (L, RGB or CMYK) in sRGB, gray staying gray, and a note when its profile could not be used."""
    notes = []
    if profile:
        try:
            if len(profile) > MAX_PROFILE_BYTES:
                raise ValueError("profile too large")
            converted = _srgb_transform(profile, image.mode).apply(image)
            return converted.getchannel("G") if image.mode == "L" else converted, []
        except Exception:  # littlecms refuses broken profiles and profiles of another colour model
            notes = ["broken colour profile ignored"]
    return image.convert("RGB") if image.mode == "CMYK" else image, notes


def _orient(array: np.ndarray, orientation: object) -> np.ndarray:
    """`array` h w c turned as the EXIF orientation (1..8) says; any other value leaves it."""
    match orientation:
        case 2:
            return array[:, ::-1]
        case 3:
            return array[::-1, ::-1]
        case 4:
            return array[::-1]
        case 5:
            return array.transpose(1, 0, 2)
        case 6:
            return array.transpose(1, 0, 2)[:, ::-1]
        case 7:
            return array.transpose(1, 0, 2)[::-1, ::-1]
        case 8:
            return array.transpose(1, 0, 2)[::-1]
    return array


def _decode_tiff(data: bytes, name: str, stated: bool = False) -> Picture:
    """TIFF of 1 to N channels: axes `C` and `S` are channels; of pages, planes and times the first is taken.

    Where the range is `stated` values are as stored: signed ones too, and black where zero is.
    """
    try:
        import tifffile
    except ImportError:
        raise BadPicture(name, f"is TIFF, which {EXTRA}") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would say is in our reasons
    try:
        with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as tiff:
            series = tiff.series[0]
            page: Any = series.keyframe
            axes, shape = series.axes, series.shape
            sizes = dict(zip(axes, shape))
            channels = sizes.get("S", 1) * sizes.get("C", 1)
            _check_size(name, sizes.get("X", 1), sizes.get("Y", 1), channels)
            if int(np.prod(shape)) > MAX_SAMPLES:
                raise BadPicture(name, "is too large; split its planes into files")
            extra = tuple(int(kind) for kind in page.extrasamples)
            photometric, compression = int(page.photometric), int(page.compression)
            profile, orientation = page.tags.valueof(34675), page.tags.valueof(274)
            frames = len(tiff.series) > 1 or any(sizes[axis] > 1 for axis in axes if axis not in "YXSC")
            array = np.asarray(series.asarray())
        array = array[tuple(slice(None) if axis in "YXSC" else 0 for axis in axes)]
        kept = [axis for axis in axes if axis in "YXSC"]
        array = array.transpose([kept.index(axis) for axis in ("Y", "X", "C", "S") if axis in kept])
        array = array.reshape(sizes["Y"], sizes["X"], channels)
        if photometric == 3:
            array = np.moveaxis(np.take(np.asarray(page.colormap), array[..., 0], axis=1, mode="clip"), 0, 2)
    except BadPicture:
        raise
    except Exception as error:  # tifffile's readers raise many types on hostile bytes
        if "imagecodecs" in str(error):
            raise BadPicture(name, f"is compressed TIFF, which {EXTRA}".replace("tifffile", "imagecodecs")) from None
        raise BadPicture(name, "is a damaged TIFF: truncated or corrupt") from None

    notes = ["first of several frames"] if frames else []
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    if str(array.dtype.newbyteorder("=")) not in (SAMPLES if stated else ("uint8", "uint16", "float32")):
        signed = "8 and 16 bits" if stated else "8 and 16 bits unsigned"
        raise BadPicture(name, f"has {array.dtype} samples; {signed} and floating point are read")
    array = array.astype(array.dtype.newbyteorder("="))
    if photometric == 0 and not stated:
        array = (1.0 - array) if array.dtype == np.float32 else np.iinfo(array.dtype).max - array
    elif photometric not in (0, 1, 2, 3, 5) and not (photometric == 6 and compression in (6, 7)):
        raise BadPicture(name, f"has TIFF photometric {photometric}; gray, RGB, palette and CMYK are read")
    has_alpha = bool(extra) and extra[-1] in (1, 2)
    alpha = array[..., -1:] if has_alpha else None
    colours = array[..., :-1] if has_alpha else array
    if alpha is not None and extra[-1] == 1:
        colours = _unmultiply(colours, alpha)
    if colours.dtype == np.uint8 and (photometric == 5 or (profile and colours.shape[2] in (1, 3))):
        if photometric == 5 and colours.shape[2] != 4:
            raise BadPicture(name, f"has {colours.shape[2]} inks; CMYK of 4 is read")
        mode = {1: "L", 3: "RGB", 4: "CMYK"}[colours.shape[2]]
        pixels = np.ascontiguousarray(colours[..., 0] if mode == "L" else colours)
        image, note = _to_srgb(Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()), profile)
        colours, notes = np.asarray(image).reshape(*pixels.shape[:2], -1), notes + note
    elif photometric == 5:
        raise BadPicture(name, "is CMYK of more than 8 bits; save it as RGB")
    array = colours if alpha is None else np.concatenate([colours, alpha], axis=2)
    return Picture(_orient(array, orientation), has_alpha, tuple(notes))


def _unmultiply(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Straight colours of colours stored multiplied by alpha (TIFF's "associated" alpha)."""
    top = 1.0 if colours.dtype == np.float32 else float(np.iinfo(colours.dtype).max)
    straight = np.divide(colours * top, alpha, out=np.zeros(colours.shape), where=alpha > 0).clip(0, top)
    straight = straight if top == 1.0 else straight.round()
    return np.asarray(straight, colours.dtype)


def background_colour(background: str | Sequence[int]) -> tuple[int, int, int]:
    """Red, green, blue in 0..255 of "white", "black", "#rrggbb" or three numbers."""
    named = {"white": "#ffffff", "black": "#000000"}
    if isinstance(background, str):
        text = named.get(background, background)
        try:
            if len(text) != 7 or text[0] != "#":
                raise ValueError
            background = tuple(bytes.fromhex(text[1:]))
        except ValueError:
            raise InputError(f"background {background!r} is not a colour: use white, black or #rrggbb") from None
    red, green, blue = background
    return red, green, blue


def keeps_alpha(colours: int, channels: int) -> bool:
    """Whether the last of the channels that a picture of so many colours is read as is alpha: opaque if it has none."""
    return channels in (2, 4) and colours in (1, 3)


def visible(picture: Tensor, alpha: bool) -> Tensor:
    """A picture `c h w` as one to look at: whole where the last channel is `alpha`, else its first channel or three."""
    return picture if alpha else picture[: 1 if len(picture) < 3 else 3]


def to_tensor(picture: Picture, channels: int, background: str | Sequence[int] = "white") -> Tensor:
    """The picture as float32 `c h w` in [-1, 1] with the channels asked for.

    1 is gray (Rec. 601 luma), 2 gray and alpha, 3 RGB, 4 RGB and alpha (straight; colours that cannot be seen become
    the background's); without an alpha channel asked for, transparency is laid over `background`. A picture without
    alpha that has exactly the number of channels asked for keeps them. Anything else is an `InputError`.
    """
    x = _to_float(picture.array)
    colours = x.shape[0] - picture.has_alpha
    keep_alpha = keeps_alpha(colours, channels)
    alpha = (x[-1:] + 1) / 2 if picture.has_alpha else None
    x = x[:colours]
    wanted = channels - keep_alpha
    if wanted != colours and not (colours in (1, 3) and wanted in (1, 3)):
        what = "colour channel" + "s" * (colours != 1)
        raise InputError(f"a picture with {colours} {what} cannot be read as {channels} channels; use {colours}")
    base = torch.tensor(background_colour(background)).float() / 127.5 - 1
    base = _luma(base[:, None, None]) if colours != 3 else base[:, None, None]
    if alpha is not None:
        x = torch.where(alpha > 0, x, base) if keep_alpha else alpha * x + (1 - alpha) * base
    if wanted != colours:
        x = _luma(x) if wanted == 1 else x.expand(3, -1, -1)
    if keep_alpha:
        x = torch.cat([x, torch.ones_like(x[:1]) if alpha is None else alpha * 2 - 1])
    return x.contiguous()


def _to_float(array: np.ndarray) -> Tensor:
    x = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)
    half = 0.5 if array.dtype == np.float32 else np.iinfo(array.dtype).max / 2
    return x.div_(half).sub_(1)


def _luma(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def resize(
    picture: Tensor, height: int, width: int, *, alpha: bool = False, background: str | Sequence[int] = "white"
) -> Tensor:
    """`c h w` in [-1, 1] resampled to `height` x `width` pixels, antialiased bicubic (Keys, a = -0.5), clamped.

    With `alpha` the last channel is alpha: colours are weighted by it, so that hidden ones do not bleed in.
    """
    if picture.shape[1:] == (height, width):
        return picture
    x, base = picture, torch.zeros(())
    if alpha:
        base = (torch.tensor(background_colour(background)).float() / 127.5 - 1)[:, None, None]
        base = _luma(base) if picture.shape[0] == 2 else base
        cover = (picture[-1:] + 1) / 2
        x = torch.cat([(picture[:-1] - base) * cover, cover])
    x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    if alpha:
        cover = x[-1:].clamp(0, 1)
        x = torch.cat([base + x[:-1] / cover.clamp(min=1e-4), cover * 2 - 1])
    return x.clamp(-1, 1)


def to_samples(picture: Tensor, dtype: Any) -> np.ndarray:
    """`c h w` in [-1, 1] as the h w c array of a file: 0 to the highest whole number of its type, or 0..1."""
    if not torch.isfinite(picture).all():
        raise InputError("the picture holds NaN or infinite values and was not written")
    x = (picture.detach().cpu().float().clamp(-1, 1) + 1).permute(1, 2, 0)
    if dtype == np.float32:
        return (x * 0.5).numpy()
    return np.asarray((x * (np.iinfo(dtype).max / 2)).round().numpy(), dtype)


def to_png(picture: Tensor, text: dict[str, str] | None = None, *, depth: int = 8) -> bytes:
    """PNG bytes of `c h w` in [-1, 1]: 1 (gray), 2 (gray, alpha), 3 or 4 channels of 8 bits, or 1 of 16 bits.

    `text` goes into tEXt chunks, or iTXt where it is not Latin-1. Equal input gives equal bytes.
    """
    channels = picture.shape[0]
    if channels > 4 or depth not in (8, 16) or (depth == 16 and channels != 1):
        allowed = "1 to 4 channels of 8 bits or 1 channel of 16; write TIFF for others"
        raise InputError(f"PNG cannot hold {channels} channels of {depth} bits: {allowed}")
    array = to_samples(picture, np.uint16 if depth == 16 else np.uint8)
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info, compress_level=6)
    return out.getvalue()


def to_tiff(picture: Tensor, *, depth: int = 16) -> bytes:
    """TIFF bytes of `c h w` in [-1, 1] with any number of channels, 8 or 16 bits, or 32 for floating point 0..1."""
    dtypes: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.float32}
    if depth not in dtypes:
        raise InputError(f"TIFF of {depth} bits is not written: use 8, 16 or 32 (floating point)")
    return tiff_of(to_samples(picture, dtypes[depth]))


def to_range(picture: Tensor, values: Range, samples: str | None = None, *, alpha: bool = False) -> bytes:
    """TIFF bytes of `c h w` in [-1, 1], its colours by a range, in the type `samples` or the stated one.

    Alpha is in no range: it runs from zero to the highest value of the type, of floats to 1.
    """
    array = values.to_values(picture[: len(picture) - alpha], samples)
    if alpha:
        array = np.concatenate([array, to_samples(picture[-1:], array.dtype)], axis=2)
    return tiff_of(array, alpha=alpha)


def tiff_of(array: np.ndarray, *, alpha: bool = False) -> bytes:
    """TIFF bytes of h w c values as they are, the last channel marked as `alpha` or as one like the others.

    InputError where tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise InputError(f"writing TIFF {EXTRA}") from None
    channels = array.shape[2]
    colours = 3 if channels - alpha == 3 else 1
    extra = [0] * (channels - alpha - colours) + [2] * alpha
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        tiff.write(
            array if channels > 1 else array[..., 0],
            photometric="rgb" if colours == 3 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=extra or None,
            metadata=None,
        )
    return out.getvalue()


def grid(pictures: Sequence[Tensor], columns: int | None = None, *, gap: int = 2, fill: float = 1.0) -> Tensor:
    """One sheet `c H W` of pictures `c h w` (sizes may differ), row by row, centred in equal cells on `fill`."""
    if not pictures:
        raise InputError("a sheet needs at least one picture")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height = max(p.shape[1] for p in pictures)
    width = max(p.shape[2] for p in pictures)
    sheet = torch.full((pictures[0].shape[0], rows * (height + gap) + gap, columns * (width + gap) + gap), fill)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top = gap + row * (height + gap) + (height - picture.shape[1]) // 2
        left = gap + column * (width + gap) + (width - picture.shape[2]) // 2
        sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture.float().cpu()
    return sheet
