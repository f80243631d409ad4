"""Foreground and background vectors of C²AM in plain torch; the definition of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype, no_autocast


def c2am_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """features [B, D, N], logits [B, N] -> two [B, D]."""
    q = logits.sigmoid()
    weights = torch.stack([q, 1 - q], dim=2) / q.shape[1]
    with no_autocast(features):
        foreground, background = (features.to(accumulate_dtype(features)) @ weights).unbind(2)  # one read
    return foreground, background
