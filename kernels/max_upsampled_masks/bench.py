"""Benchmark cases of max_upsampled_masks, at the shapes the trainer uses; the peer is the reference, plain torch."""

from __future__ import annotations

import torch

from kernels.max_upsampled_masks.op import max_upsampled_masks
from kernels.select_regions.op import RegionSelection

# name: (B, h, w, pairs per image, members per pair, radius, with backward); 16 pixels per patch and side
SHAPES = {
    "4x28x28, 2x60 members r=5 backward": (4, 28, 28, 2, 60, 5.0, True),
    "4x28x28, 3x100 members": (4, 28, 28, 3, 100, None, False),
    "4x40x40, 2x100 members r=5 backward": (4, 40, 40, 2, 100, 5.0, True),
    "4x40x40, 3x150 members": (4, 40, 40, 3, 150, None, False),
}
TOLERANCE = 1e-5  # against fp64, maps in [0, 1]; the gradient, a sum over up to 1024 pixels, relative to its maximum


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, RegionSelection]:
    b, h, w, pairs, members, _, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(b, h * w, h * w, generator=make)
    chosen = torch.zeros(b * pairs, h * w, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(h * w, generator=make)[:members]] = True
    image = torch.arange(b).repeat_interleave(pairs)
    pair = torch.stack([image, torch.arange(pairs).repeat(b)], dim=1)
    return logits.to(device), RegionSelection(pair.to(device), chosen.to(device), None)


def once(name: str, logits: torch.Tensor, selection: RegionSelection, backend: str) -> list[torch.Tensor]:
    """The maps and, where the case says so, the gradient."""
    _, h, w, _, _, radius, backward = SHAPES[name]
    logits = logits.detach().requires_grad_(backward)
    out = max_upsampled_masks(
        logits, selection, grid=(h, w), size=(16 * h, 16 * w), radius=radius, backend=backend
    )
    return [out.detach(), *(torch.autograd.grad(out, logits, torch.ones_like(out)) if backward else ())]


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64, in units of the largest value."""
    logits, selection = inputs(name, device)
    got, want = once(name, logits, selection, backend), once(name, logits.double(), selection, "reference")
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    logits, selection = inputs(name, device)
    return lambda: once(name, logits, selection, backend)
