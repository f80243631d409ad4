"""RandAugment: every operation is what Pillow does, the draws follow the stated ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from wsss_dist.data import rand_augment as module
from wsss_dist.data.rand_augment import OPERATIONS, rand_augment


def scene(height: int = 60, width: int = 80) -> np.ndarray:
    """Noise on a ramp: full histograms, and every pixel differs from its neighbours."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 200, width)[None, :, None] * np.ones((height, 1, 3)) * [1.0, 0.7, 0.4]
    return np.clip(ramp + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def shifted(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def factor(v: int) -> float:
    return v / 10 * 0.9 + 0.05


# The same in Pillow: (image, level, sign), in the order of OPERATIONS. Its matrices say where an output pixel comes
# from, so a shift runs the other way.
PILLOW = [
    lambda i, v, s: ImageOps.autocontrast(i),
    lambda i, v, s: ImageOps.equalize(i),
    lambda i, v, s: i,
    lambda i, v, s: ImageEnhance.Brightness(i).enhance(factor(v)),
    lambda i, v, s: ImageEnhance.Color(i).enhance(factor(v)),
    lambda i, v, s: ImageEnhance.Contrast(i).enhance(factor(v)),
    lambda i, v, s: ImageEnhance.Sharpness(i).enhance(factor(v)),
    lambda i, v, s: ImageOps.posterize(i, int(v * 0.4) + 4),
    lambda i, v, s: i.rotate(s * int(v * 3)),
    lambda i, v, s: shifted(i, 1, s * 0.03 * v, 0, 0, 1, 0),
    lambda i, v, s: shifted(i, 1, 0, 0, s * 0.03 * v, 1, 0),
    lambda i, v, s: ImageOps.solarize(i, 256 - int(v * 25.6)),
    lambda i, v, s: shifted(i, 1, 0, -s * int(0.03 * v * i.width + 1e-9), 0, 1, 0),
    lambda i, v, s: shifted(i, 1, 0, 0, 0, 1, -s * int(0.03 * v * i.height + 1e-9)),
]
EXACT = {1, 2, 7, 11, 12, 13}
TURNED = {8, 9, 10}


def test_there_are_fourteen():
    assert len(OPERATIONS) == len(PILLOW) == 14


@pytest.mark.parametrize("level", range(1, 10))
@pytest.mark.parametrize("k", range(14))
def test_operation_agrees_with_pillow(k, level):
    image = scene()
    for sign in (-1, 1):
        ours = OPERATIONS[k](torch.from_numpy(image).permute(2, 0, 1), level, sign).permute(1, 2, 0).numpy()
        theirs = np.asarray(PILLOW[k](Image.fromarray(image), level, sign))
        assert ours.dtype == np.uint8 and ours.shape == image.shape
        apart = np.abs(ours.astype(int) - theirs)
        if k in EXACT:
            assert (apart == 0).all()
        elif k in TURNED:  # the nearest pixel may be another one where two are equally near
            assert (apart.max(axis=2) == 0).mean() > 0.97
        else:  # Pillow rounds to the nearest 8-bit level where torchvision cuts off
            assert apart.max() <= 1
        if k != 2 and not (k == 11 and level == 1):
            assert (ours != image).any(), "the operation does nothing"


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 40), (100, 17)])
def test_any_size_gives_the_same_size(size):
    image = torch.from_numpy(scene(*size)).permute(2, 0, 1)
    for k in range(200):
        out = rand_augment(image, 2, 10, np.random.default_rng(k))
        assert out.shape == image.shape and out.dtype == torch.uint8


def recorded(monkeypatch, count: int, n: int = 2, m: int = 10) -> list:
    """(operation, level, sign) of each one applied in `count` images."""
    calls = []

    def stand_in(k):
        return lambda image, v, sign: calls.append((k, v, sign)) or image

    monkeypatch.setattr(module, "OPERATIONS", tuple(stand_in(k) for k in range(14)))
    for seed in range(count):
        rand_augment(torch.full((3, 20, 20), 7, dtype=torch.uint8), n, m, np.random.default_rng(seed))
    return calls


def test_draws(monkeypatch):
    calls = recorded(monkeypatch, 3000)
    assert abs(len(calls) - 3000) < 4 * np.sqrt(6000 * 0.25), "two operations, each with p = 0.5"
    operations, levels, signs = (np.array(column) for column in zip(*calls, strict=True))
    for values, kinds in ((operations, range(14)), (levels, range(1, 10)), (signs, (-1, 1))):
        counts = np.array([(values == kind).sum() for kind in kinds])
        assert counts.sum() == len(calls), "nothing outside the range"
        expected = len(calls) / len(counts)
        assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all(), counts
    assert {v for _, v, _ in recorded(monkeypatch, 100, m=4)} == {1, 2, 3}
    assert len(recorded(monkeypatch, 100, n=10)) > 400


def test_the_square_is_black_and_anywhere(monkeypatch):
    monkeypatch.setattr(module, "OPERATIONS", (lambda image, v, sign: image,) * 14)
    image = torch.full((3, 40, 50), 7, dtype=torch.uint8)
    rows, columns, whole = set(), set(), 0
    for seed in range(400):
        ys, xs = torch.nonzero(rand_augment(image, 2, 10, np.random.default_rng(seed))[0] == 0).unbind(1)
        height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
        assert len(ys) == height * width and height <= 16 and width <= 16
        assert height == 16 or ys.max() == 39
        assert width == 16 or xs.max() == 49
        whole += height == width == 16
        rows.add(int(ys.min()))
        columns.add(int(xs.min()))
    assert rows == set(range(32)) and columns == set(range(42))
    assert whole > 200 and (image == 7).all(), "the image that came in is left alone"


def test_the_number_of_draws_depends_on_n_alone():
    """The generator stands at the same place behind any image."""
    behind = set()
    for size in ((1, 1), (16, 90), (333, 17)):
        rng = np.random.default_rng(3)
        rand_augment(torch.from_numpy(scene(*size)).permute(2, 0, 1), 2, 10, rng)
        behind.add(rng.random())
    assert len(behind) == 1
