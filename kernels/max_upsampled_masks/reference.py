"""Maximum over upsampled member masks in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import accumulate_dtype, no_autocast
from kernels.radius_mask.reference import within

CHUNK_VALUES = 1 << 22  # upsampled values held at once: 16 MB of float32


def _masks(logits: Tensor, image: int, patches: Tensor, disc: Tensor | None) -> Tensor:
    """Probability masks [n, N] of the given patches of one image, in the accumulation dtype."""
    probability = torch.sigmoid(logits[image, patches].to(accumulate_dtype(logits)))
    return probability if disc is None else probability * disc[patches]


def axis_taps(num_in: int, num_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half-pixel bilinear taps of one axis: lower index, upper index (int64 [num_out]), their weights."""
    place = (torch.arange(num_out, device=like.device, dtype=like.dtype) + 0.5) * (num_in / num_out) - 0.5
    place = place.clamp_min(0)
    low = place.floor().long().clamp_max(num_in - 1)
    high = (low + 1).clamp_max(num_in - 1)
    weight = place - low
    return low, high, 1 - weight, weight


class MaxUpsampled(torch.autograd.Function):
    """Keeps the winning member of each pixel, not the upsampled masks."""

    @staticmethod
    def forward(ctx, logits, pairs, members, grid, size, radius):
        disc = None if radius is None else within(grid, radius, "euclidean", logits.device)
        out = logits.new_zeros((len(pairs), *size), dtype=accumulate_dtype(logits))
        winner = torch.full(out.shape, -1, dtype=torch.int32, device=logits.device)
        chunk = max(1, CHUNK_VALUES // max(1, size[0] * size[1]))
        for p, image in enumerate(pairs[:, 0].tolist()):
            chosen = members[p].nonzero().squeeze(1)
            for patches in chosen.split(chunk) if len(chosen) else ():
                masks = _masks(logits, image, patches, disc).view(-1, 1, *grid)
                with no_autocast(logits):
                    value, index = F.interpolate(masks, size, mode="bilinear").squeeze(1).max(dim=0)
                better = value > out[p]  # strictly: ties go to the lower patch, zeros to none
                out[p] = torch.where(better, value, out[p])
                winner[p] = torch.where(better, patches[index].int(), winner[p])
        ctx.save_for_backward(logits, pairs, winner, disc)
        ctx.grid, ctx.size = grid, size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, pairs, winner, disc = ctx.saved_tensors
        h, w = ctx.grid
        won = winner >= 0  # where the map is 0 the gradient is 0, whatever came in
        flow = torch.where(won, grad, 0).to(accumulate_dtype(logits))
        row = (pairs[:, :1, None] * (h * w) + winner.clamp_min(0)) * (h * w)
        y0, y1, wy0, wy1 = axis_taps(h, ctx.size[0], flow)
        x0, x1, wx0, wx1 = axis_taps(w, ctx.size[1], flow)
        total = flow.new_zeros(logits.numel())
        for ys, wy in ((y0, wy0), (y1, wy1)):
            for xs, wx in ((x0, wx0), (x1, wx1)):
                cell = row + (ys[:, None] * w + xs)
                # index_put_ adds in a fixed order on every device
                total.index_put_((cell.flatten(),), (flow * (wy[:, None] * wx)).flatten(), accumulate=True)
        total = total.view(logits.shape)
        probability = torch.sigmoid(logits.to(total.dtype))
        total = total * probability * (1 - probability)
        if disc is not None:
            total = total * disc
        return total.to(logits.dtype), None, None, None, None, None


def max_upsampled_masks(
    mask_logits: Tensor,
    pairs: Tensor,
    members: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    radius: float | None,
) -> Tensor:
    return MaxUpsampled.apply(mask_logits, pairs, members, grid, size, radius)
