"""Files as memory: what is read of them is in memory while it is needed, and no longer where that is said."""

import mmap
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_STARTS: WeakKeyDictionary[mmap.mmap, int] = WeakKeyDictionary()
"""The address of each file that is mapped."""


def mapped(path: Path) -> mmap.mmap:
    """The file's bytes, copied where they are written to; OSError and ValueError (for an empty one) as `mmap`."""
    with open(path, "rb") as file:
        space = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _STARTS[space] = torch.frombuffer(space, dtype=torch.uint8, count=1).data_ptr()
    return space


def let_go(tensors: Iterable[Tensor]) -> None:
    """Take those tensors that lie in mapped files out of memory; they are read again when they are used.

    What was written to them is lost. Other tensors stay as they are.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # on Windows the system does so alone
        return
    spaces = list(_STARTS.items())
    for tensor in tensors:
        first = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        for space, start in spaces:
            if start <= first < start + len(space):
                low = -(-(first - start) // mmap.PAGESIZE) * mmap.PAGESIZE
                high = (first - start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if high > low:
                    space.madvise(mmap.MADV_DONTNEED, low, high - low)
