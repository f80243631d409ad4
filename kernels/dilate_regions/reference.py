"""Dilation of region maps in plain torch; the definition of the op."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import no_autocast
from kernels.radius_mask.reference import SLACK, near


def dilate_regions(seeds: Tensor, radius: float, metric: str) -> Tensor:
    b, m, h, w = seeds.shape
    if seeds.numel() == 0:
        return seeds.clone()
    reach = min(math.floor(radius + SLACK), max(h, w) - 1)
    steps = torch.arange(-reach, reach + 1, device=seeds.device)
    disc = near(steps[:, None], steps[None, :], radius, metric)
    with no_autocast(seeds):
        hits = F.conv2d(seeds.reshape(b * m, 1, h, w).float(), disc[None, None].float(), padding=reach)
    return (hits > 0.5).reshape(b, m, h, w)  # hits are counts
