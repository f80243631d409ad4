"""Benchmark cases of dilate_regions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dilate_regions import reference
from kernels.dilate_regions.op import dilate_regions

# name: (B, M, h, w, radius, share of seeds)
SHAPES = {
    "84 maps 28x28 r=5": (4, 21, 28, 28, 5.0, 0.02),
    "84 maps 40x40 r=5": (4, 21, 40, 40, 5.0, 0.02),
    "84 maps 40x40 r=8": (4, 21, 40, 40, 8.0, 0.02),
    "84 maps 40x40 r=8, half of the cells": (4, 21, 40, 40, 8.0, 0.5),
    "324 maps 40x40 r=8": (4, 81, 40, 40, 8.0, 0.02),
}
TOLERANCE = PEER_TOLERANCE = 0.0


def inputs(name: str, device: torch.device) -> torch.Tensor:
    *shape, _, share = SHAPES[name]
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(device)


def check(name: str, device: torch.device, backend: str) -> float:
    """Share of the cells that differ from the reference."""
    return _error(name, device, dilate_regions(inputs(name, device), SHAPES[name][4], backend=backend))


def _error(name: str, device: torch.device, got: torch.Tensor) -> float:
    want = dilate_regions(inputs(name, device), SHAPES[name][4], backend="reference")
    return (got != want).float().mean().item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    seeds, radius = inputs(name, device), SHAPES[name][4]
    return lambda: dilate_regions(seeds, radius, backend=backend)


def peers(name: str, device: torch.device) -> dict:
    """`eager`: a convolution with the disc on maps that are floats already; `compile`: the reference, compiled."""
    seeds, radius = inputs(name, device), SHAPES[name][4]
    reach = int(radius)
    steps = torch.arange(-reach, reach + 1, device=device)
    disc = reference.near(steps[:, None], steps, radius, "euclidean")[None, None].float()
    maps = seeds.flatten(0, 1).unsqueeze(1).float()
    compiled = torch.compile(reference.dilate_regions)
    return {
        "eager": lambda: (F.conv2d(maps, disc, padding=reach) > 0.5).view(seeds.shape),
        "compile": lambda: compiled(seeds, radius, "euclidean"),
    }


def peer_error(name: str, device: torch.device, peer: str, result: torch.Tensor) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """A byte in and a byte out per cell."""
    b, m, h, w, _, _ = SHAPES[name]
    return 2 * b * m * h * w, 0
