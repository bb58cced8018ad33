"""What the data and the machine ask for: channels, size, condition, and the shapes of both networks, as two recipes."""

import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch

from latentkit.data.dataset import Transform, bucket_shapes, nearest_shape
from latentkit.data.source import Source
from latentkit.errors import InputError, nearest
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioners.text import TextConditioner, train_tokenizer
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import DiffusionLoss, SigmaSampling
from latentkit.training.ema import Averaging
from latentkit.training.first_stage.autoencoder import ReconstructionLoss
from latentkit.training.optimizers import Optimiser
from latentkit.training.recipe import AutoencoderRecipe, DataRecipe, DiffusionRecipe, Sampling
from latentkit.training.trainer import Schedule

Condition = Literal["auto", "text", "label", "none"]
CONDITIONS = ("auto", "text", "label", "none")
SMALLEST, LARGEST = 16, 1024  # pixels a side
MANY = 1000  # pictures from which on the first stage needs no parts of them
MOST_ZOOM = 4
MOST_CUT = 0.1  # of the pictures' area, that one square may cut off; where it is more, pictures keep about their shape
HELD_SPLITS = ("validation", "holdout", "test")


class Scale(NamedTuple):
    """What one kind of device can train in a sitting: the widths and batches of both networks."""

    size: int
    """Pixels a side unless another size is asked for."""
    compression: int
    """Picture values per latent value."""
    autoencoder: int
    autoencoder_levels: tuple[int, int]
    autoencoder_batch: int
    unet: int
    blocks: int
    depth: int
    """Transformer blocks after each residual block below the first level."""
    text: int
    text_layers: int
    batch: int
    head: int = 32
    """Width of an attention head."""


SCALES = {
    "cpu": Scale(64, 8, 96, (1, 1), 16, 192, 1, 0, 192, 3, 32),
    "cuda": Scale(256, 12, 128, (1, 2), 32, 256, 2, 1, 384, 6, 64),
}


class Reason(NamedTuple):
    """One choice and why."""

    what: str
    value: str
    why: str


class Choice(NamedTuple):
    """Both recipes (their lengths still open), and the reasons."""

    autoencoder: AutoencoderRecipe
    diffusion: DiffusionRecipe
    reasons: list[Reason]


