"""Benchmark cases of psl_loss, forward and backward. The method trains at 41: a crop of 321 at stride 8.

The peer `eager` is the paper's text in plain PyTorch: softmax, weights, argmax, two cross-entropies of which each makes
its log-softmax. `compile` is the reference, compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.psl_loss import reference
from kernels.psl_loss.op import psl_loss

# name: (B, K, H, W)
SHAPES = {
    f"{b}x{k}x{size}x{size}": (b, k, size, size)
    for b, k, size in ((30, 21, 41), (8, 81, 64), (8, 21, 81), (8, 21, 161), (8, 21, 321))
}
TOLERANCE = 1e-5  # relative L2 error of the losses and of the gradient
PEER_TOLERANCE = 1e-2  # the product w f may round a pixel at a tie to the other class

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(case: str, device: torch.device) -> Inputs:
    """Logits: hills and noise, high where the labels say so. Labels: boxes of background and two of three present
    classes, parts of them ignored. Confidences: those of a softmax that favours what is present."""
    b, k, h, w = SHAPES[case]
    make = torch.Generator().manual_seed(0)
    present = torch.rand(b, k - 1, generator=make).argsort(1).argsort(1) < min(3, k - 1)
    confidences = (torch.randn(b, k - 1, generator=make) + 4 * present).softmax(1)
    choice = torch.cat([torch.zeros(b, 3, dtype=torch.int64), 1 + present.long().topk(min(3, k - 1)).indices], 1)
    coarse = torch.randint(0, min(5, choice.shape[1]), (b, 36), generator=make)
    coarse = choice.gather(1, coarse).view(b, 1, 6, 6).float()
    labels = F.interpolate(coarse, (h, w), mode="nearest")[:, 0].long()
    hills = 2 * F.interpolate(torch.randn(b, k, 9, 9, generator=make), (h, w), mode="bilinear")
    logits = hills + 0.5 * torch.randn(b, k, h, w, generator=make) + 3 * F.one_hot(labels, k).movedim(-1, 1)
    unsure = F.interpolate(torch.rand(b, 1, 9, 9, generator=make), (h, w), mode="bilinear")[:, 0] > 0.6
    return tuple(x.to(device) for x in (logits, confidences, torch.where(unsure, 255, labels), present))


def loss_and_gradient(function: Callable, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses [2, B] and the gradient of their mean over the batch; `function`: logits -> both losses."""
    leaf = logits.detach().requires_grad_()
    losses = torch.stack(function(leaf))
    (gradient,) = torch.autograd.grad(losses.sum() / losses.shape[1], leaf)
    return losses.detach(), gradient


@functools.cache
def expected(case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """In fp64, but for the mask: that is decided in fp32."""
    logits, confidences, labels, present = inputs(case, device)
    mask = psl_loss(logits, confidences, labels, present, backend="reference").mask
    return loss_and_gradient(lambda x: reference.terms(x, labels, mask, present, 255)[0], logits.double())


def worst_error(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True))


def check(case: str, device: torch.device, backend: str) -> float:
    """Error against the reference in fp64; see `TOLERANCE`."""
    return worst_error(run(case, device, backend)(), expected(case, device))


def run(case: str, device: torch.device, backend: str) -> Callable:
    """A function without arguments that runs the op once, forward and backward."""
    logits, *rest = inputs(case, device)
    return lambda: loss_and_gradient(lambda x: psl_loss(x, *rest, backend=backend)[:2], logits)


def eager(logits: Tensor, confidences: Tensor, labels: Tensor, present: Tensor) -> list[Tensor]:
    with torch.no_grad():
        f = logits.softmax(1)
        f[:, 1:] *= confidences[:, :, None, None]
        mask = f.argmax(1)
        prohibited = torch.cat([torch.zeros_like(present[:, :1]), ~present], 1).float()
        prohibited = F.pad(prohibited, (0, 256 - prohibited.shape[1]))
        allowed = [torch.where(prohibited.gather(1, q.flatten(1)).view_as(q) > 0, 255, q) for q in (labels, mask)]
    losses = (F.cross_entropy(logits, q, ignore_index=255, reduction="none").sum((1, 2)) for q in allowed)
    return [loss / (q != 255).sum((1, 2)).clamp(min=1) for loss, q in zip(losses, allowed, strict=True)]


def peers(case: str, device: torch.device) -> dict[str, Callable]:
    """name -> function without arguments: the same losses and gradient by others."""
    logits, *rest = inputs(case, device)
    compiled = torch.compile(lambda x: psl_loss(x, *rest, backend="reference")[:2])
    return {
        "eager": lambda: loss_and_gradient(lambda x: eager(x, *rest), logits),
        "compile": lambda: loss_and_gradient(compiled, logits),
    }


def peer_error(case: str, device: torch.device, peer: str, result: tuple[Tensor, Tensor]) -> float:
    return worst_error(result, expected(case, device))


def cost(case: str) -> tuple[int, int]:
    """Logits in, gradient out, int64 labels in, the mask out and in; about 25 operations for each logit."""
    b, k, h, w = SHAPES[case]
    pixels = b * h * w
    return (2 * 4 * k + 8 + 2) * pixels, 25 * k * pixels
