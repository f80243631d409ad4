"""Benchmark cases of select_regions, at the shapes the trainer uses; the peer is the reference, plain torch."""

from __future__ import annotations

import torch

from kernels.select_regions.op import RegionSelection, select_regions

# name: (B, h, w, C, classes present per image, radius)
SHAPES = {
    "4x28x28 C=20 r=5": (4, 28, 28, 20, 2, 5.0),
    "4x28x28 C=80": (4, 28, 28, 80, 3, None),
    "4x40x40 C=20 r=5": (4, 40, 40, 20, 2, 5.0),
    "4x40x40 C=80": (4, 40, 40, 80, 3, None),
}
TOLERANCE = 0.0


def blobs(count: int, h: int, w: int, make: torch.Generator) -> torch.Tensor:
    """Smooth random maps [count, h * w] with unit spread."""
    coarse = torch.randn(count, 1, 6, 6, generator=make)
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").flatten(1)


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks that are smooth and alike for patches that lie together; scores with the present classes above the rest."""
    b, h, w, c, count, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    embed = blobs(b * 6, h, w, make).view(b, 6, h * w)
    logits = embed.mT @ embed + 0.3 * torch.randn(b, h * w, h * w, generator=make)
    present = torch.zeros(b, c)
    present[:, :count] = 1
    scores = blobs(b * c, h, w, make).view(b, c, -1).mT + 2 * present[:, None] * torch.rand(b, h * w, 1, generator=make)
    return logits.to(device), scores.softmax(1).to(device), present.to(device)


def once(name: str, args: tuple[torch.Tensor, ...], backend: str) -> RegionSelection:
    _, h, w, _, _, radius = SHAPES[name]
    return select_regions(*args, grid=(h, w), radius=radius, backend=backend)


def check(name: str, device: torch.device, backend: str) -> float:
    """Number of values that differ from the reference."""
    args = inputs(name, device)
    pairs = zip(once(name, args, backend), once(name, args, "reference"), strict=True)
    return float(sum((x != y).sum().item() for x, y in pairs))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    args = inputs(name, device)
    return lambda: once(name, args, backend)
