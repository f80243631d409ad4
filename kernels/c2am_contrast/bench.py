"""Benchmark cases of c2am_contrast, at the shapes the trainer uses, after gathering over the ranks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.c2am_contrast.op import c2am_contrast

# name: (B, D); with the gradient
SHAPES = {"32x3072": (32, 3072), "128x3072": (128, 3072)}
# Against fp64, relative to the largest value. Where two cosines of a row agree to fp32, their ranks may be swapped, and
# with them the weights of two pairs in the gradient.
TOLERANCE = PEER_TOLERANCE = 1e-3


def inputs(name: str, device: torch.device) -> Tensor:
    """Vectors [2, B, D] as pooling leaves them: positive, so that few cosines are clipped."""
    b, d = SHAPES[name]
    return torch.rand(2, b, d, generator=torch.Generator().manual_seed(0)).to(device)


def once(function, vectors: Tensor) -> list[Tensor]:
    """The three terms and the gradient of their sum."""
    leaf = vectors.detach().requires_grad_()
    terms = torch.stack(function(*leaf))
    return [terms.detach(), *torch.autograd.grad(terms.sum(), leaf)]


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64, in units of the largest value."""
    return _error(name, device, run(name, device, backend)())


@functools.cache
def _expected(name: str, device: torch.device) -> list[Tensor]:
    return once(c2am_contrast, inputs(name, device).double())


def _error(name: str, device: torch.device, got: list[Tensor] | None) -> float | None:
    if got is None:
        return None
    want = _expected(name, device)
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    vectors = inputs(name, device)
    return lambda: once(functools.partial(c2am_contrast, backend=backend), vectors)


def _research(foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As published: each loss by itself, ranks by two sorts, negative losses set to 0."""

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(F.normalize(x, dim=1), F.normalize(y, dim=1).T).clamp(min=0.0005, max=0.9995)

    def pull(x: Tensor) -> Tensor:
        s = similarity(x, x)
        loss = -torch.log(s)
        loss[loss < 0] = 0
        _, order = s.sort(descending=True, dim=1)
        _, rank = order.sort(dim=1)
        return torch.mean(loss * torch.exp(-(rank - 1).float() * 0.25))

    return pull(foreground), pull(background), torch.mean(-torch.log(1 - similarity(background, foreground)))


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the published code. `products alone`: the three matrix products and their gradients, no more."""
    vectors = inputs(name, device)
    weight = torch.ones(len(vectors[0]), len(vectors[0]), device=device)

    def products() -> None:
        foreground, background = vectors.detach().requires_grad_().unbind(0)
        outs = [foreground @ foreground.T, background @ background.T, background @ foreground.T]
        torch.autograd.grad(outs, (foreground, background), [weight] * 3)

    return {"eager": lambda: once(_research, vectors), "products alone": products}


def peer_error(name: str, device: torch.device, peer: str, result: list[Tensor] | None) -> float | None:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Vectors in, gradients out; three products, one of their gradients for each factor that differs."""
    b, d = SHAPES[name]
    return 4 * 4 * b * d, 2 * b * b * d * (3 + 4)
