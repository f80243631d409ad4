"""Benchmark cases of radius_mask, at the shapes the trainer uses."""

from __future__ import annotations

import torch

from kernels.radius_mask import reference
from kernels.radius_mask.op import radius_mask

# name: (B, h, w, radius, with backward)
SHAPES = {
    "4x28x28 r=5": (4, 28, 28, 5.0, False),
    "4x28x28 r=5 backward": (4, 28, 28, 5.0, True),
    "4x40x40 r=5": (4, 40, 40, 5.0, False),
    "4x40x40 r=5 backward": (4, 40, 40, 5.0, True),
    "4x40x40 r=50": (4, 40, 40, 50.0, False),
}
TOLERANCE = PEER_TOLERANCE = 1e-6  # against fp64; the masks lie in [0, 1], the gradient in [0, 0.25]


def once(name: str, logits: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """The mask and, where the case says so, its gradient."""
    _, h, w, radius, backward = SHAPES[name]
    if not backward:
        return [radius_mask(logits, (h, w), radius, backend=backend)]
    logits = logits.detach().requires_grad_()
    out = radius_mask(logits, (h, w), radius, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, logits, torch.ones_like(out))]


def inputs(name: str, device: torch.device) -> torch.Tensor:
    b, h, w, _, _ = SHAPES[name]
    return torch.randn(b, h * w, h * w, generator=torch.Generator().manual_seed(0)).to(device)


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64; infinite if the sets of kept elements differ."""
    return _error(name, device, once(name, inputs(name, device), backend))


def _error(name: str, device: torch.device, got: list[torch.Tensor]) -> float:
    want = once(name, inputs(name, device).double(), "reference")
    if not torch.equal(got[0] > 0, want[0] > 0):
        return float("inf")
    return max((x - y).abs().max().item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    logits = inputs(name, device)
    return lambda: once(name, logits, backend)


def peers(name: str, device: torch.device) -> dict:
    """`eager`: sigmoid times a mask of floats, as published; `compile`: the same with a mask of bools, compiled. The
    masks are made beforehand, once."""
    _, h, w, radius, backward = SHAPES[name]
    logits, disc = inputs(name, device), reference.within((h, w), radius, "euclidean", device)
    floats = disc.float()

    def with_gradient(function):
        if not backward:
            return lambda: [function(logits)]

        def both() -> list[torch.Tensor]:
            leaf = logits.detach().requires_grad_()
            out = function(leaf)
            return [out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))]

        return both

    compiled = torch.compile(lambda x: torch.where(disc, x.sigmoid(), 0.0))
    return {"eager": with_gradient(lambda x: x.sigmoid() * floats), "compile": with_gradient(compiled)}


def peer_error(name: str, device: torch.device, peer: str, result: list[torch.Tensor]) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Logits in, masks out; with the gradient also that in and out. The sigmoid, 20 operations, inside the disc."""
    b, h, w, radius, backward = SHAPES[name]
    inside = int(reference.within((h, w), radius, "euclidean", torch.device("cpu")).sum())
    return (16 if backward else 8) * b * (h * w) ** 2, 20 * b * inside
