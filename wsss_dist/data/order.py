"""The order of the images of an epoch: a permutation of 0 .. n - 1 keyed by (seed, epoch).

Up to KEYED_FROM images it is an array, 8 bytes an image in every process that trains. Above, such an array and the time
to shuffle it are in the way (n = 10^9: 8 GB), so `KeyedOrder` computes the image at each position instead: a Feistel
network on Z_a x Z_b with a b >= n, walked on where it leaves 0 .. n - 1 (Black and Rogaway, CT-RSA 2002, "generalised
Feistel" and "cycle walking").
"""

from __future__ import annotations

import math

import numpy as np

# images from which on the order is computed; below it is what it always was
KEYED_FROM = 2**24
# Four make a pseudo-random permutation of a true random function (Luby and Rackoff); eight, as the halves are short.
ROUNDS = 8


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray | KeyedOrder:
    """The permutation of the n images in `epoch`; a slice of it is int64."""
    if n < KEYED_FROM:
        return np.random.default_rng(np.random.SeedSequence((seed, 0, epoch))).permutation(n)
    return KeyedOrder(n, seed, epoch)


class KeyedOrder:
    """A permutation of 0 .. n - 1 that takes no memory; `order[i:j]` is an int64 array. 1 <= n < 2^62."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert 1 <= n < 2**62
        self._n = n
        a = math.isqrt(n - 1) + 1
        self._sides = a, -(-n // a)
        self._keys = np.random.SeedSequence((seed, 0, epoch)).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, span: slice) -> np.ndarray:
        x = np.arange(*span.indices(self._n), dtype=np.uint64)
        x = self._round_trip(x)
        while len(outside := np.flatnonzero(x >= self._n)):  # fewer than one in sqrt(n)
            x[outside] = self._round_trip(x[outside])
        return x.astype(np.int64)

    def _round_trip(self, x: np.ndarray) -> np.ndarray:
        """A permutation of 0 .. a b - 1."""
        a, b = (np.uint64(side) for side in self._sides)
        left, right = x // b, x % b
        for k, key in enumerate(self._keys):  # an even number of them, so that the sides are at their places again
            left, right = right, (left + _mixed(right + key) % (b if k % 2 else a)) % (b if k % 2 else a)
        return left * b + right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, uint64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
