"""A first stage measured on pictures of any size: what comes back, how its latents lie, how its codes are used."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.files import find, load, load_autoencoder
from latentkit.checkpoints.lone import lone_first_stage
from latentkit.checkpoints.storage.digest import Digest
from latentkit.data.pictures import BadPicture, to_tensor
from latentkit.data.range import Range, stated, transform_of
from latentkit.data.source import Source, track
from latentkit.errors import InputError
from latentkit.evaluation.metrics.features import NETWORK, features
from latentkit.evaluation.metrics.frechet import frechet
from latentkit.evaluation.metrics.kid import Kid, kid
from latentkit.evaluation.metrics.similarity import ms_ssim, ssim
from latentkit.evaluation.reconstruction import bounding_box, psnr, reconstruct
from latentkit.model.first_stage import FirstStage
from latentkit.nets.autoencoder import Autoencoder
from latentkit.nets.perceptual import PerceptualDistance
from latentkit.training.first_stage.perceptual import Perceptual, read_distance, read_tensors

LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, by its format."""
LARGEST = 1024
"""Side in pixels of the middle of a picture that LPIPS is taken of."""


class Opened(NamedTuple):
    """A first stage, how it was shown its pictures (on what, by which range of values), its file's name and sha256."""

    first_stage: FirstStage
    background: str
    values: Range | None
    name: str
    digest: str


class Codes(NamedTuple):
    """How codes are used: their number, how many of them were chosen at all, exp(entropy) of the choice, by cells."""

    codes: int
    chosen: int
    perplexity: float
    cells: int


class Report(NamedTuple):
    """Means over pictures; LPIPS, distances and codes where there are any.

    `psnr_box` is inside the box that is not plain white, of pictures that have such a margin. `scales` are the fewest
    and the most that `ms_ssim` was taken over. `frechet` and `kid` are by the features of `network`.
    """

    pictures: int
    left_out: dict[str, str]
    psnr: float
    psnr_box: float | None
    ssim: float
    ms_ssim: float
    scales: tuple[int, int]
    lpips: float | None
    network: str
    frechet: float | None
    kid: Kid | None
    codes: Codes | None
    latent_mean: list[float]
    latent_std: list[float]
    downsampling: int

    def document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self._asdict(), **{name: _plain(getattr(self, name)) for name in ("kid", "codes")}}


def _plain(value: Kid | Codes | None) -> dict[str, Any] | None:
    return value and value._asdict()


def open_first_stage(name: str | Path, device: str | torch.device | None = None) -> Opened:
    """The first stage called `name`, alone in its file (or others') or a whole model's, float32; errors as `load`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    alone = _alone(name)
    if alone is None and Path(name).exists() and (foreign := lone_first_stage(Path(name), device, torch.float32)):
        return Opened(foreign, "white", None, Path(name).stem, Digest(Path(name))())
    if alone is not None:
        path, provenance = alone
        first_stage, title, sha256 = load_autoencoder(path, device), str(name), Digest(path)()
    else:
        model = load(name, device, torch.float32)
        first_stage, provenance, title, sha256 = model.network.first_stage, model.provenance, model.name, model.digest
    background = str(transform_of(provenance).get("background", "white"))
    return Opened(first_stage, background, stated(provenance, str(name)), title, sha256)


def _alone(name: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The path and the provenance of an autoencoder's file, None where `name` means something else."""
    try:
        path = find(name)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:  # no safetensors file
                return None
            header = json.loads(file.read(length))
        document = json.loads(header["__metadata__"]["latentkit"])
        return (path, dict(document["provenance"])) if document["kind"] == "autoencoder" else None
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None  # whatever reads it next says what is wrong


def open_distance(trunk: Path, heads: Path) -> PerceptualDistance:
    """LPIPS from a file of VGG16's or AlexNet's weights and one of its layers; errors as `read_distance`."""
    first = read_tensors(trunk).get("features.0.weight")
    network: Literal["vgg16", "alexnet"] = "alexnet" if first is not None and first.shape[-1] == 11 else "vgg16"
    return read_distance(Perceptual(network=network, weights=str(trunk), heads=str(heads)))


def chosen_codes(autoencoder: Autoencoder, latents: Tensor) -> Tensor | None:
    """The number of the code of each cell of raw latents `z h w`, flat; None where there are no codes."""
    rounding = autoencoder.codebook or autoencoder.levels
    if rounding is None:
        return None
    return rounding.nearest(latents[None].to(next(autoencoder.parameters()).device)).flatten().cpu()


def evaluate(
    first_stage: FirstStage,
    source: Source,
    *,
    count: int | None = None,
    background: str = "white",
    lpips: PerceptualDistance | None = None,
    shown: bool = False,
) -> Report:
    """Measure a first stage on `count` pictures (None: all), evenly taken, each at its own size.

    `shown` shows progress on stderr. Errors: InputError where no picture can be measured.
    """
    take = min(count or len(source), len(source))
    left_out: dict[str, str] = {}

    def originals() -> Iterator[Tensor]:
        for place in track(range(take), take, "reconstructing", shown):
            index = place * len(source) // take
            try:
                original = to_tensor(source.read(index), first_stage.picture_channels, background)
            except BadPicture as error:
                left_out[error.name] = error.reason
                continue
            except InputError as error:  # of other channels
                left_out[source.items[index].key] = str(error)
                continue
            yield original
        if len(left_out) == take:
            first = next(iter(left_out.items()), ("the data", "holds no picture"))
            raise InputError(f"no picture could be measured; {first[0]}: {first[1]}")

    return measure(first_stage, originals(), lpips)._replace(left_out=left_out)


