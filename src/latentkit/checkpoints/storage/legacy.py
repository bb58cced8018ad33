"""What `torch.save` wrote before torch 1.6: five pickles in a row, and behind them the data of all tensors."""

import struct
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from latentkit.checkpoints.storage.mapping import mapped
from latentkit.checkpoints.storage.pickles import MOST_PROGRAM, Machine, Storage, undamaged
from latentkit.errors import InputError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles (torch `serialization.py`)."""


def read_legacy(path: Path) -> Any:
    """The content of such a file, tensors mapped copy-on-write where they lie evenly; InputError for anything else.

    The pickles are magic number, protocol, machine, content, and the names of the data in their order. As the data's
    places are known only behind the content, that is read twice, first without data.
    """
    try:
        space = mapped(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    program = bytes(space[:MOST_PROGRAM])
    asked: dict[str, Storage] = {}

    def none(_: Storage) -> NoReturn:
        raise InputError(f"{path}: has a tensor where none may be")

    def noted(storage: Storage) -> Tensor:
        if not 0 <= storage.length * storage.type.itemsize <= len(space) or asked.get(storage.key, storage) != storage:
            raise InputError(f"{path}: the data {storage.key!r} of a tensor is missing, too short or of two types")
        asked[storage.key] = storage
        return torch.empty(storage.length, dtype=storage.type, device="meta")

    with undamaged(path):
        place, head = 0, []
        for _ in range(3):
            machine = Machine(str(path), program, none, place)
            head.append(machine.run())
            place = machine.place
            if head[0] != MAGIC:
                raise InputError(f"{path}: is a pickle that torch.save did not write; only checkpoints are read")
        if head[1] != PROTOCOL or not isinstance(head[2], dict) or head[2].get("little_endian") is not True:
            raise InputError(
                f"{path}: was written by another version of torch, or on a machine of the other byte order"
            )
        first = Machine(str(path), program, noted, place)
        first.run()
        behind = Machine(str(path), program, none, first.place)
        found = _found(path, space, behind.run(), asked, behind.place)
        return Machine(str(path), program, lambda storage: found[storage.key], place).run()


def _found(path: Path, space: Any, names: Any, asked: dict[str, Storage], place: int) -> dict[str, Tensor]:
    """Every tensor's data, each behind its length; those that begin at no multiple of their type's size are copied."""
    found: dict[str, Tensor] = {}
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or len(set(names)) != len(names) or not asked.keys() <= set(names):
        raise InputError(f"{path}: its list of data has not all that its tensors ask for, or one twice")
    for name in names:
        if name not in asked:
            raise InputError(f"{path}: its list of data has {str(name)[:80]!r}, which no tensor asks for")
        storage, start = asked[name], place + 8
        size = storage.length * storage.type.itemsize
        if start + size > len(space) or struct.unpack("<q", space[place:start])[0] != storage.length:
            raise InputError(f"{path}: the data {name!r} of a tensor is missing, too short or of another length")
        place = start + size
        if not size:
            found[name] = torch.empty(0, dtype=storage.type)
        elif start % storage.type.itemsize:
            whole = torch.frombuffer(space, dtype=torch.uint8, count=size, offset=start)
            found[name] = whole.clone().view(storage.type)
        else:
            found[name] = torch.frombuffer(space, dtype=storage.type, count=storage.length, offset=start)
    return found
