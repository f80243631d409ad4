"""Bytes that single operations take for themselves on a GPU while they run, where these are not small.

Read off the sources: csrc/par/par_host.cpp, csrc/cuda_memory.h, csrc/select_regions/select_regions_host.cpp,
kernels/dense_energy/reference.py, and flash attention's fp32 sum of the gradient of the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels  # noqa: F401  registers the operators

FLOAT = 4
PAR_WEIGHTS, LATTICE_FLOATS, REGION_BYTES = 1 << 26, 1 << 28, 1 << 26


def scratch(func: Any, args: tuple) -> int:
    """Bytes of one operation, 0 for most.

    Args:
        func: an overload such as torch.ops.wsss.par.default.
        args: what it is called with.
    """
    return _OWN[func](*args) if func in _OWN else 0


def _par(image: Tensor, maps: Tensor, dilations: list[int], *_: Any) -> int:
    batch, classes, h, w = maps.shape
    taps = 8 * len(dilations)
    images = min(batch, max(1, PAR_WEIGHTS // (taps * h * w)))
    return FLOAT * images * (taps + classes) * h * w


def _dense_energy(probs: Tensor, image: Tensor, *_: Any) -> int:
    """The lattice of some images, and shrunk planes, planes inside the box and sums, of which the CPU keeps none."""
    batch, classes, pixels = len(probs), probs.shape[1], image.shape[-2] * image.shape[-1]
    images = min(batch, max(1, LATTICE_FLOATS // (pixels * (classes + 64))))
    return FLOAT * pixels * (images * (classes + 64) + 3 * batch * classes)


def _select_regions(mask_logits: Tensor, scores: Tensor, pairs: Tensor, *rest: Any) -> int:
    images, n, _ = scores.shape
    return FLOAT * images * n + min(REGION_BYTES, len(pairs) * rest[-1] * n // 8)


def _attention_backward(grad: Tensor, query: Tensor, *_: Any) -> int:
    return FLOAT * query.numel() if query.dtype == torch.bfloat16 else 0


def _table() -> dict[Any, Callable[..., int]]:
    found = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward}
    for name, own in (("par", _par), ("dense_energy", _dense_energy), ("select_regions", _select_regions)):
        if hasattr(torch.ops.wsss, name):
            found[getattr(torch.ops.wsss, name).default] = own
    return found


_OWN = _table()
