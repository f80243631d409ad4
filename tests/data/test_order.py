"""The order of an epoch: an array up to KEYED_FROM images, above it a permutation that is computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wsss_dist.data import order
from wsss_dist.data.loader import _ChunkSampler
from wsss_dist.data.order import KEYED_FROM, KeyedOrder, epoch_order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 97, 100, 101, 9_999, 10_000, 10_007, 65_536])
def test_a_keyed_order_is_a_permutation(n):
    keyed = KeyedOrder(n, 5, 2)
    assert len(keyed) == n
    assert np.array_equal(np.sort(keyed[:]), np.arange(n))


def test_a_slice_is_a_part_of_the_whole():
    keyed, whole = KeyedOrder(1000, 0, 0), KeyedOrder(1000, 0, 0)[:]
    assert whole.dtype == np.int64
    for begin, end in ((0, 1), (17, 23), (990, 1000), (5, 5)):
        assert np.array_equal(keyed[begin:end], whole[begin:end])


def test_seed_and_epoch_are_its_key():
    orders = [KeyedOrder(5000, seed, epoch)[:] for seed in (0, 1) for epoch in (0, 1)]
    for a, b in itertools.combinations(orders, 2):
        # two random permutations have one image at the same place on average, Poisson: 10 or more in 1e-7 of the cases
        assert (a == b).sum() < 10


def _chi_square(counts: np.ndarray) -> float:
    """In standard deviations above what even counts would give."""
    expected, free = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free)


@pytest.mark.parametrize("n", [10_007, 10**9, 2**61 + 1])
def test_neighbours_are_unrelated(n):
    cells = 16
    most = min(n - 1, 80_000)
    found = [KeyedOrder(n, seed, 0)[:most] for seed in range(4)]
    place = np.concatenate(found) // (n // cells + 1)
    # even over the set, in pairs, and in the last digits against those of the position
    assert abs(_chi_square(np.bincount(place, minlength=cells))) < 5
    # the last one is a row of the grid that the network works on
    for lag in (1, 2, 7, *(side for side in KeyedOrder(n, 0, 0)._sides if side < most)):
        pairs = np.concatenate([f[lag:] // (n // cells + 1) * cells + f[:-lag] // (n // cells + 1) for f in found])
        assert abs(_chi_square(np.bincount(pairs, minlength=cells**2))) < 5
    low = np.concatenate(found) % cells * cells + np.tile(np.arange(most), len(found)) % cells
    assert abs(_chi_square(np.bincount(low, minlength=cells**2))) < 5


def test_fewer_rounds_are_seen(monkeypatch):
    monkeypatch.setattr(order, "ROUNDS", 2)
    with pytest.raises(AssertionError):
        test_neighbours_are_unrelated(10**9)


def test_data_sets_of_today_keep_their_order():
    want = np.random.default_rng(np.random.SeedSequence((7, 0, 3))).permutation(10_582)
    assert np.array_equal(epoch_order(10_582, 7, 3), want)
    assert KEYED_FROM > 14e6, "ImageNet-21k"
    assert isinstance(epoch_order(KEYED_FROM - 1, 0, 0), np.ndarray)


def test_a_billion_images_take_no_array(monkeypatch):
    def refuse(*_):
        raise AssertionError("an array of the length of the data set")

    monkeypatch.setattr(np.random, "default_rng", refuse)
    first = list(itertools.islice(_ChunkSampler(10**9, 0, 8, 2, 1, 2, 10**7, 3), 2))
    assert [len(chunk) for chunk in first] == [2, 2]
    assert first[0][0][:2] == (10**7, 2) and 0 <= first[0][0][2] < 10**9


def samples_of(n: int, world: int, micro: int, steps: int, accumulate: int = 1, start: int = 0) -> list[tuple]:
    """All (step, position, index) of all ranks, in the order of the ranks."""
    batch = world * micro * accumulate
    return [
        key
        for rank in range(world)
        for chunk in _ChunkSampler(n, 3, batch, micro, rank, world, start, steps)
        for key in chunk
    ]


@pytest.mark.parametrize("keyed", [False, True])
def test_every_sample_of_the_global_batch_comes_once_on_1000_ranks(keyed, monkeypatch):
    if keyed:
        monkeypatch.setattr(order, "KEYED_FROM", 0)
    n, world, micro, steps = 9_001, 1000, 2, 5  # 4 steps an epoch
    found = samples_of(n, world, micro, steps)
    places = {(step, position): index for step, position, index in found}
    assert len(found) == len(places) == steps * world * micro
    assert set(places) == set(itertools.product(range(steps), range(world * micro)))
    epoch = [index for (step, _), index in places.items() if step < 4]
    assert len(set(epoch)) == len(epoch) == 8000, "no image twice in an epoch"
    whole = epoch_order(n, 3, 0)[:]
    assert all(index == whole[step * world * micro + p] for (step, p), index in places.items() if step < 4)
    # another number of ranks, the same samples
    assert {(s, p): i for s, p, i in samples_of(n, 8, 250, steps)} == places
    assert {(s, p): i for s, p, i in samples_of(n, 8, 50, 2, accumulate=5, start=3)}.items() <= places.items()
