"""LoRA: changes of a network's weights that are kept apart from them, and put on at any strength."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentkit.errors import InputError


@dataclass(frozen=True)
class Change:
    """A low-rank change of one weight: scale up down, with scale = alpha / rank.

    `down` is `r i` or `r i kh kw`, `up` is `o r` or `o r 1 1` (Hu et al. 2022); without `down`, `up` is the whole
    product, of rank 1. `middle` `r r kh kw` stands between them in a convolution (LoCon). A second pair makes it the
    elementwise product of two such changes (LoHa), one at the left their Kronecker product (LoKr; Yeh et al. 2024),
    each with a middle or none. `magnitude` holds the norms that the changed weight gets for each output (`o`, `o 1`
    ...) or each input (`1 i` ...) (DoRA, Liu et al. 2024).
    """

    down: Tensor | None
    up: Tensor
    alpha: float | None = None
    """None: the rank."""
    middle: Tensor | None = None
    second: "Change | None" = None
    left: "Change | None" = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the (first) product."""
        return 1 if self.down is None else self.up.shape[1]

    @property
    def scale(self) -> float:
        """What its product is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def zero(self) -> bool:
        """Whether one of its factors is all zero: then so is its product."""
        factors = [part for part in (self.down, self.up, self.middle) if part is not None]
        inner = [part for part in (self.second, self.left) if part is not None]
        return not all(part.any() for part in factors) or any(part.zero for part in inner)

    def shapes(self) -> "Change":
        """The same without values, to be tried on a weight that has none either."""
        bare: dict[str, Any] = {}
        for field in fields(self):
            part = getattr(self, field.name)
            if isinstance(part, Tensor | Change):
                bare[field.name] = part.to("meta") if isinstance(part, Tensor) else part.shapes()
        return replace(self, **bare)

    def product(self) -> Tensor:
        """up down, without the scale, float32: `o i` or `o i kh kw`."""
        if self.down is None:
            whole = self.up.float()
        else:
            whole = self._low_rank(self.down.float(), self.up.float().flatten(1))
        if self.left is not None:
            left = self.left.product()
            whole = torch.kron(left.reshape(*left.shape, *(1,) * (whole.ndim - left.ndim)), whole.contiguous())
        return whole if self.second is None else whole * self.second.product()

    def _low_rank(self, down: Tensor, up: Tensor) -> Tensor:
        if self.middle is not None:
            middle = torch.einsum("or,rskl->oskl", up, self.middle.float())
            return torch.einsum("oskl,si->oikl", middle, down.flatten(1))
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """The weight with `strength` of the change, float32; InputError where their shapes do not fit."""
        change = (self.product() * self.scale).to(weight.device)
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            raise InputError(f"a LoRA changes a weight of shape {tuple(change.shape)}; it is {tuple(weight.shape)}")
        weight = weight.float()
        changed = weight + change.reshape(weight.shape)
        if self.magnitude is None:
            return torch.lerp(weight, changed, strength)
        return torch.lerp(weight, self._rescaled(changed), strength)

    def _rescaled(self, weight: Tensor) -> Tensor:
        assert self.magnitude is not None
        magnitude, rows = self.magnitude.to(weight.device).float().flatten(), weight.flatten(1)
        if self.magnitude.shape[:1] == magnitude.shape == (len(rows),):
            return weight * (magnitude / rows.norm(dim=1)).reshape(-1, *(1,) * (weight.ndim - 1))
        columns = weight.transpose(0, 1).flatten(1)
        if len(magnitude) != len(columns):
            raise InputError(f"a DoRA has {len(magnitude)} magnitudes for a weight of shape {tuple(weight.shape)}")
        return weight * (magnitude / columns.norm(dim=1)).reshape(1, -1, *(1,) * (weight.ndim - 2))


Changes = Mapping[str, Change]
"""The changes of a LoRA by the name of the weight, as in the network's `state_dict()`."""


class Adapted:
    """LoRAs put on a network: it computes with changed copies of its weights, which themselves stay as they are.

    Several changes of one weight are put on one after another, and rounded once. Errors: InputError for a weight that
    the network does not have, or of another shape.
    """

    def __init__(self, network: nn.Module, adapters: Iterable[tuple[Changes, float]]) -> None:
        parameters = dict(network.named_parameters())
        wanted: dict[str, list[tuple[Change, float]]] = {}
        for changes, strength in adapters:
            for name, change in changes.items():
                if name not in parameters:
                    raise InputError(f"a LoRA changes {name}, which this model does not have")
                wanted.setdefault(name, []).append((change, strength))
        changed: dict[str, Tensor] = {}
        for name, steps in wanted.items():
            weight = parameters[name].data
            layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            for change, strength in steps:
                weight = change.applied(weight, strength)
            like = parameters[name]
            changed[name] = weight.to(like.device, like.dtype)
            if like.ndim == 4 and like.is_contiguous(memory_format=layout):
                changed[name] = changed[name].contiguous(memory_format=layout)
        self._own = {name: parameters[name].data for name in changed}
        self._changed = changed
        self._parameters = parameters
        self.put_on()

    def put_on(self) -> None:
        """Let the network compute with the changed weights, as it does from the start."""
        for name, weight in self._changed.items():
            self._parameters[name].data = weight

    def remove(self) -> None:
        """Give the network its own weights back, the same tensors as before."""
        for name, weight in self._own.items():
            self._parameters[name].data = weight

    def __enter__(self) -> None:
        self.put_on()

    def __exit__(self, *error: object) -> None:
        self.remove()
