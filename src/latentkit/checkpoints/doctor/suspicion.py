"""Tensors that training or conversion may have spoiled, told by their size beside that of their likes."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

import torch
from torch import Tensor

from latentkit.checkpoints.names.rename import blocks, finite
from latentkit.nets.lora import Changes

PART = re.compile(r"denoiser\.|first_stage\.|conditioners\.\w+\.(towers\.\d+\.)?|")
"""Tensors whose names begin alike are compared."""
TABLES = re.compile(
    r"(.*\.)?(token_embedding|position_embedding|class_embedding|label\.embedding|vectors|fusion\.kinds)(\.weight)?"
)
"""Rows that are looked up: their size says nothing of a layer's."""
BORN_ZERO = re.compile(r"(.*\.)?(conv_out|project_out|skips\.\d+|middle_out|hint\.\d+|fusion\.out)\.weight")
"""Layers that start at zero, and may be as small as training has just begun to make them."""
ANY = re.compile(r".*")
ADDED = re.compile(r"(skips\.\d+|middle_out)\.(weight|bias)")
"""What a ControlNet adds to a U-Net goes through these."""
STATISTICS = re.compile(r"(.*\.)?(latent_mean|latent_std|image\.mean|image\.std)")
LARGER, SMALLER = 50.0, 1e-3
"""Times the median of its likes beyond which a layer is out of proportion; trained ones stay within 10."""
BARELY = 1e-6
"""The least for a layer that starts at zero, of the median."""
LARGEST_GAIN, LARGEST_NORM, LARGEST_VALUE = 100.0, 1e3, 1e3
LARGEST_BIAS = 100.0
LEAST_NORM = 1e-3
"""Sizes beyond which a tensor is out of proportion by itself: norms start at one, and other layers' gain below it."""


def suspicious(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that are not finite, all zero or of a wrong scale, by our names, in words."""
    return _out_of_proportion(state.items(), BORN_ZERO)


def suspicious_changes(changes: Changes) -> dict[str, str]:
    """Changes of a LoRA that have no effect, as new ones have none, or whose scale is wrong; whole blocks as one.

    A DoRA whose product is zero may rescale the weight all the same.
    """
    zero = {name for name, change in changes.items() if change.zero}
    idle = [name for name in zero if changes[name].magnitude is None]
    if changes and len(idle) == len(changes):
        return {f"all {len(idle)} changes": "are zero: this LoRA has no effect"}
    found = dict.fromkeys(blocks(idle, changes), "is zero: it has no effect")
    left = ((name, change) for name, change in changes.items() if name not in zero and change.up.ndim > 1)
    return found | _out_of_proportion(((name, change.scale * change.product()) for name, change in left), ANY)


def suspicious_control(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The same of a ControlNet's tensors as of a model's; all that it adds is told as one where it is zero."""
    found = suspicious(state)
    added = [name for name in state if ADDED.fullmatch(name)]
    if any(state[name].any() for name in added):
        return found
    untrained = {"skips and middle_out": "are all zero, as before training: this ControlNet changes nothing"}
    return untrained | {name: why for name, why in found.items() if name not in added}


def _out_of_proportion(tensors: Iterable[tuple[str, Tensor]], born_zero: re.Pattern[str]) -> dict[str, str]:
    """The tensors, each looked at once; `born_zero` are the names of those that may be small.

    The gain of a layer is the size (root mean square) of its weights times the root of its inputs' number.
    """
    found: dict[str, str] = {}
    gains: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or STATISTICS.fullmatch(name):
            continue
        size = _size(tensor)
        norm = tensor.ndim == 1 and name.endswith("weight")
        if not math.isfinite(size):
            found[name] = "holds values that are not finite"
        elif size == 0 and (tensor.ndim > 1 or norm):
            found[name] = "is all zero"
        elif norm and size < LEAST_NORM:
            found[name] = f"has values near 0 (of the size {size:.2g}), which a norm multiplies with"
        elif size > (LARGEST_NORM if norm else LARGEST_BIAS if name.endswith("bias") else LARGEST_VALUE):
            found[name] = f"has values of the size {size:.3g}"
        elif norm or (tensor.ndim > 1 and not TABLES.fullmatch(name)):
            match = PART.match(name)
            gain = size if norm else size * tensor[0].numel() ** 0.5
            gains["norm" if norm else "layer", match[0] if match else ""][name] = gain
    for (kind, _), alike in gains.items():
        middle = median(alike.values())
        for name, gain in alike.items():
            least = BARELY if born_zero.fullmatch(name) else SMALLER
            if gain > middle * LARGER:
                found[name] = f"is {gain / middle:.2g} times as large as is usual here"
            elif gain < middle * least:
                found[name] = f"is {middle / gain:.2g} times as small as is usual here"
            elif kind == "layer" and gain > LARGEST_GAIN:
                found[name] = f"makes what goes through it about {gain:.2g} times as large"
    return dict(sorted(found.items()))


def _size(tensor: Tensor) -> float:
    """Root mean square; not finite where a value is not."""
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
    if not math.isfinite(norm) and finite(tensor):  # too large for float32
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    return norm / float(tensor.numel() ** 0.5)
