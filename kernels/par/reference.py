"""Pixel-adaptive refinement in plain torch; the definition of the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
WEIGHT_COLOUR = 0.3
WEIGHT_POSITION = 0.3
POSITION_SHARE = 0.01
EPS = 1e-8


def offsets(dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """The 8 * len(dilations) offsets (dy, dx), dilation by dilation."""
    return [(d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS]


def position_weights(dilations: tuple[int, ...]) -> list[float]:
    """POSITION_SHARE * softmax over the offsets of -(q / (0.3 std(q)))^2; q is the length of the offset."""
    lengths = [math.hypot(dy, dx) for dy, dx in offsets(dilations)]
    mean = sum(lengths) / len(lengths)
    std = math.sqrt(sum((q - mean) ** 2 for q in lengths) / (len(lengths) - 1))
    powers = [-((q / ((std + EPS) * WEIGHT_POSITION)) ** 2) for q in lengths]
    top = max(powers)
    exps = [math.exp(v - top) for v in powers]
    return [POSITION_SHARE * e / sum(exps) for e in exps]


def neighbours(x: Tensor, shifts: list[tuple[int, int]]) -> Tensor:
    """[B, C, H, W] -> [B, C, n, H, W]: the pixels at each offset, coordinates clamped to the image."""
    rows = torch.arange(x.shape[-2], device=x.device)
    cols = torch.arange(x.shape[-1], device=x.device)
    taps = [
        x.index_select(-2, (rows + dy).clamp(0, len(rows) - 1)).index_select(-1, (cols + dx).clamp(0, len(cols) - 1))
        for dy, dx in shifts
    ]
    return torch.stack(taps, dim=2)


def weights(image: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """[B, 3, H, W] -> [B, n, H, W]: the tap weights of each pixel; they sum to 1.01."""
    near = neighbours(image, offsets(dilations))
    sigma = near.std(dim=2, keepdim=True)
    colour = -(((near - image.unsqueeze(2)) / ((sigma + EPS) * WEIGHT_COLOUR)) ** 2).mean(dim=1)
    place = torch.tensor(position_weights(dilations), dtype=colour.dtype, device=colour.device)
    return colour.softmax(dim=1) + place[:, None, None]


@torch.no_grad()
def par(image: Tensor, maps: Tensor, dilations: tuple[int, ...], iterations: int) -> Tensor:
    dtype = accumulate_dtype(image, maps)
    image, maps = image.to(dtype), maps.to(dtype, copy=True)
    if maps.numel() == 0:
        return maps
    shifts = offsets(dilations)
    tap_weights = weights(image, dilations)
    for _ in range(iterations):
        out = torch.zeros_like(maps)
        for n, shift in enumerate(shifts):
            out += tap_weights[:, n : n + 1] * neighbours(maps, [shift]).squeeze(2)
        maps = out
    return maps
