"""Benchmark cases of patch_token_contrast, forward and backward, at the shapes the trainer uses.

`peers` holds what others run: `eager` the steps of ToCo's research code (an int64 label matrix of all pairs), `compile`
the reference of this package, with boolean masks, under torch.compile. All but one case let every patch take part,
since the native op leaves ignored patches out of its products and the peers do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.patch_token_contrast import reference
from kernels.patch_token_contrast.op import patch_token_contrast

# name: (B, N, D, part of the patches that is ignored)
SHAPES = {
    "4x784x768": (4, 784, 768, 0.0),
    "4x784x768 30% ignored": (4, 784, 768, 0.3),
    "4x1600x768": (4, 1600, 768, 0.0),
    "8x256x384": (8, 256, 384, 0.0),
}
TOLERANCE = 1e-5  # relative L2 error of the gradient, and ten times the relative error of the loss


def example(b: int, n: int, d: int, ignored: float) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] whose cosines are of both signs, none near 0 where |cos| has its kink; labels [B, N] of four."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    sign = torch.where(uniform(b, n, 1) < 0.6, 1.0, -1.0)
    noise = torch.randn(b, n, d, generator=generator)
    tokens = sign * torch.randn(d, generator=generator) + 0.7 * noise
    labels = (4 * uniform(b, n)).long()
    return tokens, torch.where(uniform(b, n) < ignored, 255, labels)


def inputs(case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, labels = example(*SHAPES[case])
    return tokens.to(device), labels.to(device)


def loss_and_gradient(function: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tokens.detach().requires_grad_()
    loss = function(tokens)
    return loss.detach(), torch.autograd.grad(loss, tokens)[0]


def worst_error(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """In the units of TOLERANCE."""
    loss = 10 * ((got[0].double() - want[0]).abs() / want[0]).item()
    return max(loss, ((got[1].double() - want[1]).norm() / want[1].norm()).item())


def check(case: str, device: torch.device, backend: str) -> float:
    """Error against the reference in fp64; see `TOLERANCE`."""
    tokens, labels = inputs(case, device)
    got = loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend=backend), tokens)
    want = loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend="reference"), tokens.double())
    return worst_error(got, want)


def run(case: str, device: torch.device, backend: str) -> Callable:
    """A function without arguments that runs the op once, forward and backward."""
    tokens, labels = inputs(case, device)
    return lambda: loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend=backend), tokens)


def affinity_labels(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """int64 [B, N, N]: 1 equal labels, 0 different ones, `ignore_index` no pair."""
    rows = labels.unsqueeze(1).repeat(1, labels.shape[1], 1)
    pairs = (rows == rows.mT).long()
    for image, row in zip(pairs, labels, strict=True):
        image[:, row == ignore_index] = ignore_index
        image[row == ignore_index] = ignore_index
    diagonal = torch.arange(labels.shape[1], device=labels.device)
    pairs[:, diagonal, diagonal] = ignore_index
    return pairs


def eager(tokens: Tensor, labels: Tensor) -> Tensor:
    pairs = affinity_labels(labels)
    unit = F.normalize(tokens, dim=-1, eps=reference.EPS)
    similarity = (unit @ unit.mT).abs()
    positive, negative = pairs == 1, pairs == 0
    attraction = 1 - (positive * similarity).sum() / (positive.sum() + 1)
    return 0.5 * attraction + 0.5 * (negative * similarity).sum() / (negative.sum() + 1)


def peers(case: str, device: torch.device) -> dict[str, Callable]:
    """name -> function without arguments: the same loss and gradient by others."""
    tokens, labels = inputs(case, device)
    compiled = torch.compile(lambda x: reference.patch_token_contrast(x, labels, 255))
    return {
        "eager": lambda: loss_and_gradient(lambda x: eager(x, labels), tokens),
        "compile": lambda: loss_and_gradient(compiled, tokens),
    }


def cost(case: str) -> tuple[int, int]:
    """Unavoidable bytes (fp32 tokens in, gradient out, int64 labels) and operations (half of S = X X^T, all of W X)."""
    b, n, d, ignored = SHAPES[case]
    valid = round(n * (1 - ignored))
    return b * n * (8 * d + 8), 3 * b * valid * valid * d
