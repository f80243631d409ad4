"""Benchmark cases of c2am_pool, at the shapes the trainer uses: layers 3 and 4 of a ResNet-50 at stride 16."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.c2am_pool.op import c2am_pool

# name: (B, D, h, w, with backward)
SHAPES = {
    "8x3072x28x28": (8, 3072, 28, 28, False),
    "8x3072x28x28 backward": (8, 3072, 28, 28, True),
    "32x3072x28x28": (32, 3072, 28, 28, False),
    "32x3072x28x28 backward": (32, 3072, 28, 28, True),
}
TOLERANCE = PEER_TOLERANCE = 1e-5  # against fp64, in units of the largest value


def inputs(name: str, device: torch.device) -> list[Tensor]:
    """Features as a ReLU leaves them, logits, and the gradients that come back."""
    b, d, h, w, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    features, logits = torch.randn(b, d, h, w, generator=make).relu(), torch.randn(b, 1, h, w, generator=make)
    return [x.to(device) for x in (features, logits, *torch.randn(2, b, d, generator=make))]


def once(name: str, function, features: Tensor, logits: Tensor, *flows: Tensor) -> list[Tensor]:
    """The two vectors and, where the case says so, the gradients."""
    backward = SHAPES[name][4]
    leaves = [x.detach().requires_grad_(backward) for x in (features, logits)]
    out = function(*leaves)
    return [*(x.detach() for x in out), *(torch.autograd.grad(out, leaves, flows) if backward else ())]


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64, in units of the largest value."""
    return _error(name, device, run(name, device, backend)())


@functools.cache
def _expected(name: str, device: torch.device) -> list[Tensor]:
    def one(tensors) -> list[Tensor]:  # image by image: all of them in fp64 take gigabytes
        return [x.float() for x in once(name, c2am_pool, *(t[None].double() for t in tensors))]

    results = [one(tensors) for tensors in zip(*inputs(name, device), strict=True)]
    return [torch.cat(x) for x in zip(*results, strict=True)]


def _error(name: str, device: torch.device, got: list[Tensor]) -> float:
    want = _expected(name, device)
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    tensors = inputs(name, device)
    return lambda: once(name, functools.partial(c2am_pool, backend=backend), *tensors)


def _research(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As published: features with the channels last, then a product each for q and 1 - q."""
    b, d, h, w = features.shape
    q = torch.sigmoid(logits).reshape(b, 1, h * w)
    x = features.reshape(b, d, h * w).permute(0, 2, 1).contiguous()
    return (torch.matmul(q, x) / (h * w)).reshape(b, d), (torch.matmul(1 - q, x) / (h * w)).reshape(b, d)


def _products(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same without moving the features."""
    q, x = torch.sigmoid(logits).flatten(1).unsqueeze(2), features.flatten(2)
    return (x @ q).squeeze(2) / q.shape[1], (x @ (1 - q)).squeeze(2) / q.shape[1]


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the published code; `two products`: cleaned up; `compile`: that, compiled."""
    tensors = inputs(name, device)
    forms = {"eager": _research, "two products": _products, "compile": torch.compile(_products)}
    return {key: functools.partial(once, name, function, *tensors) for key, function in forms.items()}


def peer_error(name: str, device: torch.device, peer: str, result: list[Tensor]) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Features in, with the gradient once more, and their gradient out; two products and two sums each way."""
    b, d, h, w, backward = SHAPES[name]
    values = b * d * h * w
    return 4 * values * (3 if backward else 1), 4 * values * (2 if backward else 1)
