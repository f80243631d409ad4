"""Prohibitive segmentation loss in plain torch; the definition of the op.

Letters: B batch, C foreground classes, K = C + 1 with background, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype

Terms = tuple[Tensor, Tensor, Tensor, Tensor]  # both losses [B], mask [B, H, W], counted pixels [B, 2]


@torch.no_grad()
def online_mask(logits: Tensor, log_weights: Tensor) -> Tensor:
    """argmax_k of w_k f_k, the first of those that tie: [B, K, H, W], [B, K] -> [B, H, W] uint8.

    ln(w_k f_k) is logit_k + ln w_k less what all classes of a pixel share. One addition in the dtype of `log_weights`
    leaves no room for rounding, so that every backend decides alike.
    """
    return (logits.to(log_weights.dtype) + log_weights[:, :, None, None]).argmax(1).to(torch.uint8)


def mean_loss(log_f: Tensor, target: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """J(f, Q) = -1/N sum ln f[Q(u)] over the N pixels u whose Q(u) is `allowed` [B, K]; (J [B], N [B])."""
    known = (target >= 0) & (target < log_f.shape[1])
    classes = torch.where(known, target, 0).long()
    counted = known & allowed.gather(1, classes.flatten(1)).view_as(known)
    picked = log_f.gather(1, classes.unsqueeze(1)).squeeze(1)
    count = counted.sum((1, 2))
    return -torch.where(counted, picked, 0).sum((1, 2)) / count.clamp(min=1), count


def psl_loss(logits: Tensor, log_weights: Tensor, labels: Tensor, present: Tensor, ignore_index: int) -> Terms:
    mask = online_mask(logits, log_weights)
    losses, counts = terms(logits, labels, mask, present, ignore_index)
    return *losses, mask, counts


def terms(
    logits: Tensor, labels: Tensor, mask: Tensor, present: Tensor, ignore_index: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(J(f, labels), J(f, mask)) and the pixels counted by each, [B, 2]."""
    log_f = logits.to(accumulate_dtype(logits)).log_softmax(1)
    allowed = torch.cat([present.new_ones(len(present), 1), present], 1)  # background is never prohibited
    labelled, labelled_count = mean_loss(log_f, torch.where(labels == ignore_index, -1, labels), allowed)
    online, online_count = mean_loss(log_f, mask, allowed)
    return (labelled, online), torch.stack([labelled_count, online_count], 1)
