"""Randomness as a pure function of integers: a counter (Philox 4x64-10) and one stream per picture."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _key(*key: int | str) -> np.random.Philox:
    """A Philox counter keyed by the digest of `key`; equal keys give equal bits on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], np.uint64), counter=0)


def keyed_bits(n: int, *key: int | str) -> np.ndarray:
    """The first `n` 64-bit words of the counter keyed by `key`."""
    return np.atleast_1d(_key(*key).random_raw(n))


def keyed_uniform(shape: Sequence[int], *key: int | str) -> Tensor:
    """Uniform float32 in [0, 1) of `shape`, a pure function of `key` (top 24 bits of each word)."""
    bits = keyed_bits(int(np.prod(shape)), *key) >> np.uint64(40)
    return torch.from_numpy((bits.astype(np.float32) * np.float32(2**-24)).reshape(tuple(shape)))


def keyed_normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal float32 of `shape`, a pure function of `key` (Box-Muller in float64 on 32-bit halves)."""
    count = int(np.prod(shape))
    halves = keyed_bits((count + 1) // 2, *key).view(np.uint32).astype(np.float64)
    first, second = halves[0::2], halves[1::2]
    radius = np.sqrt(-2.0 * np.log((first + 1.0) * 2.0**-32))
    angle = second * (2.0 * np.pi * 2.0**-32)
    normal = np.empty(len(halves), np.float32)
    np.multiply(radius, np.cos(angle), out=normal[0::2], casting="same_kind")
    np.multiply(radius, np.sin(angle), out=normal[1::2], casting="same_kind")
    return torch.from_numpy(normal[:count].reshape(tuple(shape)))


def keyed_batch(draws: Sequence[int] | Tensor, shape: Sequence[int], seed: int, purpose: str) -> Tensor:
    """Standard normal `b *shape`, row i a pure function of (seed, purpose, draws[i]) whatever the batch."""
    return torch.stack([keyed_normal(shape, seed, purpose, int(draw)) for draw in draws])


OCTAVES = 8
"""The Brownian path is drawn at sigmas from 2^8 down to 2^-8; above them it stands at 0."""
PER_OCTAVE = 1 << 10
"""Levels of the path in each octave: a sigma is taken to the nearest, 0.04 % of itself away at most."""
LEVELS = 2 * OCTAVES * PER_OCTAVE


def _level(sigma: float) -> int:
    """The level of the path nearest to `sigma`."""
    octave = math.log2(sigma) if sigma > 0 else -math.inf
    return round((OCTAVES - min(OCTAVES, max(-OCTAVES, octave))) * PER_OCTAVE)


def _clock(level: int) -> float:
    """1 / sigma^2 at a level; 0 at the first."""
    return 4.0 ** (level / PER_OCTAVE - OCTAVES) if level else 0.0


class PictureNoise:
    """The noise of a batch of pictures: picture i's stream depends on its own seed alone.

    `shape` is `c h w` of one picture's latent. The initial noise is torch's CPU generator in float32, as diffusers
    with a CPU generator, A1111 with the CPU source, and ComfyUI for a batch of one draw it; the noise of later steps
    is a counter keyed by (seed, step, purpose).
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.shape = tuple(shape)
        self._known: dict[int, Tensor] = {}

    def initial(self) -> Tensor:
        """Standard normal `b c h w`, float32 on the CPU."""
        drawn = [torch.randn((1, *self.shape), generator=torch.Generator("cpu").manual_seed(s)) for s in self.seeds]
        return torch.cat(drawn)

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """Standard normal `b c h w` for one sampler step, float32 on the CPU."""
        return torch.stack([keyed_normal(self.shape, seed, purpose, step) for seed in self.seeds])

    def between(self, sigma: float, after: float) -> Tensor:
        """The increment of each picture's own Brownian path from `sigma` to `after`, over its deviation.

        Standard normal `b c h w`, float32 on the CPU, as `samplers.driver.Noise` says. The path is a tree of Brownian
        bridges (Levy's construction) over levels of sigma, each node keyed by (seed, level), so that it is the same
        whatever is asked for first. An interval inside one level has noise of its own. Deviation and independence are
        exact; what adjacent intervals add up to is exact at levels (powers of 2 are some), and near it elsewhere.
        """
        first, last = _level(sigma), _level(after)
        if first == last:
            key = ("between", float(sigma).hex(), float(after).hex())
            return torch.stack([keyed_normal(self.shape, seed, *key) for seed in self.seeds])
        return (self._path(last) - self._path(first)) / math.sqrt(_clock(last) - _clock(first))

    def _path(self, level: int) -> Tensor:
        """W at a level `b c h w`; the latest ones are kept, as an interval begins where others did or ended."""
        if level not in self._known:
            self._known = {**dict(list(self._known.items())[-2:]), level: self._bridges(level)}
        return self._known[level]

    def _bridges(self, level: int) -> Tensor:
        """W at a level `b c h w`, by halving the way to it."""
        low, high = 0, LEVELS
        left = torch.zeros(len(self.seeds), *self.shape)
        right = self.step(LEVELS, "path") * math.sqrt(_clock(LEVELS))
        while level not in (low, high):
            middle = (low + high) // 2
            before, behind = _clock(middle) - _clock(low), _clock(high) - _clock(middle)
            deviation = math.sqrt(before * behind / (before + behind))
            bridge = torch.lerp(left, right, before / (before + behind)).add_(
                self.step(middle, "path"), alpha=deviation
            )
            if level < middle:
                high, right = middle, bridge
            else:
                low, left = middle, bridge
        return left if level == low else right
