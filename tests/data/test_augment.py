"""The augmentation of P-NOC: length of the long side, square and crop, mean padding, jitter, maps that follow."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data import transforms as module
from wsss_dist.data.transforms import augment, normalise, sample_generator


def ramp(height: int, width: int) -> np.ndarray:
    """Smooth, and no pixel is black, so that padding shows."""
    ys, xs = np.mgrid[0:height, 0:width]
    return np.stack([40 + 200 * ys / height, 40 + 200 * xs / width, np.full((height, width), 90.0)], 2).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)


def boxes(image: np.ndarray, count: int, **changes) -> list:
    cfg = sets.config("unused", **changes)
    return [augment(image, cfg, sample_generator(0, k, 0)).box for k in range(count)]


@pytest.mark.parametrize("shape", [(100, 200), (200, 100)])
def test_long_side_is_any_length_of_the_range_and_keeps_the_aspect(shape):
    lengths = set()
    for y0, y1, x0, x1 in boxes(ramp(*shape), 200, crop=96, augment="long_side", long_side=(60, 75)):
        long, short = (x1 - x0, y1 - y0) if shape[1] > shape[0] else (y1 - y0, x1 - x0)
        assert short == round(long / 2)
        lengths.add(long)
    assert lengths == set(range(60, 76))


def test_long_side_resizes_as_pillow_does():
    cfg = sets.config("unused", crop=64, augment="long_side", long_side=(64, 64), flip=False)
    image = noise(90, 120)
    sample = augment(image, cfg, sample_generator(0, 0, 0))
    y0, y1, x0, x1 = sample.box
    assert (x0, x1, y1 - y0) == (0, 64, 48)
    ours = sample.image[:, y0:y1].permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC))
    # two 8-bit implementations of one filter: the last bit may be rounded differently
    assert np.abs(ours.astype(int) - pillow).max() <= 1


def test_native_mirrors_alone_and_maps_follow():
    image = noise(9, 14)
    maps = {"labels": np.arange(126, dtype=np.uint8).reshape(9, 14)}
    cfg = sets.config("unused", augment="native", maps={"labels": {"dir": "x", "kind": "labels"}})
    seen = set()
    for k in range(20):
        sample = augment(image, cfg, sample_generator(0, k, 0), maps)
        expected = image[:, ::-1] if sample.flipped else image
        assert (sample.image.permute(1, 2, 0).numpy() == expected).all() and sample.box == (0, 9, 0, 14)
        assert (sample.maps["labels"].numpy() == (maps["labels"][:, ::-1] if sample.flipped else maps["labels"])).all()
        seen.add(sample.flipped)
    assert seen == {False, True} and cfg.fixed_views


def test_squash_size_crops_a_part_of_the_square():
    cfg = sets.config("unused", crop=16, augment="squash", squash_size=20)
    image = noise(20, 20)
    places = set()
    for k in range(200):
        sample = augment(image, cfg, sample_generator(0, k, 0))
        assert sample.box == (0, 16, 0, 16)
        whole = image[:, ::-1] if sample.flipped else image
        part = sample.image.permute(1, 2, 0).numpy()
        places |= {(y, x) for y in range(5) for x in range(5) if (whole[y : y + 16, x : x + 16] == part).all()}
    assert places == {(y, x) for y in range(5) for x in range(5)}
    wide = augment(noise(40, 80), cfg, sample_generator(0, 0, 0))
    assert wide.image.shape == (3, 16, 16) and wide.box == (0, 16, 0, 16), "the aspect is not kept"


def steps(root, num_steps: int = 2, world: int = 1, **changes) -> list:
    """All batches, in the order of the positions."""
    cfg = sets.config(root, **changes)
    data = build_dataset(cfg, "train")
    sizes = {"global_batch": 4, "micro_batch": 2, "world_size": world, "start_step": 0, "num_steps": num_steps}
    ranks = [list(build_train_loader(data, cfg, seed=3, rank=rank, **sizes)) for rank in range(world)]
    return [batch for step in zip(*ranks, strict=True) for micro in zip(*step, strict=True) for batch in micro]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("augment") / "set", 9, 1, 40, 3, seed=0)


SMALL = {"augment": "long_side", "long_side": (20, 28), "crop": 32}


@pytest.mark.parametrize(("changes", "padding"), [({}, 0.0), ({"pad": "mean"}, 0.0), ({"pad": "black"}, None)])
def test_padding_of_the_long_side_is_the_mean_colour(root, changes, padding):
    black = normalise(torch.zeros(3, 1, 1, dtype=torch.uint8))
    for batch in steps(root, **SMALL, **changes):
        for image, (y0, y1, x0, x1) in zip(batch.images, batch.boxes.tolist(), strict=True):
            outside = torch.ones(32, 32, dtype=torch.bool)
            outside[y0:y1, x0:x1] = False
            assert outside.sum() > 200
            expected = black[:, 0].expand(3, int(outside.sum())) if padding is None else 0
            assert (image[:, outside] == expected).all()


def test_padding_changes_nothing_but_the_padding(root):
    for augmentation in (SMALL, {"crop": 56}):
        for one, two in zip(
            steps(root, **augmentation, pad="black"), steps(root, **augmentation, pad="mean"), strict=True
        ):
            assert torch.equal(one.boxes, two.boxes)
            for a, b, (y0, y1, x0, x1) in zip(one.images, two.images, one.boxes.tolist(), strict=True):
                assert torch.equal(a[:, y0:y1, x0:x1], b[:, y0:y1, x0:x1])
    assert sets.config(root).padding == "black" and sets.config(root, augment="squash").padding == "black"


def test_jitter_draws_what_torchvision_does(monkeypatch):
    calls = []
    for k in range(4):
        monkeypatch.setattr(
            module,
            "_CHANGES",
            (*module._CHANGES[:k], lambda i, f, k=k: calls.append((k, f)) or i, *module._CHANGES[k + 1 :]),
        )
    image = ramp(20, 30)
    cfg = sets.config("unused", crop=16, jitter=(0.3, 0.2, 1.5, 0.1))
    orders = set()
    for k in range(400):
        before = len(calls)
        augment(image, cfg, sample_generator(0, k, 0))
        orders.add(tuple(which for which, _ in calls[before:]))
    assert len(orders) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    for which, low, high in ((0, 0.7, 1.3), (1, 0.8, 1.2), (2, 0.0, 2.5), (3, -0.1, 0.1)):
        factors = [f for k, f in calls if k == which]
        assert low <= min(factors) < low + 0.03 * (high - low) and high - 0.03 * (high - low) < max(factors) <= high
    calls.clear()
    augment(image, sets.config("unused", crop=16, jitter=(0.3, 0, 0, 0)), sample_generator(0, 0, 0))
    assert [which for which, _ in calls] == [0], "what is 0 is left out"


def test_jitter_and_operations_see_the_whole_image_and_the_padding_stays_black(monkeypatch):
    """In the order of the paper: resize, mirror, jitter, RandAugment, crop."""
    seen = []
    monkeypatch.setattr(module, "_jitter", lambda i, a, rng: seen.append(("jitter", *i.shape[1:])) or i)
    monkeypatch.setattr(module, "rand_augment", lambda i, n, m, rng: seen.append(("operations", n, m)) or i + 1)
    cfg = sets.config(
        "unused", crop=32, augment="long_side", long_side=(20, 20), jitter=(0.3, 0.3, 0.3, 0.1), rand_augment={"n": 3}
    )
    sample = augment(ramp(10, 20), cfg, sample_generator(0, 0, 0))
    assert seen == [("jitter", 10, 20), ("operations", 3, 10)]
    y0, y1, x0, x1 = sample.box
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert ((sample.image > 0).all(0) == inside).all()


def test_colours_move_nothing():
    image = ramp(30, 40)
    only = {"jitter": (0.3, 0.3, 0.3, 0.1)}
    both = {**only, "rand_augment": {}}
    for augmentation in ({"crop": 32}, {**SMALL}, {"crop": 32, "augment": "squash", "squash_size": 36}):
        plain, jitter, full = (sets.config("unused", **augmentation, **c) for c in ({}, only, both))
        changed = 0
        for k in range(20):
            one, two, three = (augment(image, c, sample_generator(0, k, 0)) for c in (plain, jitter, full))
            assert one.box == two.box == three.box and one.flipped == two.flipped == three.flipped
            changed += not torch.equal(one.image, two.image)
        assert changed > 15


def test_what_a_colour_draws_depends_neither_on_the_image_nor_on_the_others(monkeypatch):
    factors, operations = [], []
    monkeypatch.setattr(module, "_CHANGES", tuple(lambda i, f: factors.append(f) or i for _ in range(4)))
    monkeypatch.setattr(module, "rand_augment", lambda i, n, m, rng: operations.append(rng.random()) or i)
    jitter, ops = {"jitter": (0.3, 0.3, 0.3, 0.1)}, {"rand_augment": {}}
    for image in (ramp(32, 32), ramp(90, 70), ramp(5, 200)):  # the first has but one place, which takes no draw
        for chosen in (jitter, ops, {**jitter, **ops}):
            augment(image, sets.config("unused", crop=32, scale=(1, 1), **chosen), sample_generator(0, 0, 0))
    assert len(factors) == 24 and factors == factors[:4] * 6
    assert len(operations) == 6 and len(set(operations)) == 1


def test_workers_and_ranks_do_not_matter(root, tmp_path):
    """With everything on; maps and RandAugment exclude each other."""
    maps = sets.write_maps(tmp_path, build_dataset(sets.config(root), "train"))
    for changes in ({"maps": maps}, {"rand_augment": {}}):
        changes |= SMALL | {"jitter": (0.3, 0.3, 0.3, 0.1)}

        def digests(changes=changes, **more):
            return [
                (b.ids, [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (b.images, *b.maps.values())])
                for b in steps(root, **changes, **more)
            ]

        assert digests() == digests(num_workers=1) == digests(world=2)


def test_maps_follow_the_image():
    """Maps cut out of the image itself: what the image shows after the augmentation, the maps show."""
    height, width = 48, 64
    ys, xs = np.mgrid[0:height, 0:width]
    blocks = (20 + 20 * (ys // 16) + 60 * (xs // 16)).astype(np.uint8)
    image = np.stack([blocks, ramp(height, width)[:, :, 1], ramp(height, width)[:, :, 0]], 2)
    unit = image.astype(np.float32) / 255
    given = {"labels": blocks, "grey": unit[:, :, 1].copy(), "hint": unit[:, :, 2].copy()}
    kinds = {"labels": "labels", "grey": "grey", "hint": "scores"}
    maps = {name: {"dir": "unused", "kind": kind} for name, kind in kinds.items()}
    for changes in (
        {"crop": 40, "scale": (0.5, 2.0)},
        {"crop": 40, "augment": "squash"},
        {"crop": 30, "augment": "squash", "squash_size": 40},
        {"crop": 40, "augment": "long_side", "long_side": (30, 90)},
    ):
        cfg = sets.config("unused", maps=maps, **changes)
        plain = sets.config("unused", **changes)
        for k in range(20):
            sample = augment(image, cfg, sample_generator(0, k, 0), given)
            assert torch.equal(sample.image, augment(image, plain, sample_generator(0, k, 0)).image)
            y0, y1, x0, x1 = sample.box
            inside = torch.zeros(cfg.crop, cfg.crop, dtype=torch.bool)
            inside[y0:y1, x0:x1] = True
            labels = sample.maps["labels"]
            assert labels.dtype == torch.uint8 and (labels[~inside] == 255).all()
            assert set(labels[inside].unique().tolist()) <= set(range(20, 241, 20)), "no id is mixed of two"
            # the image is, between two blocks
            same = (labels[inside].float() - sample.image[0][inside].float()).abs() <= 10
            assert same.float().mean() > 0.75
            for name, channel in (("grey", 1), ("hint", 2)):
                values = sample.maps[name]
                assert values.dtype == torch.float32 and (values[~inside] == 0).all()
                # 8-bit steps; bicubic against bilinear on a ramp, which differ at the border alone
                apart = (values[inside] * 255 - sample.image[channel][inside].float()).abs()
                assert apart.max() <= (6 if cfg.augment == "long_side" else 1.01), (changes, k, apart.max())
