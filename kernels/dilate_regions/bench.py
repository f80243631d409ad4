"""Benchmark cases of dilate_regions; the peer is the reference, a convolution with the disc."""

from __future__ import annotations

import torch

from kernels.dilate_regions.op import dilate_regions

# name: (B, M, h, w, radius, share of seeds)
SHAPES = {
    "84 maps 28x28 r=5": (4, 21, 28, 28, 5.0, 0.02),
    "84 maps 40x40 r=5": (4, 21, 40, 40, 5.0, 0.02),
    "84 maps 40x40 r=8": (4, 21, 40, 40, 8.0, 0.02),
    "84 maps 40x40 r=8, half of the cells": (4, 21, 40, 40, 8.0, 0.5),
    "324 maps 40x40 r=8": (4, 81, 40, 40, 8.0, 0.02),
}
TOLERANCE = 0.0


def inputs(name: str, device: torch.device) -> torch.Tensor:
    *shape, _, share = SHAPES[name]
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(device)


def check(name: str, device: torch.device, backend: str) -> float:
    """Share of the cells that differ from the reference."""
    seeds, radius = inputs(name, device), SHAPES[name][4]
    want = dilate_regions(seeds, radius, backend="reference")
    return (dilate_regions(seeds, radius, backend=backend) != want).float().mean().item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    seeds, radius = inputs(name, device), SHAPES[name][4]
    return lambda: dilate_regions(seeds, radius, backend=backend)
