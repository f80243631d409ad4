"""Step times of many ranks whose loaders take a random time for each sample: a simulation of torch's DataLoader.

Batch j of a rank goes to worker j mod W, which makes one after the other; D = PREFETCH W of them are under way, and the
next is handed out when one is taken. With F the moment it is made and R the moment it is taken,

    F[j] = max(F[j - W], R[j - D]) + t[j],        R[j] = max(F[j], moment it is asked for).

A step begins when the slowest rank has ended the one before, as the gradients are reduced over all of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsss_dist.data.bench import configs, make_images
from wsss_dist.data.loader import PREFETCH, _TrainSamples
from wsss_dist.data.readers import build_dataset

# (shape, generator) -> seconds
Draw = Callable[[tuple[int, ...], np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Steps:
    """Seconds of each step after the warm-up, and by how much loaders have put off its end, [steps] each."""

    seconds: np.ndarray
    waited: np.ndarray

    @property
    def stall(self) -> float:
        """Share of the time that all ranks wait for loaders."""
        return float(self.waited.sum() / self.seconds.sum())


def simulate(
    sample: Draw,
    compute: Draw,
    *,
    ranks: int,
    workers: int,
    micro_batch: int,
    micro_batches: int = 1,
    collectives: float = 0.0,
    steps: int = 200,
    warmup: int = 20,
    seed: int = 0,
) -> Steps:
    """Synchronous steps of `ranks` ranks.

    Args:
        sample: seconds of one training sample.
        compute: seconds of the micro batches of a step on one rank, without collectives.
        workers: W of each rank; 0: samples are made by the process that trains.
        collectives: seconds that follow the slowest rank.
        steps, warmup: counted steps, and those before them, in which the prefetched batches are used up.
    """
    rng = np.random.default_rng(seed)
    depth = PREFETCH * workers
    made = np.zeros((max(1, depth), ranks))  # F of the last batches
    taken = np.zeros((max(1, depth), ranks))  # R of the same
    now, number = 0.0, 0
    seconds, waited = [], []
    for _ in range(warmup + steps):
        clock = np.full(ranks, now)
        wait = np.zeros(ranks)
        work = compute((ranks,), rng) / micro_batches
        for _ in range(micro_batches):
            spent = sample((ranks, micro_batch), rng).sum(1)
            if workers:
                slot = number % depth
                # before the first `depth` batches nothing has to be taken
                made[slot] = np.maximum(made[(number - workers) % depth], taken[slot]) + spent
                ready = np.maximum(made[slot], clock)
                taken[slot] = ready
            else:
                ready = clock + spent
            wait += ready - clock
            clock = ready
            number += 1
        end = clock + work * micro_batches
        busy = now + (work * micro_batches).max()  # where nobody had to wait
        last = end.max()
        seconds.append(last + collectives - now)
        waited.append(last - busy)
        now = last + collectives
    return Steps(np.array(seconds[warmup:]), np.array(waited[warmup:]))


def workers_needed(sample: Draw, compute: Draw, *, most: int = 64, share: float = 0.01, **settings) -> int | None:
    """Fewest workers of a rank with which stalls take less than `share` of the time; None: not even `most`."""
    mean = float(sample((20000,), np.random.default_rng(0)).mean())
    step = float(compute((1000,), np.random.default_rng(0)).mean())
    images = settings["micro_batch"] * settings.get("micro_batches", 1)
    first = max(1, int(images * mean / step))  # fewer cannot keep up
    for workers in range(first, most + 1):
        if simulate(sample, compute, workers=workers, **settings).stall < share:
            return workers
    return None


def of_quantiles(values: list[float]) -> Draw:
    """Draws from a distribution given by evenly spaced quantiles, 0 and 1 among them."""
    at, known = np.linspace(0, 1, len(values)), np.asarray(values)
    return lambda shape, rng: np.interp(rng.random(shape), at, known)


def around(mean: float, spread: float) -> Draw:
    """Draws around a mean, log-normal with a standard deviation of `spread` times it; 0: always the mean."""
    if not spread:
        return lambda shape, rng: np.full(shape, mean)
    sigma = np.sqrt(np.log1p(spread**2))
    return lambda shape, rng: mean * np.exp(sigma * rng.standard_normal(shape) - sigma**2 / 2)


def measured_samples(pictures: Path, count: int, rounds: int, crop: int, reader: str = "folder") -> np.ndarray:
    """CPU seconds of single training samples on one thread, PCRE's augmentation of COCO: [rounds, count]."""
    with tempfile.TemporaryDirectory(prefix="wsss-samples-") as folder:
        root = Path(folder)
        make_images(pictures, root / "files", count)
        cfg = configs(root, crop)[reader]
        dataset = build_dataset(cfg, "train")
        samples = _TrainSamples(dataset, cfg, 0)
        samples.__getitems__([(0, 0, 0)])
        out = np.zeros((rounds, count))
        for r in range(rounds):
            for i in range(count):
                begin = time.process_time()
                samples.__getitems__([(r, i, i)])
                out[r, i] = time.process_time() - begin
    return out
