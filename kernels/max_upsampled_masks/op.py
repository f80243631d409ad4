"""One map per (image, class) pair: the maximum over its members' masks at pixel size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.max_upsampled_masks import reference
from kernels.radius_mask.op import disc_limit
from kernels.select_regions.op import RegionSelection


def _native(
    mask_logits: Tensor,
    pairs: Tensor,
    members: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    radius: float | None,
) -> Tensor:
    return torch.ops.wsss.max_upsampled_masks(mask_logits, pairs, members, *grid, *size, disc_limit(radius))[0]


def _setup(ctx, inputs, output):
    mask_logits, pairs, members, h, w, _, _, limit = inputs
    ctx.save_for_backward(output[1], mask_logits, pairs, members)
    ctx.geometry = h, w, limit


def _gradient(ctx, grad, _):
    result = torch.ops.wsss.max_upsampled_masks_backward(grad, *ctx.saved_tensors, *ctx.geometry)
    return result, None, None, None, None, None, None, None


def _second_gradient(ctx, grad):
    raise RuntimeError("max_upsampled_masks: the gradient itself is not differentiable")


if native_problem("max_upsampled_masks") is None:

    @torch.library.register_fake("wsss::max_upsampled_masks")
    def _fake(mask_logits, pairs, members, h, w, out_h, out_w, limit):
        shape = (pairs.shape[0], out_h, out_w)
        value = mask_logits.new_empty(shape, dtype=checks.accumulate_dtype(mask_logits))
        return value, mask_logits.new_empty(shape, dtype=torch.int32)

    @torch.library.register_fake("wsss::max_upsampled_masks_backward")
    def _fake_backward(grad, winner, mask_logits, pairs, members, h, w, limit):
        return mask_logits.new_empty(mask_logits.shape)

    torch.library.register_autograd("wsss::max_upsampled_masks", _gradient, setup_context=_setup)
    torch.library.register_autograd("wsss::max_upsampled_masks_backward", _second_gradient)


register("max_upsampled_masks", reference=reference.max_upsampled_masks, native=_native)


def max_upsampled_masks(
    mask_logits: Tensor,
    selection: RegionSelection,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    radius: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """max over the members k of a pair of the bilinear upsampling of sigmoid(mask_logits[k]).

    mask_logits  [B, N, N] as given to `select_regions`; fp32, bf16, fp16 or fp64.
    selection    pairs [P, 2] and members [P, N] are used.
    grid         (h, w), h * w = N.
    size         (Ho, Wo) of the maps in pixels; half-pixel centres, edges clamped.
    radius       each mask is cut to this disc (grid units) first; None: no disc.
    Returns [P, Ho, Wo] float32 (float64 for float64 logits) in [0, 1]; a pair without members gives zeros.
    Differentiable in `mask_logits`: the gradient of a pixel goes to its winning member (ties: lowest patch), and is
    exactly 0 where the map is 0. Memory beyond the output is bounded, whatever the number of members.
    Raises ValueError or TypeError for a wrong shape, dtype, device or range.
    Source: PCRE (CVPR 2025), combination of the expanded masks.
    """
    checks.shape("max_upsampled_masks", "mask_logits", mask_logits, "B", "N", "N")
    n = mask_logits.shape[1]
    checks.shape("max_upsampled_masks", "mask_logits", mask_logits, "B", n, n)
    checks.shape("max_upsampled_masks", "selection.pairs", selection.pairs, "P", 2)
    checks.shape("max_upsampled_masks", "selection.members", selection.members, selection.pairs.shape[0], n)
    checks.floating("max_upsampled_masks", mask_logits=mask_logits)
    checks.same_device("max_upsampled_masks", mask_logits=mask_logits, members=selection.members)
    grid = checks.grid("max_upsampled_masks", grid, n)
    size = (int(size[0]), int(size[1]))
    if min(size) < 1:
        raise ValueError(f"max_upsampled_masks: size must be (Ho, Wo), each >= 1, got {size}")
    if radius is not None:
        checks.number("max_upsampled_masks", "radius", radius, low=0.0)
    run = choose("max_upsampled_masks", mask_logits.device, backend)
    return run(mask_logits, selection.pairs, selection.members, grid, size, radius)
