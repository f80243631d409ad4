"""Class-patch contrast in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulate_dtype, no_autocast
from kernels.patch_token_contrast.reference import EPS, contrast


def class_patch_contrast(
    class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, present: Tensor, ignore_index: int
) -> Tensor:
    with no_autocast(class_tokens):
        dtype = accumulate_dtype(class_tokens, patch_tokens)
        z = F.normalize(class_tokens.to(dtype), dim=-1, eps=EPS)
        f = F.normalize(patch_tokens.detach().to(dtype), dim=-1, eps=EPS)
        similarity = (z @ f.transpose(1, 2)).abs()  # [B, C, N]
        own = labels.unsqueeze(1) == torch.arange(1, z.shape[1] + 1, device=labels.device)[None, :, None]
        pairs = (present > 0).unsqueeze(2) & (labels != ignore_index).unsqueeze(1)
        return contrast(similarity, pairs & own, pairs & ~own)
