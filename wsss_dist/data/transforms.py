"""Training augmentation as the PCRE and ToCo papers set it; each draw comes from the generator that is given.

H W pixels, S side of the square crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from wsss_dist.data.config import DataConfig

# ImageNet statistics of RGB in [0, 1], which the pretrained backbones expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass
class Augmented:
    """One training image: uint8 [3, S, S], the box (y0, y1, x0, x1) that is no padding, and whether it is mirrored."""

    image: Tensor
    box: tuple[int, int, int, int]
    flipped: bool


def sample_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """The generator of the sample at `position` in the global batch of `step`; equal for any workers, ranks, resume."""
    return np.random.default_rng(np.random.SeedSequence((seed, 1, step, position)))


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] RGB to float32, minus the ImageNet mean, over the standard deviation."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return images.float().div(255.0).sub(mean).div(std)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`: float32 [..., 3, H, W] to RGB in [0, 255], float32, not rounded."""
    mean = torch.tensor(MEAN, device=images.device, dtype=images.dtype).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device, dtype=images.dtype).view(3, 1, 1)
    return images.mul(std).add(mean).mul(255.0)


def augment(image: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> Augmented:
    """Augment one image for training.

    "crop": resize by a factor U(scale) to int(f W) x int(f H) with an 8-bit bilinear filter, mirror with p = 0.5, pad
    with black to at least S a side with the image at a uniform place, crop S x S at a uniform place. "squash": resize
    to S x S, mirror with p = 0.5. Then, where configured, the photometric changes.

    Args:
        image: uint8 [H, W, 3] RGB.
        cfg: crop, scale, flip, augment, photometric.
        rng: all randomness.
    """
    picture = torch.from_numpy(image).permute(2, 0, 1)
    height, width = image.shape[:2]
    if cfg.augment == "crop":
        factor = rng.uniform(*cfg.scale)
        size = [max(1, int(factor * height)), max(1, int(factor * width))]
    else:
        size = [cfg.crop, cfg.crop]
    if size != [height, width]:
        picture = F.resize(picture, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    flipped = bool(rng.random() < 0.5) and cfg.flip
    if flipped:
        picture = F.horizontal_flip(picture)
    picture, box = _pad_and_crop(picture, cfg.crop, rng)
    if cfg.photometric:
        picture = _photometric(picture, rng)
    return Augmented(picture.contiguous(), box, flipped)


def _pad_and_crop(image: Tensor, side: int, rng: np.random.Generator) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pad to at least side x side, crop side x side; both at uniform integer places."""
    out = image.new_zeros(3, side, side)
    source, target = [], []
    for length in image.shape[1:]:
        room = max(side, length) - length
        placed = int(rng.integers(0, room + 1))
        start = int(rng.integers(0, max(side, length) - side + 1))
        begin, end = max(placed - start, 0), min(placed + length - start, side)
        target.append((begin, end))
        source.append((begin + start - placed, end + start - placed))
    (y0, y1), (x0, x1) = target
    (sy0, sy1), (sx0, sx1) = source
    out[:, y0:y1, x0:x1] = image[:, sy0:sy1, sx0:sx1]
    return out, (y0, y1, x0, x1)


def _photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Colour jitter p .8, grey p .2, blur p .1, solarise p .2; always the same number of draws, in the same order."""
    jitter, grey, blur, solarise = rng.random(4)
    factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1])
    order = rng.permutation(4)
    radius = rng.uniform(0.1, 2.0)
    if jitter < 0.8:
        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for k in order:
            image = changes[k](image, float(factors[k]))
    if grey < 0.2:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if blur < 0.1:
        # three standard deviations on each side hold 99.7 % of the kernel
        size = 2 * int(np.ceil(3 * radius)) + 1
        image = F.gaussian_blur(image, [size, size], [radius, radius])
    if solarise < 0.2:
        image = F.solarize(image, 128)
    return image
