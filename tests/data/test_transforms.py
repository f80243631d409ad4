"""Augmentation: boxes point at the real image, draws follow the stated ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import sets
from wsss_dist.data.transforms import MEAN, STD, augment, denormalise, normalise, sample_generator


def ramp(height: int, width: int) -> np.ndarray:
    """No pixel is black, so that padding shows."""
    ys, xs = np.mgrid[0:height, 0:width]
    return np.stack([40 + 200 * ys / height, 40 + 200 * xs / width, np.full((height, width), 90.0)], 2).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (64, 48), (16, 100), (1, 1), (33, 16)])
def test_everything_outside_the_box_is_padding_and_nothing_inside(height, width):
    cfg = sets.config("unused", crop=32)
    for k in range(30):
        sample = augment(ramp(height, width), cfg, sample_generator(0, k, 0))
        assert sample.image.shape == (3, 32, 32) and sample.image.dtype == torch.uint8
        y0, y1, x0, x1 = sample.box
        assert 0 <= y0 < y1 <= 32 and 0 <= x0 < x1 <= 32
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        assert ((sample.image.amax(0) > 0) == inside).all()


def test_crop_without_scale_or_flip_is_a_part_of_the_image():
    cfg = sets.config("unused", crop=16, scale=(1.0, 1.0), flip=False)
    image = np.random.default_rng(0).integers(1, 256, (40, 50, 3), dtype=np.uint8)
    places = set()
    for k in range(200):
        sample = augment(image, cfg, sample_generator(0, k, 0))
        part = sample.image.permute(1, 2, 0).numpy()
        assert sample.box == (0, 16, 0, 16) and not sample.flipped
        (match,) = [
            (y, x) for y in range(25) for x in range(35) if (image[y, x] == part[0, 0]).all()
            and (image[y : y + 16, x : x + 16] == part).all()
        ]  # fmt: skip
        places.add(match)
    assert len(places) > 150
    rows, columns = zip(*places, strict=True)
    assert (min(rows), max(rows)) == (0, 24) and min(columns) <= 1 and max(columns) >= 33


def test_padding_places_the_image_at_every_offset():
    cfg = sets.config("unused", crop=16, scale=(1.0, 1.0), flip=False)
    boxes = {augment(ramp(14, 16), cfg, sample_generator(0, k, 0)).box for k in range(60)}
    assert boxes == {(0, 14, 0, 16), (1, 15, 0, 16), (2, 16, 0, 16)}


def test_scale_covers_its_range_and_keeps_the_aspect():
    cfg = sets.config("unused", crop=512, scale=(0.5, 2.0))
    heights = []
    for k in range(200):
        y0, y1, x0, x1 = augment(ramp(100, 200), cfg, sample_generator(1, k, 0)).box
        heights.append(y1 - y0)
        assert abs((x1 - x0) - 2 * (y1 - y0)) <= 1  # each side is rounded down on its own
    assert 50 <= min(heights) < 60 and 190 < max(heights) <= 200


def test_flip_happens_half_of_the_time_and_mirrors():
    cfg = sets.config("unused", crop=20, augment="squash")
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    flips = 0
    for k in range(300):
        sample = augment(image, cfg, sample_generator(0, k, 3))
        expected = image[:, ::-1] if sample.flipped else image
        assert (sample.image.permute(1, 2, 0).numpy() == expected).all() and sample.box == (0, 20, 0, 20)
        flips += sample.flipped
    assert 120 < flips < 180  # 3.5 standard deviations of a fair coin


def test_resize_agrees_with_pillow():
    cfg = sets.config("unused", crop=24, augment="squash", flip=False)
    image = np.random.default_rng(0).integers(0, 256, (60, 37, 3), dtype=np.uint8)
    ours = augment(image, cfg, sample_generator(0, 0, 0)).image.permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
    # two 8-bit implementations of one filter: the last bit may be rounded differently
    assert np.abs(ours.astype(int) - pillow).max() <= 1


def test_photometric_changes_pixels_but_neither_box_nor_place():
    plain, changed = (sets.config("unused", crop=32, photometric=p) for p in (False, True))
    different = 0
    for k in range(60):
        one = augment(ramp(30, 40), plain, sample_generator(0, k, 0))
        two = augment(ramp(30, 40), changed, sample_generator(0, k, 0))
        assert (one.box, one.flipped) == (two.box, two.flipped) and two.image.shape == (3, 32, 32)
        different += not torch.equal(one.image, two.image)
    assert 40 < different <= 60  # nothing happens with p = .2 * .8 * .9 * .8 = .115


def test_generators_differ_in_every_part_of_their_key():
    draws = {sample_generator(*key).integers(2**60) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4


def test_normalise_and_back():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    normal = normalise(images)
    assert torch.allclose(normal[1, 2], (images[1, 2] / 255 - MEAN[2]) / STD[2], atol=1e-6)
    assert torch.equal(denormalise(normal).round().to(torch.uint8), images)
