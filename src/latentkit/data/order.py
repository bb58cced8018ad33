"""Which picture comes when: a pure function of (seed, draw), so that resuming replays nothing."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from latentkit.diffusion.noise import keyed_bits
from latentkit.errors import InputError


@lru_cache(maxsize=8)
def permutation(length: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [length]: the stable argsort of the high bits of a counter keyed by the rest."""
    # The low bits of each word are replaced by its index: the words are distinct, and sorting them carries the index.
    low = np.uint64((1 << max(1, length.bit_length())) - 1)
    words = (keyed_bits(length, seed, "order", stream, epoch) & ~low) | np.arange(length, dtype=np.uint64)
    words.sort()
    return (words & low).astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The endless order of `length` pictures in steps of `batch`, each epoch shuffled by `seed`.

    Step s holds draws s * batch to (s + 1) * batch. For every picture and every epoch there is exactly one draw.
    Without `buckets` epochs follow each other, and a step may hold the end of one and the start of the next. With
    `buckets` (one bucket number per picture) every step is of one bucket: each bucket runs through its own epochs, and
    comes as often as its share of the pictures, in shuffled turns; what does not fill a batch waits for the next turn.
    """

    length: int
    batch: int
    seed: int
    buckets: tuple[int, ...] | None = None
    _members: tuple[np.ndarray, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch < 1 or self.seed < 0:
            got = f"length {self.length}, batch {self.batch}, seed {self.seed}"
            raise InputError(f"an order needs at least one picture, a batch of at least 1 and a seed >= 0, got {got}")
        of = np.zeros(self.length, np.int64) if self.buckets is None else np.asarray(self.buckets, np.int64)
        if of.shape != (self.length,):
            raise InputError(f"{of.size} bucket numbers were given for {self.length} pictures")
        members = tuple(np.flatnonzero(of == bucket) for bucket in np.unique(of))
        object.__setattr__(self, "_members", members)

    def draws(self, step: int) -> np.ndarray:
        """The draw numbers of a step, int64 [batch]."""
        return np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)

    def epoch(self, draw: int) -> int:
        """How often the picture of this draw was drawn before."""
        bucket, position = self._position(draw)
        return position // len(self._members[bucket])

    def item(self, draw: int) -> int:
        """The index of the picture of a draw."""
        bucket, position = self._position(draw)
        members = self._members[bucket]
        epoch, place = divmod(position, len(members))
        return int(members[permutation(len(members), self.seed, bucket, epoch)[place]])

    def _position(self, draw: int) -> tuple[int, int]:
        """Bucket of a draw, and its position in that bucket's endless order."""
        if len(self._members) == 1:
            return 0, int(draw)
        step, place = divmod(int(draw), self.batch)
        turn = self._turn(step)
        first = self._steps_before(turn)
        bucket, batches = _turns(tuple(len(m) for m in self._members), self.batch, self.seed, turn)[step - first]
        return bucket, batches * self.batch + place

    def _steps_before(self, turn: int) -> int:
        """Steps before turn `turn`, in which every bucket has had `turn` epochs less an unfilled batch."""
        return sum(turn * len(members) // self.batch for members in self._members)

    def _turn(self, step: int) -> int:
        """The turn that holds a step, by bisection: the last one with no more steps before it."""
        low = step * self.batch // self.length
        high = (step + len(self._members) + 1) * self.batch // self.length + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._steps_before(middle) <= step:
                low = middle
            else:
                high = middle
        return low


@lru_cache(maxsize=8)
def _turns(sizes: tuple[int, ...], batch: int, seed: int, turn: int) -> list[tuple[int, int]]:
    """(bucket, number of its batch) for every step of one turn: buckets shuffled, the batches of each in order."""
    batches = [range(turn * size // batch, (turn + 1) * size // batch) for size in sizes]
    steps = [bucket for bucket, numbers in enumerate(batches) for _ in numbers]
    shuffled = [steps[i] for i in permutation(len(steps), seed, -1, turn)] if steps else []
    following = [iter(numbers) for numbers in batches]
    return [(bucket, next(following[bucket])) for bucket in shuffled]
