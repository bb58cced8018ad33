"""Noise: golden values, a batch equals its singles, and the moments of what it claims to be."""

import itertools
import math

import numpy as np
import pytest
import torch

from latentkit.diffusion.noise import PictureNoise, keyed_batch, keyed_bits, keyed_normal, keyed_uniform


def philox(words: int, key: tuple[int, int]) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011), its counter starting at 1 as numpy's does."""
    multipliers, weyl, mask = (
        (0xD2E7470EE14C6C93, 0xCA5A826395121157),
        (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
        2**64 - 1,
    )
    found: list[int] = []
    for block in range(1, -(-words // 4) + 1):
        a, b, c, d = block, 0, 0, 0
        first, second = key
        for _ in range(10):
            low, high = a * multipliers[0], c * multipliers[1]
            a, b, c, d = (high >> 64) ^ b ^ first, high & mask, (low >> 64) ^ d ^ second, low & mask
            first, second = (first + weyl[0]) & mask, (second + weyl[1]) & mask
        found += [a, b, c, d]
    return found[:words]


def test_bits_are_golden() -> None:
    expected = [0x46A02441372CDA5, 0x640CD618B78A46B5, 0x10368549242B32E0, 0xF3BA7880F914780A]
    assert keyed_bits(4, 7, "noise", 123).tolist() == expected
    assert keyed_bits(2, 2**64 - 1, "step", 0).tolist() == [0x52CDF815C5A25F5C, 0x55098445F9E30817]


def test_bits_are_those_of_the_published_counter() -> None:
    import hashlib

    digest = hashlib.sha256(b"7/noise/123").digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    assert keyed_bits(11, 7, "noise", 123).tolist() == philox(11, key)


def test_normals_and_uniforms_are_golden() -> None:
    normal = torch.tensor([2.2571117878, 0.2454927266, -0.6312386394, 0.5167454481, 1.8237969875])
    torch.testing.assert_close(keyed_normal((5,), 7, "noise", 123), normal, atol=1e-6, rtol=1e-6)
    uniform = torch.tensor([0.01724255085, 0.39082086086, 0.06333190203])
    assert torch.equal(keyed_uniform((3,), 7, "noise", 123), uniform)


def test_the_initial_noise_is_that_of_torchs_generator_on_the_cpu() -> None:
    golden = torch.tensor([[1.5409960747, -0.2934288979, -2.1787893772, 0.5684312582],
                           [0.3366903663, 0.1288094074, 0.2344623655, 0.2303330302],
                           [-0.4867807627, -0.6038215756, -0.5580962300, 0.6675242782]])  # fmt: skip
    noise = PictureNoise([0, 42, 2**63 + 5], (2, 2, 1))
    torch.testing.assert_close(noise.initial().reshape(3, 4), golden, atol=1e-6, rtol=1e-6)
    alone = torch.randn((1, 2, 2, 1), generator=torch.Generator("cpu").manual_seed(42))
    assert torch.equal(noise.initial()[1:2], alone)


def test_step_noise_is_golden() -> None:
    golden = torch.tensor([-1.3684344292, -2.5481393337, 2.1731071472, -0.5211637616])
    first = PictureNoise([0, 42], (2, 2, 1)).step(3)[0].flatten()
    torch.testing.assert_close(first, golden, atol=1e-6, rtol=1e-6)


def test_a_batch_equals_its_singles() -> None:
    seeds, shape = [3, 1, 4, 1, 2**64 - 1], (4, 5, 3)
    batch = PictureNoise(seeds, shape)
    singles = [PictureNoise([seed], shape) for seed in seeds]
    assert torch.equal(batch.initial(), torch.cat([single.initial() for single in singles]))
    for step in (0, 7):
        assert torch.equal(batch.step(step, "churn"), torch.cat([single.step(step, "churn") for single in singles]))
    for interval in ((9.0, 2.5), (2.5, 2.4999)):
        assert torch.equal(batch.between(*interval), torch.cat([single.between(*interval) for single in singles]))
    draws = torch.tensor([5, 0, 9_000_000_000])
    together = keyed_batch(draws, shape, 1, "noise")
    assert torch.equal(together, torch.cat([keyed_batch([int(draw)], shape, 1, "noise") for draw in draws]))


def test_a_shorter_draw_is_the_start_of_a_longer_one() -> None:
    assert torch.equal(keyed_normal((7,), 1, 2), keyed_normal((2, 5), 1, 2).flatten()[:7])
    assert keyed_normal((), 1).shape == ()
    assert keyed_normal((0, 3), 1).shape == (0, 3)


@pytest.mark.parametrize("other", [(8, "noise", 123), (7, "nois", 123), (7, "noise", 124), (7, "noise", 123, 0)])
def test_every_part_of_the_key_counts(other: tuple[int | str, ...]) -> None:
    one, two = keyed_normal((10_000,), 7, "noise", 123), keyed_normal((10_000,), *other)
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.045


def test_the_steps_and_purposes_of_a_picture_are_apart() -> None:
    noise = PictureNoise([1], (1, 100, 100))
    rows = torch.stack([noise.initial(), noise.step(0), noise.step(1), noise.step(0, "churn")]).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.045


def test_moments() -> None:
    count = 400_000
    z = keyed_normal((count,), 11, "moments").double()
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - expected) < 4 * math.sqrt(deviation / count)
    assert 4.3 < z.abs().max() < 6.8
    u = keyed_uniform((count,), 11, "moments").numpy()
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 50  # chi-squared, 19 degrees of freedom


def increment(noise: PictureNoise, sigma: float, after: float) -> torch.Tensor:
    """Of the path itself, in the clock 1 / sigma^2."""
    return noise.between(sigma, after) * math.sqrt(after**-2 - sigma**-2)


def test_brownian_noise_is_golden() -> None:
    golden = torch.tensor([0.51211572, 0.51602417, 0.95025223, 1.49378836])
    torch.testing.assert_close(
        PictureNoise([0, 42], (2, 2, 1)).between(7.3, 2.2)[0].flatten(), golden, atol=1e-5, rtol=1e-5
    )


def test_brownian_increments_add_up() -> None:
    noise = PictureNoise([3, 4], (4, 8, 8))
    parts = increment(noise, 8.0, 2.0) + increment(noise, 2.0, 0.25)
    torch.testing.assert_close(parts, increment(noise, 8.0, 0.25), rtol=1e-5, atol=1e-5)
    parts, whole = increment(noise, 7.3, 2.2) + increment(noise, 2.2, 0.31), increment(noise, 7.3, 0.31)
    assert (parts - whole).std() < 2e-3 * whole.std()


def test_brownian_noise_does_not_depend_on_what_was_asked_before() -> None:
    intervals = [(9.0, 3.3), (3.3, 3.2), (0.7, 0.1), (9.0, 3.3), (1e7, 20.0)]
    used = PictureNoise([5], (2, 3, 3))
    for interval in intervals + intervals[::-1]:
        assert torch.equal(used.between(*interval), PictureNoise([5], (2, 3, 3)).between(*interval))


@pytest.mark.parametrize(
    "interval",
    [(14.6, 9.0), (9.0, 8.97), (0.5, 0.03), (3.0, 3.0001), (1e7, 9.0), (1e7, 1e3), (1e-3, 1e-5), (0.01, 1e-9)],
)
def test_brownian_noise_is_standard_normal_whatever_the_interval(interval: tuple[float, float]) -> None:
    z = PictureNoise([1], (4, 100, 100)).between(*interval).flatten().double()
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(z.pow(power).mean() - expected) < 4.5 * math.sqrt(deviation / len(z))


def test_disjoint_intervals_are_independent_and_so_is_all_other_noise() -> None:
    noise = PictureNoise([1], (4, 50, 50))
    ends = [1e7, 20.0, 9.0, 8.97, 3.0, 2.9999, 2.9998, 0.4, 0.03, 1e-3, 1e-4]
    rows = [noise.between(high, low).flatten() for high, low in itertools.pairwise(ends)]
    rows += [noise.initial().flatten(), noise.step(0).flatten(), noise.step(1).flatten()]
    assert (torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))).abs().max() < 0.045