def choose(
    source: Source, folder: str, run: Path, name: str, *, size: int | None, condition: str, seed: int, device: str
) -> Choice:
    """Recipes for these pictures on this kind of device ("cpu", "cuda").

    Errors: InputError for pictures of different kinds, a size or condition that does not fit.
    """
    if len(source) < 2:
        raise InputError(f"{folder} holds one usable picture; a model needs at least two, and hundreds to be good")
    scale = SCALES["cpu" if device == "cpu" else "cuda"]
    reasons: list[Reason] = []
    channels = _channels(source, reasons)
    side = _size(source, size, scale, device, reasons)
    buckets = _buckets(source, side, reasons)
    text, label = _condition(source, condition, scale, reasons)
    split, holdout = _splits(source, reasons)
    stem, multipliers = shape(side)
    cell = 2 * stem
    latent = max(4, 4 * -(-channels * cell**2 // (4 * scale.compression)))
    reasons.append(Reason("latents", f"{side // cell}x{side // cell}x{latent}", f"{cell}x smaller a side"))
    data = DataRecipe(
        path=folder, split=split, holdout=holdout, transform=Transform(size=side, channels=channels, buckets=buckets),
        workers=0 if device == "cpu" else 8,
    )  # fmt: skip
    parts = _parts(source, data.transform, reasons)
    precision = _precision(device)
    reasons.append(Reason("precision", precision, "the fastest that this device computes well"))
    schedule = Schedule(steps=1, batch=scale.autoencoder_batch, precision=precision, device=device)
    autoencoder = AutoencoderRecipe(
        stage="autoencoder",
        name=f"{name}-autoencoder",
        seed=seed,
        data=data.model_copy(update={"transform": parts}),
        network=AutoencoderConfig(
            picture_channels=channels,
            latent_channels=latent,
            channels=scale.autoencoder,
            multipliers=scale.autoencoder_levels,
            stem=stem,
            attention=False,
        ),
        loss=ReconstructionLoss(kl=3e-4),
        optimiser=Optimiser(name="muon", lr=2e-3, weight_decay=0.01, decay=0.5),
        averaging=Averaging(decay=0.998, power=()),
        schedule=schedule,
    )
    depth = (0, *(scale.depth for _ in multipliers[1:]))
    diffusion = DiffusionRecipe(
        stage="diffusion",
        name=name,
        seed=seed,
        data=data,
        first_stage=str(run / "autoencoder"),
        network=UNetConfig(
            channels=scale.unet,
            multipliers=multipliers,
            blocks=scale.blocks,
            depth=depth,
            heads=None,
            head_width=scale.head,
            scale_shift=True,
            embedding_width=2 * scale.unet,
        ),
        text=text,
        label=label,
        loss=DiffusionLoss(sigma=SigmaSampling(mean=0.3)),
        optimiser=Optimiser(name="muon", lr=1e-3, weight_decay=0.01, decay=0.4),
        averaging=Averaging(decay=0.999, power=()),
        schedule=schedule.model_copy(update={"batch": scale.batch}),
        sampling=Sampling(guidance_scale=2.0 if text or label else 1.0),
    )
    return Choice(autoencoder, diffusion, reasons)


def shape(size: int) -> tuple[int, tuple[int, ...]]:
    """The autoencoder's stem (half its cell) and the U-Net's multipliers for pictures of `size` pixels."""
    stem = 2 if size <= 32 else 4
    side = size // (2 * stem)
    return stem, (1, 1) if side <= 8 else (1, 2) if side <= 16 else (1, 2, 2)


def sizes() -> list[int]:
    """Sizes whose latents every level of the U-Net can halve."""
    fitting = []
    for size in range(SMALLEST, LARGEST + 1, 8):
        stem, multipliers = shape(size)
        if size % (2 * stem * 2 ** (len(multipliers) - 1)) == 0:
            fitting.append(size)
    return fitting


def model_name(text: str) -> str:
    """A name for a model from any folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "model"


def _channels(source: Source, reasons: list[Reason]) -> int:
    kinds = Counter(item.channels - item.alpha for item in source.items)
    if len(kinds) > 1 and set(kinds) != {1, 3}:
        counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        raise InputError(f"the pictures have different numbers of colour channels ({counts}); give one kind a folder")
    colours = max(kinds)
    transparent = sum(item.transparent for item in source.items)
    if colours in (1, 3) and 2 * transparent > len(source):
        why = f"{transparent} of {len(source)} pictures are transparent: alpha is kept as a channel"
        reasons.append(Reason("channels", str(colours + 1), why))
        return colours + 1
    why = "as stored" if len(kinds) == 1 else f"{kinds[1]} gray pictures among {kinds[3]} of RGB"
    why += f"; {transparent} transparent pictures are laid on white" if transparent else ""
    reasons.append(Reason("channels", str(colours), why))
    return colours


def _size(source: Source, asked: int | None, scale: Scale, device: str, reasons: list[Reason]) -> int:
    fitting = sizes()
    if asked is not None:
        if asked not in fitting:
            near = sorted(sorted(fitting, key=lambda size: abs(size - asked))[:2])
            raise InputError(f"size {asked} does not fit; nearest: {near[0]} and {near[1]}", exit_code=2)
        reasons.append(Reason("size", f"{asked}x{asked}", "asked for"))
        return asked
    short = int(median(min(item.width, item.height) for item in source.items))
    side = max(size for size in fitting if size <= max(SMALLEST, min(scale.size, short)))
    why = f"pictures have a median short side of {short} pixels; on {device} at most {scale.size}"
    reasons.append(Reason("size", f"{side}x{side}", why))
    return side


def _buckets(source: Source, side: int, reasons: list[Reason]) -> bool:
    """Whether pictures keep about their shape: a stated rule on what one square would cut."""
    cut = [1 - min(item.width, item.height) / max(item.width, item.height) for item in source.items]
    mean, most = sum(cut) / len(cut), f"{MOST_CUT:.0%}"
    if mean <= MOST_CUT:
        why = "all are square" if mean == 0 else f"cut to it, they lose {mean:.1%} of their area: at most {most}"
        reasons.append(Reason("shape", "one square", why))
        return False
    stem, multipliers = shape(side)
    shapes = bucket_shapes(side, 2 * stem * 2 ** (len(multipliers) - 1))
    used = Counter(nearest_shape(shapes, item.height, item.width) for item in source.items)
    listed = ", ".join(f"{shapes[i][1]}x{shapes[i][0]} ({count})" for i, count in used.most_common(4))
    why = f"one square would cut off {mean:.0%} of their area: more than {most}; {listed}"
    reasons.append(Reason("shape", f"{len(used)} shapes", why + (", ..." if len(used) > 4 else "")))
    return True


def _parts(source: Source, transform: Transform, reasons: list[Reason]) -> Transform:
    """What the first stage sees of few pictures: parts at several sizes too, or it learns them by heart."""
    has = int(median(min(item.width, item.height) for item in source.items)) // transform.size
    zoom = min(MOST_ZOOM, 1 << max(0, has.bit_length() - 1))
    if zoom == 1 or len(source) >= MANY:
        return transform
    sizes = ", ".join(str(1 << level) for level in range(zoom.bit_length()))
    why = f"{len(source)} pictures are few (under {MANY:,}) to learn to give any picture back from"
    reasons.append(Reason("first stage", f"parts at {sizes}x", why))
    return transform.model_copy(update={"crop": "random", "zoom": zoom})


def _condition(
    source: Source, asked: str, scale: Scale, reasons: list[Reason]
) -> tuple[TextEncoderConfig | None, LabelConfig | None]:
    if asked not in CONDITIONS:
        raise InputError(f"condition {asked!r} is unknown; {nearest(asked, CONDITIONS)}", exit_code=2)
    captions = [item.caption for item in source.items if item.caption]
    labelled = sum(item.label is not None for item in source.items)
    if asked == "text" and not captions:
        raise InputError("condition text was asked for, but no picture has a caption; see 'latentkit data check'")
    if asked == "label" and len(source.classes) < 2:
        raise InputError(f"condition label was asked for, but there are {len(source.classes)} classes; two are needed")
    total = len(source)
    if asked == "text" or (asked == "auto" and 2 * len(captions) >= total and len(set(captions)) > 1):
        reasons.append(Reason("condition", "text", f"{len(captions)} of {total} pictures have captions"))
        return _text(captions, scale), None
    few = f"; {len(captions)} captions are too few or all alike (--condition text uses them)" if captions else ""
    if asked == "label" or (asked == "auto" and len(source.classes) > 1 and 2 * labelled >= total):
        reasons.append(Reason("condition", "label", f"{len(source.classes)} classes{few}"))
        return None, LabelConfig(width=scale.text)
    reasons.append(Reason("condition", "none", "asked for" if asked == "none" else f"no words to learn{few}"))
    return None, None


def _text(captions: list[str], scale: Scale) -> TextEncoderConfig:
    """A text encoder as wide as the scale, with the vocabulary and length that 99 % of the captions need."""
    words = {word for caption in captions for word in caption.lower().split()}
    heads = max(1, scale.text // 32)
    vocabulary = min(4096, 512 + 2 * len(words))
    tokenizer = train_tokenizer(captions, vocabulary)
    counter = TextConditioner(TextEncoderConfig(vocabulary, 256, heads, 0, heads), tokenizer)
    lengths = sorted(int(row.count_nonzero()) for start in range(0, len(captions), 1024)
                     for row in counter.tokens(captions[start : start + 1024]))  # fmt: skip
    length = min(77, max(8, lengths[(99 * len(lengths) - 1) // 100]))
    return TextEncoderConfig(vocabulary, length, scale.text, scale.text_layers, heads)


def _splits(source: Source, reasons: list[Reason]) -> tuple[str | None, str | None]:
    """The splits to train on and to hold back, where the data names them."""
    named = Counter(item.split for item in source.items if item.split)
    held = next((split for split in HELD_SPLITS if split in named), None)
    if held is None or named[held] == len(source):
        reasons.append(Reason("held out", "5 %", "fixed by the pictures' digests, not trained on"))
        return None, None
    train = "train" if "train" in named else None
    reasons.append(Reason("held out", f"split {held}", f"{named[held]} pictures that the data names"))
    return train, held


def _precision(device: str) -> Literal["bf16", "float32"]:
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "float32"