def measure(first_stage: FirstStage, originals: Iterable[Tensor], lpips: PerceptualDistance | None = None) -> Report:
    """Measure a first stage on pictures `c h w` in [-1, 1]; InputError where there are none."""
    rows: list[dict[str, float]] = []
    known, seen = [], []
    chosen: Counter[int] = Counter()
    moments = torch.zeros(3, first_stage.latent_channels, dtype=torch.float64)
    autoencoder = first_stage.autoencoder
    for original in originals:
        latents, other = reconstruct(first_stage, original)
        rows.append(_compared(original, other, lpips))
        both = features([original, other])
        known.append(both[0])
        seen.append(both[1])
        values = latents.double().flatten(1)
        moments += torch.stack([torch.ones(len(values)) * values.shape[1], values.sum(1), values.square().sum(1)])
        codes = chosen_codes(autoencoder, latents) if autoencoder is not None else None
        if codes is not None:
            chosen.update(codes.tolist())
    if not rows:
        raise InputError("no picture could be measured; there is none")
    mean = moments[1] / moments[0]
    x, y = torch.stack(known), torch.stack(seen)
    return Report(
        pictures=len(rows),
        left_out={},
        psnr=_mean(rows, "psnr") or 0.0,
        psnr_box=_mean(rows, "psnr_box"),
        ssim=_mean(rows, "ssim") or 0.0,
        ms_ssim=_mean(rows, "ms_ssim") or 0.0,
        scales=(int(min(row["scales"] for row in rows)), int(max(row["scales"] for row in rows))),
        lpips=_mean(rows, "lpips"),
        network=NETWORK,
        frechet=frechet(x, y) if len(rows) > 1 else None,
        kid=kid(x, y) if len(rows) > 3 else None,
        codes=usage(autoencoder, chosen),
        latent_mean=mean.tolist(),
        latent_std=(moments[2] / moments[0] - mean.square()).clamp_min(0).sqrt().tolist(),
        downsampling=first_stage.downsampling,
    )


def _compared(original: Tensor, other: Tensor, lpips: PerceptualDistance | None) -> dict[str, float]:
    """Every figure of one picture; `psnr_box` and `lpips` where they can be had."""
    scaled = ms_ssim(original, other)
    row = {"psnr": psnr(original, other), "ssim": ssim(original, other), "ms_ssim": scaled.value}
    row["scales"] = scaled.scales
    height, width = bounding_box(original)
    inked = original[:, height, width]
    if inked.shape != original.shape:
        row["psnr_box"] = psnr(inked, other[:, height, width])
    if lpips is not None and min(original.shape[1:]) >= lpips.trunk.smallest:
        device = lpips.heads[0].device
        with torch.inference_mode():
            row["lpips"] = float(lpips(*(_middle(p)[None].to(device) for p in (original, other))))
    return row


def _middle(picture: Tensor) -> Tensor:
    top, left = (max(0, (side - LARGEST) // 2) for side in picture.shape[1:])
    return picture[:, top : top + LARGEST, left : left + LARGEST]


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return math.fsum(values) / len(values) if values else None


def usage(autoencoder: Autoencoder | None, chosen: Mapping[int, int]) -> Codes | None:
    """How codes are used, of the number of cells that chose each; None where there are no codes."""
    if autoencoder is None or not chosen:
        return None
    config = autoencoder.config
    cells = sum(chosen.values())
    entropy = -math.fsum(n / cells * math.log(n / cells) for n in chosen.values())
    return Codes(config.codes or math.prod(config.levels or ()), len(chosen), math.exp(entropy), cells)


def lines(found: Report) -> Iterator[str]:
    """What a person reads."""
    yield f"{found.pictures} pictures through a first stage of downsampling {found.downsampling}, each at its own size"
    for name, reason in list(found.left_out.items())[:5]:
        yield f"  left out: {name}: {reason}"
    yield f"PSNR      {found.psnr:8.2f} dB, the mean of pictures' (of values from -1 to 1)"
    if found.psnr_box is not None:
        yield f"  inked   {found.psnr_box:8.2f} dB inside the box that is not white, of pictures with a white margin"
    yield f"SSIM      {found.ssim:8.4f}"
    few, most = found.scales
    said = f"over {most} scales" if few == most else f"over {few} to {most} scales"
    short = "; the published 5 do not fit into pictures below 176 px" if few < 5 else ""
    yield f"MS-SSIM   {found.ms_ssim:8.4f} {said}{short}"
    if found.lpips is not None:
        yield f"LPIPS     {found.lpips:8.4f}"
    named = f"features of {found.network}, which compare with no Inception figure"
    if found.frechet is not None:
        yield f"rFD       {found.frechet:8.4f} Frechet distance, {named}, nor with other numbers of pictures"
    if found.kid is not None:
        yield f"KID       {found.kid.mean:8.2g} +- {found.kid.std:.2g}, {named}"
    if found.codes is not None:
        codes, chosen, perplexity, cells = found.codes
        yield f"codes     {chosen} of {codes} chosen in {cells} cells, perplexity {perplexity:.1f}"
    yield "latents   channel    mean  deviation"
    for channel, (mean, std) in enumerate(zip(found.latent_mean, found.latent_std, strict=True)):
        yield f"          {channel:7d}{mean:8.3f}{std:11.3f}"
