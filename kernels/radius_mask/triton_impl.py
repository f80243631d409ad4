"""radius_mask in Triton: one program per row of the mask matrix and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.radius_mask.op import register_gradient, register_second_gradient

BLOCK = 1024


@triton.jit
def _inside(row, column, width, patches, limit, CHEBYSHEV: tl.constexpr):
    """Which columns lie in the disc of the patch of this row."""
    patch = row % patches
    dy = column // width - patch // width
    dx = column % width - patch % width
    if CHEBYSHEV:
        near = tl.maximum(tl.abs(dy), tl.abs(dx)) <= limit
    else:
        near = dy * dy + dx * dx <= limit
    return near & (column < patches)


@triton.jit
def _forward_kernel(logits, out, width, patches, limit, CHEBYSHEV: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = _inside(row, column, width, patches, limit, CHEBYSHEV)
    place = row * patches + column
    x = tl.load(logits + place, mask=inside, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    value = tl.where(inside, 1.0 / (1.0 + tl.exp(-x)), 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=column < patches)


@triton.jit
def _backward_kernel(grad, out, result, width, patches, limit, CHEBYSHEV: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = _inside(row, column, width, patches, limit, CHEBYSHEV)
    place = row * patches + column
    g = tl.load(grad + place, mask=inside, other=0.0)
    y = tl.load(out + place, mask=inside, other=0.0)
    if g.dtype != tl.float64:
        g, y = g.to(tl.float32), y.to(tl.float32)
    value = tl.where(inside, g * (1.0 - y) * y, 0.0)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=column < patches)


def _launch(kernel, tensors: list[Tensor], h: int, w: int, limit: int, chebyshev: bool) -> Tensor:
    tensors = [x.contiguous() for x in tensors]
    out = torch.empty_like(tensors[0])
    if out.numel():
        programs = (out.shape[0] * h * w, triton.cdiv(h * w, BLOCK))
        kernel[programs](*tensors, out, w, h * w, limit, CHEBYSHEV=chebyshev, BLOCK=BLOCK)
    return out


@torch.library.custom_op("wsss_triton::radius_mask", mutates_args=())
def radius_mask(logits: Tensor, h: int, w: int, limit: int, chebyshev: bool) -> Tensor:
    return _launch(_forward_kernel, [logits], h, w, limit, chebyshev)


@torch.library.custom_op("wsss_triton::radius_mask_backward", mutates_args=())
def radius_mask_backward(grad: Tensor, out: Tensor, h: int, w: int, limit: int, chebyshev: bool) -> Tensor:
    return _launch(_backward_kernel, [grad, out], h, w, limit, chebyshev)


@radius_mask.register_fake
def _fake(logits, h, w, limit, chebyshev):
    return logits.new_empty(logits.shape)


@radius_mask_backward.register_fake
def _fake_backward(grad, out, h, w, limit, chebyshev):
    return out.new_empty(out.shape)


register_gradient("wsss_triton::radius_mask", radius_mask_backward)
register_second_gradient("wsss_triton::radius_mask_backward", radius_mask_backward)
