"""Randomness as a pure function of integers: a counter (Philox 4x64-10) and one stream per picture."""

import hashlib
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
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
    return torch.from_numpy(normal.astype(np.float32).reshape(tuple(shape)))


def keyed_batch(draws: Sequence[int] | Tensor, shape: Sequence[int], seed: int, purpose: str) -> Tensor:
    """Standard normal `b *shape`, row i a pure function of (seed, purpose, draws[i]) whatever the batch."""
    return torch.stack([keyed_normal(shape, seed, purpose, int(draw)) for draw in draws])


class PictureNoise:
    """The noise of a batch of pictures: picture i's stream depends on its own seed alone.

    `shape` is `c h w` of one picture's latent. The initial noise is torch's CPU generator in float32, as diffusers
    with a CPU generator, A1111 with the CPU source, and ComfyUI for a batch of one draw it; the noise of later steps
    is a counter keyed by (seed, step, purpose).
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.shape = tuple(shape)

    def initial(self) -> Tensor:
        """Standard normal `b c h w`, float32 on the CPU."""
        drawn = [torch.randn((1, *self.shape), generator=torch.Generator("cpu").manual_seed(s)) for s in self.seeds]
        return torch.cat(drawn)

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """Standard normal `b c h w` for one sampler step, float32 on the CPU."""
        return torch.stack([keyed_normal(self.shape, seed, purpose, step) for seed in self.seeds])
