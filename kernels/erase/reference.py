"""Erasing the region of a class from images in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import no_autocast

EPS = 1e-5


def upsample(maps: Tensor, height: int, width: int) -> Tensor:
    """[B, h, w] -> [B, H, W]: the positive part of the maps, resized bilinearly with half-pixel centres."""
    with no_autocast(maps):
        up = F.interpolate(maps.relu().unsqueeze(1), (height, width), mode="bilinear", align_corners=False)
    return up.squeeze(1)


def erase_maximum(maps: Tensor, height: int, width: int) -> Tensor:
    if len(maps) * height * width == 0:
        return maps.new_zeros(()) + 0 * maps[:0].sum()  # a part of the graph, as with pixels
    return upsample(maps, height, width).amax()  # positions that tie share the gradient evenly


def erase_soft(images: Tensor, maps: Tensor, maximum: Tensor) -> Tensor:
    if images.numel() == 0:
        return images + 0 * (maps[:0].sum() + maximum)
    psi = upsample(maps, *images.shape[2:]) / (maximum + EPS)
    return (images * (1 - psi).unsqueeze(1)).to(images.dtype)


@torch.no_grad()
def erase_hard(images: Tensor, maps: Tensor, threshold: float) -> Tensor:
    if images.numel() == 0:
        return images.clone()
    up = upsample(maps, *images.shape[2:])
    psi = up / (up.amax((1, 2), keepdim=True) + EPS)
    return torch.where((psi <= threshold).unsqueeze(1), images, 0)
