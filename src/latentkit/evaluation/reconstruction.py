"""What a first stage gives back of pictures of any size, how well, and how to show it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.data.pictures import Picture, grid, keeps_alpha, tiff_of, to_png, to_range, to_samples, visible
from latentkit.data.range import Range
from latentkit.model.first_stage import FirstStage
from latentkit.training.first_stage.losses import structure


class Passed(NamedTuple):
    """A picture that went through a first stage: raw latents `z h w`, and what came back, `c H W` in [-1, 1]."""

    latents: Tensor
    picture: Tensor


@torch.inference_mode()
def reconstruct(first_stage: FirstStage, picture: Tensor) -> Passed:
    """A picture `c h w` in [-1, 1] through a first stage (the posterior's mean), float32 on the CPU.

    Its edges are repeated up to the next multiple of the downsampling, and cut off again.
    """
    height, width = picture.shape[1:]
    factor = first_stage.downsampling
    padded = F.pad(picture[None].float(), (0, -width % factor, 0, -height % factor), mode="replicate")
    moments = first_stage.moments(padded.to(first_stage.latent_mean.device))
    decoded = first_stage.decode(first_stage.from_moments(moments))[0, :, :height, :width]
    return Passed(moments[0, : first_stage.latent_channels].cpu(), decoded.clamp(-1, 1).float().cpu())


def beside(original: Tensor, other: Tensor, times: float, alpha: bool) -> bytes:
    """A PNG of a picture `c h w`, its reconstruction, and the largest error of any channel, `times` times, on black.

    White is an error of the whole range over `times`, or more. The last channel may be `alpha`; of two that are not the
    first is shown, of more the first three.
    """
    error = ((original - other).abs().amax(0, keepdim=True) * times - 1).clamp(-1, 1)
    panes = [visible(pane, alpha) for pane in (original, other)]
    mapped, opaque = error.expand(len(panes[0]) - alpha, -1, -1), torch.ones_like(error)[:alpha]
    text = f"a picture, its reconstruction, and the largest error of any channel times {times:g}"
    return to_png(grid([*panes, torch.cat([mapped, opaque])], 3), {"Description": text})


def as_stored(picture: Tensor, source: Picture, values: Range | None, tiff: bool) -> tuple[str, bytes]:
    """Suffix and bytes of a picture `c h w` in [-1, 1] in the sample type, and by the range, of its `source`.

    PNG where that can hold it and the source is no `tiff`, else TIFF. Alpha is in no stated range.
    """
    alpha = keeps_alpha(source.colours, len(picture))
    if values is not None and source.samples is not None:
        return "tiff", to_range(picture, values, source.samples, alpha=alpha)
    dtype = source.array.dtype
    if not tiff and dtype == np.uint8 and (len(picture) in (1, 3) or alpha):
        return "png", to_png(picture)
    if not tiff and dtype == np.uint16 and len(picture) == 1:
        return "png", to_png(picture, depth=16)
    return "tiff", tiff_of(to_samples(picture, dtype), alpha=alpha)


def psnr(original: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of two pictures in [-1, 1] (peak to peak 2), at most 100."""
    error = float(((original - other) / 2).square().mean())
    return 100.0 if error <= 1e-10 else float(-10 * torch.log10(torch.tensor(error)))


def bounding_box(picture: Tensor, background: float = 1.0) -> tuple[slice, slice]:
    """Rows and columns of `c h w` that hold anything but the background value (all of them if nothing does)."""
    inked = (picture - background).abs().amax(0) > 2 / 255
    if not inked.any():
        return slice(None), slice(None)
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def reconstruction(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over (original, reconstruction) pairs `c h w` in [-1, 1].

    `psnr` of whole pictures, `psnr_box` inside the box that is not plain white, and `structure`, the structural
    similarity over three scales (1 is equal).
    """
    rows = []
    for original, other in pairs:
        height, width = bounding_box(original)
        similarity = 1 - float(structure(other[None], original[None]))
        rows.append((psnr(original, other), psnr(original[:, height, width], other[:, height, width]), similarity))
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("psnr", "psnr_box", "structure"), means, strict=True))
