"""Encoders of conditions: values of a batch, a network, and the slots that its answer fills."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from latentkit.model.conditioning import Conditioning


@runtime_checkable
class Conditioner(Protocol):
    """What every conditioner is: called with one value per picture it gives their rows."""

    def from_batch(self, batch: dict[str, Any]) -> Sequence[Any]:
        """Its values in a training batch."""
        ...

    def absent(self, count: int) -> Sequence[Any]:
        """The values that stand for "no condition", for condition dropout and for guidance."""
        ...

    def __call__(self, values: Sequence[Any]) -> Conditioning:
        """Rows for the values."""
        ...

    def state(self) -> dict[str, Any]:
        """What rebuilds it besides its config and weights."""
        ...
