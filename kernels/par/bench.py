"""Benchmark cases of par, at the shapes the trainer uses. The peer is the reference, plain torch as research code."""

from __future__ import annotations

import torch

from kernels.par.op import par

# name: (B, C, H, W)
SHAPES = {
    "1x3x112": (1, 3, 112, 112),
    "2x12x112": (2, 12, 112, 112),
    "1x3x224": (1, 3, 224, 224),
    "1x21x224": (1, 21, 224, 224),
}
TOLERANCE = 1e-5  # against fp64; the maps lie in [0, 1]


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed random maps over a smooth image with noise."""
    b, c, h, w = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(b, 3, 7, 7, generator=make), (h, w), mode="bilinear")
    image = (image + 0.05 * torch.randn(b, 3, h, w, generator=make)).clamp(0, 1)
    return image.to(device), torch.rand(b, c, h, w, generator=make).to(device)


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64."""
    image, maps = inputs(name, device)
    want = par(image.double(), maps.double(), backend="reference")
    return (par(image, maps, backend=backend) - want).abs().max().item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    image, maps = inputs(name, device)
    return lambda: par(image, maps, backend=backend)
