"""Patch-token contrast in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulate_dtype, no_autocast

EPS = 1e-8


def contrast(similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """1/2 (1 - mean of the positives) + 1/2 mean of the negatives, each count (int64) plus one."""
    num_pos, num_neg = positive.sum(), negative.sum()
    zero = similarity.new_zeros(())
    pos = torch.where(positive, similarity, zero).sum() / (num_pos + 1)
    neg = torch.where(negative, similarity, zero).sum() / (num_neg + 1)
    return 0.5 * (1 - pos) + 0.5 * neg


def pair_sets(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """labels [B, N] -> positive and negative pairs, bool [B, N, N]; a patch and itself are no pair."""
    valid = labels != ignore_index
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    pairs = pairs & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    equal = labels.unsqueeze(2) == labels.unsqueeze(1)
    return pairs & equal, pairs & ~equal


def patch_token_contrast(tokens: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    with no_autocast(tokens):
        unit = F.normalize(tokens.to(accumulate_dtype(tokens)), dim=-1, eps=EPS)
        similarity = (unit @ unit.transpose(1, 2)).abs()
        return contrast(similarity, *pair_sets(labels, ignore_index))
