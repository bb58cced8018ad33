"""Batches of one process, from any step on, the same for any number of workers."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from latentkit.data.captions import caption_of
from latentkit.data.order import Order
from latentkit.data.source import Source
from latentkit.errors import InputError

# "step": int, "index" and "draw": int64 [b], "pixels" (b c h w) or "moments" (b 2c h w), "caption": list[str],
# "label": int64 [b] with -1 for none.
Batch: TypeAlias = dict[str, Any]

AHEAD = 2  # steps that are made while one is used


class Samples(Protocol):
    """What a loader draws from: pictures, or cached latents."""

    field: str
    source: Source

    def take(self, index: int, draw: int) -> tuple[int, Tensor]:
        """The index of the picture that is used, and its tensor at this draw."""


class Loader:
    """The micro-batches of process `rank` of `world`: positions rank, rank + world, ... of every step of `order`.

    `workers` threads make samples ahead (0: none are made ahead); decoding, scaling and copying run outside the
    interpreter lock, and neither workers nor world change what a draw is. `keywords` is the share of draws that
    `caption_of` says in other words.
    """

    def __init__(
        self,
        data: Samples,
        order: Order,
        micro_batch: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        keywords: float = 0.0,
    ) -> None:
        if order.batch % world:
            raise InputError(f"a batch of {order.batch} cannot be shared by {world} processes: use a multiple")
        share = order.batch // world
        self.micro_batch = min(micro_batch or share, share)
        if share % self.micro_batch:
            got = f"{share} pictures a process cannot be cut in micro-batches of {self.micro_batch}"
            raise InputError(f"{got}; equal parts are needed")
        if order.length != len(data.source):
            raise InputError(f"the order is of {order.length} pictures and the data of {len(data.source)}")
        self.data = data
        self.order = order
        self.rank = rank
        self.world = world
        self.workers = workers
        self.keywords = keywords

    def batches(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """For every step from `start_step` on, without end, its list of micro-batches."""
        step = start_step
        if self.workers == 0:
            while True:
                yield self._assemble(step, [self.data.take(*pair) for pair in self._pairs(step)])
                step += 1
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        waiting: deque[list[Future[tuple[int, Tensor]]]] = deque()
        try:
            while True:
                while len(waiting) <= AHEAD:
                    ahead = step + len(waiting)
                    waiting.append([pool.submit(self.data.take, *pair) for pair in self._pairs(ahead)])
                yield self._assemble(step, [future.result() for future in waiting.popleft()])
                step += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _pairs(self, step: int) -> list[tuple[int, int]]:
        """(index, draw) of this process's samples of a step."""
        draws = self.order.draws(step)[self.rank :: self.world].tolist()
        return [(self.order.item(draw), draw) for draw in draws]

    def _assemble(self, step: int, samples: list[tuple[int, Tensor]]) -> list[Batch]:
        draws = self.order.draws(step)[self.rank :: self.world].tolist()
        starts = range(0, len(samples), self.micro_batch)
        parts = [(draws[at : at + self.micro_batch], samples[at : at + self.micro_batch]) for at in starts]
        return [collate(self.data, step, *part, keywords=self.keywords, seed=self.order.seed) for part in parts]


def collate(
    data: Samples,
    step: int,
    draws: Sequence[int],
    samples: Sequence[tuple[int, Tensor]],
    *,
    keywords: float = 0.0,
    seed: int = 0,
) -> Batch:
    """One batch of samples (index, tensor) of one shape, with the words of their draws."""
    items = [data.source.items[index] for index, _ in samples]
    classes = {name: number for number, name in enumerate(data.source.classes)}
    return {
        "step": step,
        "index": torch.tensor([index for index, _ in samples]),
        "draw": torch.tensor(draws),
        data.field: torch.stack([x for _, x in samples]),
        "caption": [caption_of(item, keywords, seed, draw) for item, draw in zip(items, draws, strict=True)],
        "label": torch.tensor([-1 if item.label is None else classes[item.label] for item in items]),
    }
