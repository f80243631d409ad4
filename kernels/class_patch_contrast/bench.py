"""Benchmark cases of class_patch_contrast, forward and backward, at the shapes the trainer uses.

The peers are those of patch_token_contrast/bench.py: `eager` with int64 masks, `compile` the compiled reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.class_patch_contrast import reference
from kernels.class_patch_contrast.op import class_patch_contrast
from kernels.patch_token_contrast.bench import example, loss_and_gradient, worst_error

# name: (B, C, classes present in each image, N, D)
SHAPES = {
    "4x20x784x768, 3 present": (4, 20, 3, 784, 768),
    "4x20x784x768, all present": (4, 20, 20, 784, 768),
    "4x20x1600x768, 3 present": (4, 20, 3, 1600, 768),
    "8x80x256x384, 3 present": (8, 80, 3, 256, 384),
}
TOLERANCE = 1e-5  # relative L2 error of the gradient, and ten times the relative error of the loss


def inputs(case: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class tokens, patch tokens, labels, present; see the op."""
    b, c, count, n, d = SHAPES[case]
    tokens, labels = example(b, c + n, d, 0.1)
    present = torch.zeros(b, c)
    present[:, :count] = 1
    arguments = tokens[:, :c].contiguous(), tokens[:, c:].contiguous(), labels[:, c:].contiguous(), present
    return tuple(x.to(device) for x in arguments)


def check(case: str, device: torch.device, backend: str) -> float:
    """Error against the reference in fp64; see `TOLERANCE`."""
    z, f, *rest = inputs(case, device)
    got = loss_and_gradient(lambda x: class_patch_contrast(x, f, *rest, backend=backend), z)
    wide = f.double()
    want = loss_and_gradient(lambda x: class_patch_contrast(x, wide, *rest, backend="reference"), z.double())
    return worst_error(got, want)


def run(case: str, device: torch.device, backend: str) -> Callable:
    """A function without arguments that runs the op once, forward and backward."""
    z, *rest = inputs(case, device)
    return lambda: loss_and_gradient(lambda x: class_patch_contrast(x, *rest, backend=backend), z)


def eager(z: Tensor, f: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    classes = torch.arange(1, z.shape[1] + 1, device=z.device)[None, :, None]
    pairs = (labels.unsqueeze(1) == classes).long()
    skipped = (present <= 0).unsqueeze(2) | (labels == 255).unsqueeze(1)
    pairs[skipped] = 255
    similarity = (F.normalize(z, dim=-1, eps=reference.EPS) @ F.normalize(f, dim=-1, eps=reference.EPS).mT).abs()
    positive, negative = pairs == 1, pairs == 0
    attraction = 1 - (positive * similarity).sum() / (positive.sum() + 1)
    return 0.5 * attraction + 0.5 * (negative * similarity).sum() / (negative.sum() + 1)


def peers(case: str, device: torch.device) -> dict[str, Callable]:
    """name -> function without arguments: the same loss and gradient by others."""
    z, *rest = inputs(case, device)
    compiled = torch.compile(lambda x: reference.class_patch_contrast(x, *rest, 255))
    return {
        "eager": lambda: loss_and_gradient(lambda x: eager(x, *rest), z),
        "compile": lambda: loss_and_gradient(compiled, z),
    }


def cost(case: str) -> tuple[int, int]:
    """Unavoidable bytes (fp32 patches and present class tokens in, gradient out, int64 labels) and operations."""
    b, c, count, n, d = SHAPES[case]
    return b * (4 * d * (n + count + c) + 8 * n + 4 * c), 4 * b * count * n * d
