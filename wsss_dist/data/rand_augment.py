"""RandAugment as P-NOC trains its plain classifier with (`RandAugment(2, 10)`; Cubuk et al., CVPRW 2020).

Fourteen operations on 8-bit RGB. A level v in 1 .. 9 sets how much one does; what moves pixels leaves black behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

SQUARE = 16


def rand_augment(image: Tensor, n: int, m: int, rng: np.random.Generator) -> Tensor:
    """Apply n random operations, each with p = 0.5, then blacken a square of 16 pixels at a random place.

    Args:
        image: uint8 [3, H, W] RGB.
        n: operations, drawn with replacement.
        m: levels are drawn from 1 .. m - 1, m <= 10.
        rng: all randomness; the number of draws depends on n alone.
    Returns:
        uint8 [3, H, W], a new tensor.
    """
    chosen = rng.integers(len(OPERATIONS), size=n)
    levels = rng.integers(1, m, size=n)
    chances = rng.random((n, 2))
    place = rng.random(2)
    for k, v, (chance, side) in zip(chosen, levels, chances, strict=True):
        if chance < 0.5:
            image = OPERATIONS[k](image, int(v), -1 if side < 0.5 else 1)
    return _black_square(image, place)


def _black_square(image: Tensor, place: np.ndarray) -> Tensor:
    """The centre lies anywhere in the image, so the square may stick out at the right and at the bottom."""
    image = image.clone()
    y, x = (max(0, int(u * length - SQUARE / 2)) for u, length in zip(place, image.shape[1:], strict=True))
    image[:, y : y + SQUARE, x : x + SQUARE] = 0
    return image


def _factor(v: int) -> float:
    return 0.09 * v + 0.05


def _affine(image: Tensor, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Shift by (x, y) pixels; shear about the upper left corner, x by shear[0] pixels a row, y by shear[1] a column."""
    degrees = [math.degrees(math.atan(s)) for s in shear]
    nearest = InterpolationMode.NEAREST
    return F.affine(image, 0.0, list(translate), 1.0, degrees, interpolation=nearest, center=[0.0, 0.0])


# (image uint8 [3, H, W], level v, sign) -> image; whole numbers, so that rounding down does not depend on the last bit
OPERATIONS: tuple[Callable[[Tensor, int, int], Tensor], ...] = (
    lambda image, v, sign: F.autocontrast(image),
    lambda image, v, sign: F.equalize(image),
    lambda image, v, sign: image,
    lambda image, v, sign: F.adjust_brightness(image, _factor(v)),
    lambda image, v, sign: F.adjust_saturation(image, _factor(v)),
    lambda image, v, sign: F.adjust_contrast(image, _factor(v)),
    lambda image, v, sign: F.adjust_sharpness(image, _factor(v)),
    lambda image, v, sign: F.posterize(image, 4 * v // 10 + 4),
    lambda image, v, sign: F.rotate(image, float(sign * 3 * v), interpolation=InterpolationMode.NEAREST),
    lambda image, v, sign: _affine(image, shear=(sign * 0.03 * v, 0.0)),
    lambda image, v, sign: _affine(image, shear=(0.0, sign * 0.03 * v)),
    lambda image, v, sign: F.solarize(image, 256 - 256 * v // 10),
    lambda image, v, sign: _affine(image, translate=(sign * (3 * v * image.shape[2] // 100), 0)),
    lambda image, v, sign: _affine(image, translate=(0, sign * (3 * v * image.shape[1] // 100))),
)
