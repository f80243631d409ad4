"""class_patch_contrast in Triton: the kernels of patch_token_contrast, with class tokens for rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gradient import fake_outputs, register_gradient
from kernels.patch_token_contrast.triton_impl import contrast


@torch.library.custom_op("wsss_triton::class_patch_contrast", mutates_args=())
def class_patch_contrast(
    class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, present: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return contrast(class_tokens, patch_tokens, labels, present, ignore_index, with_gradient)


@class_patch_contrast.register_fake
def _fake(class_tokens, patch_tokens, labels, present, ignore_index, with_gradient):
    return fake_outputs(class_tokens, with_gradient)


register_gradient("wsss_triton::class_patch_contrast")
