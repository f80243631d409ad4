"""Training augmentation as the PCRE, ToCo and P-NOC papers set it; each draw comes from the generator that is given.

H W pixels, S side of the square crop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from wsss_dist.data.config import OF_IDS, PADDING, DataConfig
from wsss_dist.data.rand_augment import rand_augment

# ImageNet statistics of RGB in [0, 1], which the pretrained backbones expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass
class Augmented:
    """One training image: uint8 [3, S, S], the box (y0, y1, x0, x1) that is no padding, whether it is mirrored, and its
    maps [S, S], uint8 for class labels and float32 else."""

    image: Tensor
    box: tuple[int, int, int, int]
    flipped: bool
    maps: dict[str, Tensor] = field(default_factory=dict)


def sample_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """The generator of the sample at `position` in the global batch of `step`; equal for any workers, ranks, resume."""
    return np.random.default_rng(np.random.SeedSequence((seed, 1, step, position)))


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] RGB to float32, minus the ImageNet mean, over the standard deviation."""
    images = images.float().div(255.0)
    return images.sub(_channels(MEAN, images)).div(_channels(STD, images))


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`: float32 [..., 3, H, W] to RGB in [0, 255], float32, not rounded."""
    return images.mul(_channels(STD, images)).add(_channels(MEAN, images)).mul(255.0)


def _channels(values: tuple[float, float, float], images: Tensor) -> Tensor:
    """[3, 1, 1], a number a channel. `torch.tensor(..., device=)` would wait until a GPU has done all it was given."""
    return torch.tensor(values, dtype=images.dtype).view(3, 1, 1).to(images.device, non_blocking=True)


def clear_padding(images: Tensor, boxes: list[tuple[int, int, int, int]]) -> None:
    """Set normalised images [B, 3, S, S] to 0, the mean colour, outside their boxes (y0, y1, x0, x1); in place."""
    for image, (y0, y1, x0, x1) in zip(images, boxes, strict=True):
        image[:, :y0] = 0
        image[:, y1:] = 0
        image[:, :, :x0] = 0
        image[:, :, x1:] = 0


def augment(
    image: np.ndarray, cfg: DataConfig, rng: np.random.Generator, maps: dict[str, np.ndarray] | None = None
) -> Augmented:
    """Augment one image for training, and its maps with it.

    1. Resize. "crop": by a factor U(scale) to int(f W) x int(f H), bilinear; "long_side": so that the long side has
       U{low..high} pixels and the other its share, rounded, bicubic; "squash": to a square of squash_size, bilinear.
       All are antialiased and 8 bits deep. "native": not at all.
    2. Mirror with p = 0.5.
    3. Colour jitter, then RandAugment, where configured.
    4. Pad with black to at least S a side with the image at a uniform place, crop S x S at a uniform place; not with
       "native".
    5. The photometric changes, where configured.

    Maps go through 1, 2 and 4: class labels by the nearest pixel and padded with 255, erased regions by the nearest
    pixel, other maps bilinearly, both padded with 0.

    Args:
        image: uint8 [H, W, 3] RGB.
        cfg: crop, augment, scale, long_side, squash_size, flip, jitter, rand_augment, photometric, maps.
        rng: all randomness. Jitter and RandAugment have streams of their own, which nothing before them shifts.
        maps: name -> [H, W], uint8 for kinds "labels" and "erased", else float32; names as in cfg.maps.
    """
    size = _resized(image.shape[:2], cfg, rng)
    flipped = bool(rng.random() < 0.5) and cfg.flip
    window = _whole(size) if cfg.augment == "native" else _window(size, (cfg.crop, cfg.crop), rng)
    mode = InterpolationMode.BICUBIC if cfg.augment == "long_side" else InterpolationMode.BILINEAR
    picture = _placed(torch.from_numpy(image).permute(2, 0, 1), size, mode, flipped)
    if cfg.jitter or cfg.rand_augment:
        for_jitter, for_operations = rng.spawn(2)
        if cfg.jitter:
            picture = _jitter(picture, cfg.jitter, for_jitter)
        if cfg.rand_augment:
            picture = rand_augment(picture, cfg.rand_augment.n, cfg.rand_augment.m, for_operations)
    picture = _cut(picture, window, 0)
    if cfg.photometric:
        picture = _photometric(picture, rng)
    moved = {}
    for name, values in (maps or {}).items():
        kind = cfg.maps[name].kind
        # nearest-exact has half-pixel centres, as the other filters have
        mode = InterpolationMode.NEAREST_EXACT if kind in OF_IDS else InterpolationMode.BILINEAR
        values = _placed(torch.from_numpy(values)[None], size, mode, flipped)
        moved[name] = _cut(values, window, PADDING[kind])[0]
    return Augmented(picture.contiguous(), window.box, flipped, moved)


def _resized(size: tuple[int, int], cfg: DataConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of the picture before the crop."""
    if cfg.augment == "native":
        return size
    if cfg.augment == "squash":
        return (cfg.squash_size or cfg.crop,) * 2
    if cfg.augment == "crop":
        factor = rng.uniform(*cfg.scale)
        return tuple(max(1, int(factor * length)) for length in size)
    factor = int(rng.integers(cfg.long_side[0], cfg.long_side[1] + 1)) / max(size)
    return tuple(max(1, round(factor * length)) for length in size)


def _placed(values: Tensor, size: tuple[int, int], mode: InterpolationMode, flipped: bool) -> Tensor:
    """[channels, H, W] resized to `size`, and mirrored."""
    if size != tuple(values.shape[1:]):
        values = F.resize(values, list(size), interpolation=mode, antialias=True)
    return F.horizontal_flip(values) if flipped else values


@dataclass
class _Window:
    """The part (y0, y1, x0, x1) of the picture that is seen, the box of the crop where it lies, the crop's size."""

    source: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    crop: tuple[int, int]


def _whole(size: tuple[int, int]) -> _Window:
    box = (0, size[0], 0, size[1])
    return _Window(box, box, size)


def _window(size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator) -> _Window:
    """Pad to at least the size of the crop, then crop; both at uniform integer places."""
    source, box = [], []
    for length, side in zip(size, crop, strict=True):
        room = max(side, length) - length
        placed = int(rng.integers(0, room + 1))
        start = int(rng.integers(0, max(side, length) - side + 1))
        begin, end = max(placed - start, 0), min(placed + length - start, side)
        box += [begin, end]
        source += [begin + start - placed, end + start - placed]
    return _Window(tuple(source), tuple(box), crop)


def _cut(values: Tensor, window: _Window, fill: int) -> Tensor:
    """[channels, H, W] to [channels, *window.crop], `fill` where the window is outside the picture."""
    out = values.new_full((len(values), *window.crop), fill)
    (sy0, sy1, sx0, sx1), (y0, y1, x0, x1) = window.source, window.box
    out[:, y0:y1, x0:x1] = values[:, sy0:sy1, sx0:sx1]
    return out


_CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def _jitter(image: Tensor, amounts: tuple[float, float, float, float], rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation by U(1 - a, 1 + a), not below 0, hue by U(-a, a), in random order."""
    low = [max(0.0, 1 - a) for a in amounts[:3]] + [-amounts[3]]
    factors = rng.uniform(low, [1 + a for a in amounts[:3]] + [amounts[3]])
    for k in rng.permutation(4):
        if amounts[k]:
            image = _CHANGES[k](image, float(factors[k]))
    return image


def _photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Colour jitter p .8, grey p .2, blur p .1, solarise p .2; always the same number of draws, in the same order."""
    jitter, grey, blur, solarise = rng.random(4)
    factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1])
    order = rng.permutation(4)
    radius = rng.uniform(0.1, 2.0)
    if jitter < 0.8:
        for k in order:
            image = _CHANGES[k](image, float(factors[k]))
    if grey < 0.2:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if blur < 0.1:
        # three standard deviations on each side hold 99.7 % of the kernel
        size = 2 * int(np.ceil(3 * radius)) + 1
        image = F.gaussian_blur(image, [size, size], [radius, radius])
    if solarise < 0.2:
        image = F.solarize(image, 128)
    return image
