"""Tensors from another program's names to ours and back, by a list of pairs; what does not fit is named.

A list is made from a network (`ldm_names.py`, `diffusers_names.py`, `tower_names.py`) and serves both directions.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from latentkit.checkpoints.storage.mapping import let_go
from latentkit.errors import InputError

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 5
"""Names that an error shows of each kind."""
FEW = 3
"""Names of a block up to which each is written out."""


class Pair(NamedTuple):
    """A tensor of theirs, and those of ours that it holds one after another along its first axis."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """Theirs is a matrix that multiplies from the other side."""
    groups: int = 1
    """Their first axis is in so many groups, each of which holds a share of every one of ours (one head's q, k, v)."""
    axes: int = 0
    """Axes of length 1 that theirs has behind ours (a 1x1 convolution for a linear layer)."""


@dataclass
class Complaints:
    """Names of tensors that do not fit, by what is wrong with them."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    shape: list[str] = field(default_factory=list)
    type: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    WORDS = {  # noqa: RUF012
        "missing": "missing",
        "unknown": "not known to this architecture",
        "shape": "of another shape",
        "type": "not of floating type",
        "not_finite": "not finite",
    }

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in self.WORDS)

    def extend(self, other: "Complaints") -> None:
        """Add the other's names."""
        for kind in self.WORDS:
            getattr(self, kind).extend(getattr(other, kind))

    def lines(self, most: int | None = SHOWN) -> list[str]:
        """One line for each kind of trouble with at most `most` names."""
        return [
            f"{listed(names, most)} {words}" for kind, words in self.WORDS.items() if (names := getattr(self, kind))
        ]

    def refuse(self, what: str) -> None:
        """InputError with the names, if there are any."""
        if self:
            raise InputError(f"{what} does not hold the model that it seems to be: " + "; ".join(self.lines()))


def listed(names: Iterable[str], most: int | None = SHOWN) -> str:
    """Some names and the number of the rest, with the verb that follows them."""
    ordered = sorted(names)
    shown = ordered if most is None else ordered[:most]
    rest = f" and {len(ordered) - len(shown)} more" if len(ordered) > len(shown) else ""
    return ", ".join(shown) + rest + (" is" if len(ordered) == 1 else " are")


def blocks(names: Iterable[str], there: Iterable[str]) -> list[str]:
    """The names in order, those of one block as `block.* (12)` where all that is `there` of it is among them."""
    wanted = set(names)
    rest = [name for name in there if name not in wanted]
    found, left = [], sorted(wanted)
    while left:
        block, inside = left[0], 1
        for end in (match.end() for match in re.finditer(r"\.", left[0])):
            start = left[0][:end]
            inside = sum(name.startswith(start) for name in left)
            if inside > FEW and not any(name.startswith(start) for name in rest):
                block = f"{start}* ({inside})"
                break
            inside = 1
        found.append(block)
        left = left[1:] if inside == 1 else [name for name in left if not name.startswith(start)]
    return found


def prefixed(pairs: Iterable[Pair], theirs: str, ours: str = "") -> list[Pair]:
    """The pairs with a prefix before each side's names."""
    return [p._replace(theirs=theirs + p.theirs, ours=tuple(ours + name for name in p.ours)) for p in pairs]


def finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN, in one pass without a copy: NaN is the least and the most of any."""
    if tensor.device.type == "meta" or not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def taken(
    pairs: Iterable[Pair], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, keep: bool = False
) -> tuple[dict[str, Tensor], Complaints]:
    """Our state of their tensors, views where that can be, and what does not fit `expected` (of which shapes count).

    `expected` holds all that is ours; tensors that no pair names are not looked at. What was looked at leaves memory
    unless `keep`, for a model that computes at once.
    """
    state: dict[str, Tensor] = {}
    complaints = Complaints()
    for pair in pairs:
        if pair.theirs not in tensors:
            complaints.missing.append(pair.theirs)
            continue
        tensor = tensors[pair.theirs]
        parts = list(_parts(pair, tensor, expected[pair.ours[0]].ndim))
        if tensor.dtype not in FLOATING:
            complaints.type.append(pair.theirs)
        elif [part.shape for part in parts] != [expected[name].shape for name in pair.ours]:
            wanted = expected[pair.ours[0]].shape
            whole = (wanted[0] * len(pair.ours), *wanted[1:]) if len(wanted) else ()
            complaints.shape.append(f"{pair.theirs} ({_size(tensor.shape)}, wanted {_size(whole)})")
        elif not finite(tensor):
            complaints.not_finite.append(pair.theirs)
        if not keep:
            let_go([tensor])
        state |= zip(pair.ours, parts)
    unfed = expected.keys() - {name for pair in pairs for name in pair.ours}
    assert not unfed, f"no pair feeds {sorted(unfed)[:3]}"
    return state, complaints


def _size(shape: Iterable[int]) -> str:
    return "x".join(str(n) for n in shape) or "a number"


def _parts(pair: Pair, tensor: Tensor, ndim: int) -> Iterator[Tensor]:
    """Our tensors inside theirs; shapes may be wrong yet."""
    while tensor.ndim > ndim and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    if pair.transposed and tensor.ndim == 2:
        tensor = tensor.T
    count = len(pair.ours)
    if count == 1 or tensor.ndim == 0 or tensor.shape[0] % (count * pair.groups):
        yield from (tensor,) * count
    elif pair.groups == 1:
        yield from tensor.chunk(count)
    else:
        grouped = tensor.reshape(pair.groups, count, -1, *tensor.shape[1:])
        yield from (grouped[:, index].flatten(0, 1) for index in range(count))


def given(pairs: Iterable[Pair], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors of our state, contiguous; the exact inverse of `taken`."""
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        parts = [state[name] for name in pair.ours]
        tensor = parts[0]
        if len(parts) > 1:
            shares = [part.reshape(pair.groups, -1, *part.shape[1:]) for part in parts]
            tensor = torch.stack(shares, 1).flatten(0, 2)
        if pair.transposed:
            tensor = tensor.T
        tensors[pair.theirs] = tensor[(...,) + (None,) * pair.axes].contiguous()
    return tensors


def paired(names: Iterable[tuple[str, str | Pair]], keys: Iterable[str]) -> list[Pair]:
    """Pairs of tensors from pairs of layers (ours, theirs), for those whose parameters are among `keys`.

    Theirs is a `Pair` of layers where more differs than the name.
    """
    parameters: dict[str, list[str]] = {}
    for key in keys:
        layer, _, kind = key.rpartition(".")
        parameters.setdefault(layer, []).append(kind)
    pairs = []
    for ours, theirs in names:
        pair = theirs if isinstance(theirs, Pair) else Pair(theirs, (ours,))
        for kind in parameters.get(ours, ()):
            pairs.append(
                pair._replace(
                    theirs=f"{pair.theirs}.{kind}",
                    ours=tuple(f"{layer}.{kind}" for layer in pair.ours),
                    axes=pair.axes if kind == "weight" else 0,
                )
            )
    return pairs
