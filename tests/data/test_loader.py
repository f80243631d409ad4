"""The stream of samples is a function of (seed, step, position) alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data.loader import epoch_order
from wsss_dist.errors import UserError

G, STEPS, N = 8, 5, 19  # 2 steps an epoch: the 5 steps cross two epoch boundaries, 3 images are dropped each time


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("loader") / "set", N, 1, 40, 3, seed=0)


def stream(root, *, workers=0, world=1, micro=2, start=0, steps=STEPS, seed=7, damaged=None, **changes) -> dict:
    """(step, position) -> (id, sha256 of the augmented pixels, box, flipped, labels), gathered over all ranks.

    The names and reasons of damaged images go to the list `damaged`; without it there may be none.
    """
    cfg = sets.config(root, crop=24, photometric=True, num_workers=workers, **changes)
    data = build_dataset(cfg, "train")
    samples = {}
    for rank in range(world):
        loader = build_train_loader(
            data,
            cfg,
            seed=seed,
            global_batch=G,
            micro_batch=micro,
            rank=rank,
            world_size=world,
            start_step=start,
            num_steps=steps,
        )
        assert len(loader) == steps
        for step, batches in enumerate(loader, start):
            assert len(batches) == G // (micro * world)
            for m, batch in enumerate(batches):
                assert len(batch) == micro and (damaged is not None or batch.damaged == [])
                if damaged is not None:
                    damaged += [(path.replace(":", "/").rsplit("/", 1)[1], reason) for path, reason in batch.damaged]
                for k in range(micro):
                    digest = hashlib.sha256(batch.images[k].numpy().tobytes()).hexdigest()
                    position = (m * world + rank) * micro + k
                    boxes, flipped = batch.boxes[k].tolist(), bool(batch.flipped[k])
                    samples[step, position] = (batch.ids[k], digest, boxes, flipped, batch.labels[k].tolist())
    assert len(samples) == steps * G
    return samples


@pytest.fixture(scope="module")
def reference(root):
    return stream(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(root, reference, workers):
    assert stream(root, workers=workers) == reference


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_not_matter(root, reference, world):
    assert stream(root, world=world) == reference


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_micro_batches_do_not_matter(root, reference, micro):
    assert stream(root, micro=micro) == reference


def test_ranks_workers_and_resume_together(root, reference):
    resumed = stream(root, workers=2, world=2, start=3, steps=2)
    assert resumed == {key: value for key, value in reference.items() if key[0] >= 3}


@pytest.mark.parametrize("start", range(1, STEPS))
def test_resume_continues_the_stream(root, reference, start):
    resumed = stream(root, start=start, steps=STEPS - start)
    assert resumed == {key: value for key, value in reference.items() if key[0] >= start}


def test_another_seed_is_another_stream(root, reference):
    other = stream(root, seed=8)
    assert [v[0] for v in other.values()] != [v[0] for v in reference.values()]
    assert not {v[1] for v in other.values()} & {v[1] for v in reference.values()}


def test_augmentation_differs_between_positions_and_steps(tmp_path):
    """All images are one picture, so equal pixels mean equal draws."""
    same = write_synthetic_dataset(tmp_path / "set", N, 1, 40, 3, seed=0)
    first, *others = sorted((same / "images" / "train").iterdir())
    for path in others:
        path.write_bytes(first.read_bytes())
    assert len({value[1] for value in stream(same).values()}) == G * STEPS


def test_an_epoch_is_a_permutation_cut_into_steps(root, reference):
    names = [f"{k:05d}" for k in range(N)]
    for epoch in range(2):
        order = epoch_order(N, 7, epoch)
        assert sorted(order) == list(range(N))
        seen = [reference[step, p][0] for step in (2 * epoch, 2 * epoch + 1) for p in range(G)]
        assert seen == [names[i] for i in order[: 2 * G]]
    assert (epoch_order(N, 7, 0) != epoch_order(N, 7, 1)).any()


def test_resume_decodes_no_skipped_sample(root, monkeypatch):
    cfg = sets.config(root)
    data = build_dataset(cfg, "train")
    read = []
    real = data.image
    monkeypatch.setattr(data, "image", lambda i: read.append(i) or real(i))
    loader = build_train_loader(
        data, cfg, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, start_step=10**9, num_steps=2
    )
    assert sum(len(batch) for step in loader for batch in step) == len(read) == 8


def test_a_loader_leaves_the_global_generators_alone(root):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    stream(root, workers=1, steps=2)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_batch_shapes_and_types(root):
    cfg = sets.config(root, crop=24)
    loader = build_train_loader(
        build_dataset(cfg, "train"),
        cfg,
        seed=0,
        global_batch=4,
        micro_batch=2,
        rank=0,
        world_size=2,
        start_step=0,
        num_steps=1,
    )
    ((batch,),) = list(loader)
    assert batch.images.shape == (2, 3, 24, 24) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (2, 3) and batch.labels.dtype == torch.float32
    assert batch.boxes.shape == (2, 4) and batch.boxes.dtype == torch.int64
    assert batch.flipped.shape == (2,) and batch.flipped.dtype == torch.bool


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((20, 2, 1), "'set/train' has 19 images, fewer than train.global_batch = 20; lower"),
        ((8, 3, 1), "train.global_batch is 8; expected a multiple of .* 3 x 1"),
        ((8, 4, 4), "train.global_batch is 8; expected a multiple of .* 4 x 4"),
    ],
)
def test_wrong_batch_sizes(root, sizes, message):
    cfg = sets.config(root)
    total, micro, world = sizes
    with pytest.raises(UserError, match=message):
        build_train_loader(
            build_dataset(cfg, "train"),
            cfg,
            seed=0,
            global_batch=total,
            micro_batch=micro,
            rank=0,
            world_size=world,
            start_step=0,
            num_steps=1,
        )
