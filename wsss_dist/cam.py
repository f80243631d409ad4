"""Class activation maps: fusion over scales and mirror images, normalisation, and the ways to turn them into labels.

Letters: B batch, C foreground classes, H W pixels, h w feature grid. Source: PCRE (CVPR 2025) on ToCo (CVPR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

import kernels
from wsss_dist.schema import StrictModel

IGNORE = 255


class CamConfig(StrictModel):
    """CAMs of the pseudo labels (sections 2.2 to 2.4 of the paper's supplementary settings)."""

    scales: list[PositiveFloat] = Field([1.0, 0.5, 0.75, 1.5], min_length=1)  # each with its mirror image
    high: float = Field(0.7, ge=0, le=1)  # above: the class
    low: float = Field(0.25, ge=0, le=1)  # at most: background; between: ignored
    proto_high: float = Field(0.7, ge=0, le=1)
    proto_low: float = Field(0.25, ge=0, le=1)
    mix: float = Field(0.3, ge=0, le=1)  # share of the CRME mask in the fused map
    mix_from: float = Field(0.4, ge=0, le=1)  # from this fraction of the run on

    @model_validator(mode="after")
    def _low_is_below_high(self) -> CamConfig:
        for low, high in (("low", "high"), ("proto_low", "proto_high")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"'{low}' is {getattr(self, low)} and must not be above '{high}', {getattr(self, high)}"
                )
        return self


class ParConfig(StrictModel):
    """Pixel-adaptive refinement of the pseudo labels."""

    dilations: tuple[PositiveInt, ...] = Field((1, 2, 4, 8, 12, 24), min_length=1, max_length=32)
    iterations: int = Field(10, ge=0)
    downscale: int = Field(2, ge=1)


class RadiusConfig(StrictModel):
    """Radius of the disc around each query, in patches (Eq. 5); begin and finish are fractions of the run."""

    start: float = Field(1.0, ge=0)
    end: float = Field(5.0, ge=0)
    begin: float = Field(0.1, ge=0, le=1)
    finish: float = Field(0.4, ge=0, le=1)
    after: Literal["hold", "off"] = "hold"  # keep the disc afterwards, or drop it

    @model_validator(mode="after")
    def _begins_before_it_finishes(self) -> RadiusConfig:
        if self.begin >= self.finish:
            raise ValueError(f"'begin' is {self.begin} and must be below 'finish', {self.finish}")
        return self


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of [B, C, h, w], half-pixel centres, no antialiasing also when shrinking."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def rescaled(images: Tensor, scale: float) -> Tensor:
    """Images [B, 3, H, W] at a scale, sides rounded; bicubic, antialiased when shrinking, as Pillow does it."""
    size = tuple(max(1, round(side * scale)) for side in images.shape[-2:])
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def pool(features: Tensor, how: str) -> Tensor:
    """[B, D, h, w] -> [B, D, 1, 1], the "max" or the "avg" over the grid."""
    return features.amax((2, 3), keepdim=True) if how == "max" else features.mean((2, 3), keepdim=True)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Image size at a scale, rounded down."""
    return int(size[0] * scale), int(size[1] * scale)


def present_pairs(labels: Tensor) -> Tensor:
    """Tags [B, C] -> pairs [P, 2] int64 of an image and one of its tags, image by image, classes ascending."""
    return (labels > 0).nonzero()


def rectified_maps(maps_of: Callable[[Tensor], Tensor], images: Tensor, pairs: Tensor, mirror: bool) -> Tensor:
    """Rectified class maps [P, h, w] of P pairs of images [B, 3, H, W], plus those of the mirror images where asked.

    Args:
        maps_of: images -> raw class maps [B, C, h, w].
        images: [B, 3, H, W].
        pairs: [P, 2] image and class.
        mirror: add the map of the mirror image, mirrored back.
    """
    if not mirror:
        return maps_of(images)[pairs[:, 0], pairs[:, 1]].float().relu()
    maps = maps_of(torch.cat([images, images.flip(-1)])).float().relu()
    plain, mirrored = (half[pairs[:, 0], pairs[:, 1]] for half in maps.chunk(2))
    return plain + mirrored.flip(-1)


def multi_scale(
    class_maps: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, scales: Sequence[float]
) -> Tensor:
    """CAMs [B, C, H, W] of tags [B, C]: maps summed over scales, each divided by its maximum (plus 1e-5).

    Args:
        class_maps: images, pairs [P, 2] -> maps [P, h, w] that are not negative.
        images: [B, 3, H, W].
        labels: [B, C].
        scales: of the images.
    """
    size, pairs = images.shape[-2:], present_pairs(labels)
    total: Tensor | float = 0.0
    for scale in scales:
        total = total + upsample(class_maps(rescaled(images, scale), pairs)[:, None], size)[:, 0]
    return all_classes(peak_normalised(total), pairs, labels)


def merge_mirror(maps: Tensor, pairs: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [2B, C, h, w] of a batch and its mirror images -> their maximum, one plane per pair [P, H, W]."""
    plain, mirrored = (half[pairs[:, 0], pairs[:, 1]].float() for half in maps.chunk(2))
    return upsample(torch.stack([plain, mirrored.flip(-1)], dim=1), size).amax(1)


def all_classes(planes: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
    """Planes [P, H, W] of the pairs -> maps [B, C, H, W], zero for the classes that are no tags of the image."""
    maps = planes.new_zeros(*labels.shape, *planes.shape[-2:])
    maps[pairs[:, 0], pairs[:, 1]] = planes
    return maps


def minmax(maps: Tensor) -> Tensor:
    """Each plane of [..., H, W] to [0, 1]: subtract the minimum, divide by the maximum (plus 1e-5)."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (maps.amax((-2, -1), keepdim=True) + 1e-5)


def peak_normalised(maps: Tensor) -> Tensor:
    """Each plane of non-negative maps [..., H, W] divided by its maximum (plus 1e-5)."""
    return maps / (maps.amax((-2, -1), keepdim=True) + 1e-5)


def box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool, True inside each box (y0, y1, x0, x1)."""
    y = torch.arange(size[0], device=boxes.device)[None, :, None]
    x = torch.arange(size[1], device=boxes.device)[None, None, :]
    y0, y1, x0, x1 = (boxes[:, i, None, None] for i in range(4))
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def grid_boxes(boxes: Tensor, patch: int) -> Tensor:
    """Boxes in pixels -> boxes in patches that hold only whole patches of real image."""
    low, high = -(-boxes // patch), boxes // patch
    return torch.stack([low[:, 0], high[:, 1], low[:, 2], high[:, 3]], dim=1)


def training_labels(cams: Tensor, inside: Tensor, high: float, low: float) -> Tensor:
    """Three-way labels [B, H, W] int64 of tag-masked maps [B, C, H, W] in [0, 1].

    Above `high` the best class, at most `low` background, in between and where `inside` is False 255.
    """
    value, label = cams.max(1)
    label = torch.where(value > high, label + 1, IGNORE)
    label = torch.where(value <= low, 0, label)
    return torch.where(inside, label, IGNORE)


def threshold_labels(cams: Tensor, threshold: float) -> Tensor:
    """Labels [B, H, W] int64 for evaluation: the best class above `threshold`, background elsewhere."""
    value, label = cams.max(1)
    return torch.where(value > threshold, label + 1, 0)


def refine_labels(
    planes: list[Tensor],
    thresholds: list[tuple[float, float]],
    pairs: Tensor,
    images: Tensor,
    inside: Tensor,
    *,
    downscale: int = 2,
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
) -> list[Tensor]:
    """Pixel-adaptive refinement of several CAMs of the same images into labels (PCRE section 2.5).

    The affinities depend on the image alone, so all maps of an image share one call.

    Args:
        planes: maps [P, H, W] in [0, 1], one per pair.
        thresholds: (high, low) background level for each of `planes`.
        pairs: [P, 2] image and class of each plane.
        images: [B, 3, H, W] RGB in [0, 1].
        inside: [B, H, W] bool, real image.
        downscale: the refinement runs at 1/downscale of the size.
    Returns:
        One label map [B, H, W] int64 for each of `planes`: 0 background, 1..C, 255 undecided or outside.
    """
    size = images.shape[-2:]
    small = (size[0] // downscale, size[1] // downscale)
    images = upsample(images, small)
    shrunk = [upsample(p[:, None], small)[:, 0] for p in planes]
    out = [torch.empty(len(images), *size, dtype=torch.int64, device=images.device) for _ in planes]
    for b in range(len(images)):
        own = (pairs[:, 0] == b).nonzero().flatten()
        stacks = [
            torch.cat([torch.full_like(images[b, :1], level), maps[own]]).softmax(0)
            for maps, levels in zip(shrunk, thresholds, strict=True)
            for level in levels
        ]
        refined = kernels.par(images[b : b + 1], torch.cat(stacks)[None], dilations=dilations, iterations=iterations)
        refined = upsample(refined, size).unflatten(1, (len(planes), 2, len(own) + 1))[0]
        names = torch.cat([own.new_zeros(1), pairs[own, 1] + 1])
        for i, stack in enumerate(refined):
            high, low = names[_first_best(stack)]
            out[i][b] = torch.where(high != 0, high, torch.where(low == 0, 0, IGNORE))
    return [torch.where(inside, o, IGNORE) for o in out]


def _first_best(stack: Tensor) -> Tensor:
    """argmax over dimension 1 of [n, K, H, W], first of equals; plane by plane, for few planes much faster."""
    best, index = stack[:, 0], torch.zeros_like(stack[:, 0], dtype=torch.int64)
    for k in range(1, stack.shape[1]):
        higher = stack[:, k] > best
        best = torch.where(higher, stack[:, k], best)
        index = torch.where(higher, k, index)
    return index


def radius_at(progress: float, start: float, end: float, begin: float, finish: float) -> float:
    """Radius of the disc in patches: clamped cosine from `start` to `end` while progress goes begin -> finish (Eq. 5).

    progress, begin and finish are fractions of the run.
    """
    u = min(max((progress - begin) / (finish - begin), 0.0), 1.0)
    return start + (end - start) * (1 - math.cos(math.pi * u)) / 2


def fuse_logits(per_scale: list[Tensor], scales: list[float], rule: str) -> Tensor:
    """Merge segmentation logits [B, K, H, W] of several scales, each the sum of plain and mirrored.

    rule "voc": max(Z at scale 1, mean over scales); "coco": max over scales (PCRE section 9); "mean": their mean.
    """
    stack = torch.stack(per_scale)
    if rule == "coco":
        return stack.amax(0)
    if rule == "mean":
        return stack.mean(0)
    return torch.maximum(stack[scales.index(1.0)], stack.mean(0))
