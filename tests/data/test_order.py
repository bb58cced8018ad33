"""The order of pictures: each once per epoch, whole buckets, and nothing to replay."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentkit.data import order as order_module
from latentkit.data.order import Order, permutation
from latentkit.errors import InputError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 5))
def test_a_permutation_of_every_length(length, seed, epoch):
    order = permutation(length, seed, 0, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))


def test_permutations_differ_by_seed_epoch_and_stream_and_stay():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [permutation(1000, *key).tolist() for key in keys]
    assert len({tuple(order) for order in first}) == 4
    permutation.cache_clear()
    assert [permutation(1000, *key).tolist() for key in keys] == first
    assert permutation(12, 7, 0, 3).tolist() == [2, 3, 0, 8, 4, 9, 5, 1, 11, 10, 6, 7]  # fixed for ever: runs resume


def test_positions_are_uniform():
    places = np.stack([permutation(8, seed, 0, 0) for seed in range(2000)])
    for column in places.T:
        counts = np.bincount(column, minlength=8)
        assert abs(counts - 250).max() < 6 * np.sqrt(250)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99), st.integers(1, 5))
def test_every_picture_once_an_epoch(length, batch, seed, epochs):
    order = Order(length, batch, seed)
    steps = -(-epochs * length // batch)
    draws = [int(draw) for step in range(steps) for draw in order.draws(step)]
    assert draws == list(range(steps * batch))
    seen = Counter((order.epoch(draw), order.item(draw)) for draw in draws)
    assert set(seen.values()) == {1}
    for epoch in range(epochs):
        assert sum(e == epoch for e, _ in seen) == length


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 99), st.integers(1, 60))
def test_buckets(buckets, batch, seed, steps):
    order = Order(len(buckets), batch, seed, tuple(buckets))
    seen = Counter()
    for step in range(steps):
        items = [order.item(draw) for draw in order.draws(step)]
        assert len({buckets[item] for item in items}) == 1  # a batch is of one bucket
        seen.update((order.epoch(draw), order.item(draw)) for draw in order.draws(step))
    assert max(seen.values()) == 1  # never twice in an epoch of its own
    for epoch, item in seen:
        assert not epoch or (epoch - 1, item) in seen  # and none left out


def test_buckets_come_by_their_share():
    buckets = (0,) * 70 + (1,) * 25 + (2,) * 5
    order = Order(100, 8, 0, buckets)
    steps = 100 * 40 // 8
    times = Counter(order.item(draw) for step in range(steps) for draw in order.draws(step))
    for item, count in times.items():
        assert 38 <= count <= 41, (item, count)
    first = [buckets[order.item(order.draws(step)[0])] for step in range(50)]
    assert first != sorted(first)


def test_a_draw_needs_no_other_draw():
    buckets = tuple(np.random.default_rng(0).integers(0, 5, 1000).tolist())
    for bucket_numbers in (None, buckets):
        straight = Order(1000, 16, 3, bucket_numbers)
        walked = [straight.item(draw) for step in range(300) for draw in straight.draws(step)]
        permutation.cache_clear()
        order_module._turns.cache_clear()
        resumed = Order(1000, 16, 3, bucket_numbers)
        assert [resumed.item(draw) for draw in resumed.draws(299)] == walked[299 * 16 :]


def test_resuming_far_in_sorts_only_the_epochs_it_is_in(monkeypatch):
    calls = []
    real = order_module.keyed_bits
    monkeypatch.setattr(order_module, "keyed_bits", lambda n, *key: calls.append(n) or real(n, *key))
    permutation.cache_clear()
    order_module._turns.cache_clear()
    buckets = tuple(i % 3 for i in range(3000))
    for bucket_numbers in (None, buckets):
        order = Order(3000, 32, 1, bucket_numbers)
        for draw in order.draws(10**9):
            order.item(draw)
    assert len(calls) <= 6


@pytest.mark.slow
def test_ten_million_pictures_resume_within_seconds():
    begin = time.perf_counter()
    order = Order(10_000_000, 256, 0)
    items = [order.item(draw) for draw in order.draws(123_456)]
    print(f"resume at 10^7 pictures: {time.perf_counter() - begin:.2f} s")
    assert len(set(items)) == 256


def test_what_cannot_be_ordered():
    for wrong in ((0, 4, 0), (4, 0, 0), (4, 4, -1)):
        with pytest.raises(InputError):
            Order(*wrong)
    with pytest.raises(InputError, match="3 bucket numbers"):
        Order(4, 2, 0, (0, 1, 1))
