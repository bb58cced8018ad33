"""One run on several processes, as torchrun starts them; a single process is a world of one and calls nothing."""

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from latentkit.errors import InputError


class World(NamedTuple):
    """This process's place among the processes of the run."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True for the one process that writes."""
        return self.rank == 0


def pick_device(name: str = "auto") -> torch.device:
    """The device of this process: `auto` is this process's own CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try 'auto'.") from error


def join(device: torch.device) -> World:
    """Enter the process group that torchrun's variables describe; a world of one without them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return world()


def world() -> World:
    """The world of this process."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, in place, in one flat float32 exchange."""
    if world().size == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view(tensor.shape))


def broadcast_(tensors: list[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world().size > 1:
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            tensor.detach().copy_(value)


def largest(value: int) -> int:
    """The largest of one integer a process."""
    values: list[int] = gather(value)
    return max(values)


def gather(value: Any) -> list[Any]:
    """One plain value a process, in rank order, on every process."""
    size = world().size
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values
