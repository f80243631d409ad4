"""Benchmark cases of dense_energy, value and gradient, at half the size of the crops the trainer uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dense_energy.op import dense_energy

# name: (B, K, H, W)
SHAPES = {
    "2x12x224": (2, 12, 224, 224),
    "4x21x448": (4, 21, 448, 448),
    "2x81x448": (2, 81, 448, 448),
}
TOLERANCE = 1e-4  # share of the largest gradient, against fp64; at ties of the lattice cells fp32 may take the other


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Smooth probabilities over a smooth image with noise; a third of the pixels unlabelled."""
    b, k, h, w = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    probs = F.interpolate(3 * torch.randn(b, k, 9, 9, generator=make), (h, w), mode="bilinear").softmax(1)
    image = 220 * F.interpolate(torch.rand(b, 3, 7, 7, generator=make), (h, w), mode="bilinear")
    image = (image + 12 * torch.rand(b, 3, h, w, generator=make)).round()
    labels = probs.argmax(1)
    labels[:, : h // 3] = 255
    return tuple(x.to(device) for x in (probs, image, torch.ones(b, h, w), labels))


def _gradient(probs: torch.Tensor, *args: torch.Tensor, backend: str) -> torch.Tensor:
    probs = probs.detach().requires_grad_()
    dense_energy(probs, *args, backend=backend).backward()
    return probs.grad


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference of the gradient from the reference in fp64, as a share of the largest gradient."""
    probs, *rest = inputs(name, device)
    want = _gradient(probs.double(), *rest, backend="reference")
    return ((_gradient(probs, *rest, backend=backend) - want).abs().max() / want.abs().max()).item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that computes value and gradient once."""
    probs, *rest = inputs(name, device)
    return lambda: _gradient(probs, *rest, backend=backend)
