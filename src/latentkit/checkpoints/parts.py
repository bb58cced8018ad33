"""The parts of models: each lies where it computes while it is its turn, and out of the way while it is not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from latentkit.checkpoints.files import Place, bring, compute_type
from latentkit.checkpoints.storage.mapping import let_go


class Parts:
    """Groups of modules by name, each module with its model's `Model.place`.

    Modules with a place rest as they lie in their file and come to that place for their turn. Those without stay where
    they are; but with `low` those on another device than the CPU rest on the CPU inside of this context. Groups that
    are `wide` compute in float32.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[tuple[nn.Module, Place | None]]],
        low: bool = False,
        wide: Iterable[str] = (),
    ) -> None:
        self.groups = groups
        self.low = low
        self.wide = set(wide)
        self._lent: dict[nn.Parameter, Place] = {}
        self._resting: dict[nn.Parameter, tuple[Tensor, Place | None]] = {}

    def __enter__(self) -> "Parts":
        for name in self.groups if self.low else ():
            for parameter, place in self._parameters(name):
                if place is None and parameter.device.type != "cpu":
                    self._lent[parameter] = Place(parameter.device, parameter.dtype)
                    bring(parameter, Place(torch.device("cpu"), parameter.dtype))
        return self

    def __exit__(self, *error: object) -> None:
        self.turn()
        for parameter, place in self._lent.items():
            bring(parameter, place)
        self._lent.clear()

    def turn(self, *names: str) -> None:
        """Bring the groups called `names` to where they compute, and let all others rest."""
        wanted = {
            parameter: (place, name in self.wide) for name in names for parameter, place in self._parameters(name)
        }
        for parameter in self._resting.keys() - wanted.keys():
            parameter.data, place = self._resting.pop(parameter)
            if place:
                let_go([parameter.data])
        with torch.inference_mode(False), torch.no_grad():
            for parameter, (place, wide) in wanted.items():
                if parameter in self._resting or not (place or wide) or parameter.is_meta:
                    continue
                self._resting[parameter] = parameter.data, place
                device = place.device if place else parameter.device
                bring(parameter, Place(device, torch.float32 if wide else place and place.dtype))

    def widen(self, name: str) -> bool:
        """Have a group compute in float32 from its next turn on; False where it does so already."""
        types = {
            parameter.dtype if place is None else place.dtype or compute_type(parameter.dtype, place.device)
            for parameter, place in self._parameters(name)
        }
        if name in self.wide or all(dtype.itemsize > 2 for dtype in types):
            return False
        self.turn()
        self.wide.add(name)
        return True

    def _parameters(self, name: str) -> Iterator[tuple[nn.Parameter, Place | None]]:
        """Each with its place."""
        for module, place in self.groups[name]:
            yield from ((parameter, place or self._lent.get(parameter)) for parameter in module.parameters())
