"""Patch-token contrast (PTC): patches of one class look alike, patches of two classes do not."""

from __future__ import annotations

from torch import Tensor

from kernels import checks
from kernels.backend import choose, register
from kernels.patch_token_contrast import reference

register("patch_token_contrast", reference=reference.patch_token_contrast)


def patch_token_contrast(
    tokens: Tensor, labels: Tensor, *, ignore_index: int = 255, backend: str | None = None
) -> Tensor:
    """1/2 (1 - sum_pos s / (n_pos + 1)) + 1/2 sum_neg s / (n_neg + 1) with s = |cos| of two patches of one image.

    tokens  [B, N, D] patch tokens, fp32, bf16, fp16 or fp64.
    labels  [B, N] integers: class of each patch (0 is background), `ignore_index` = no pair with this patch.
    Returns a scalar float32 (float64 for float64 tokens); sums and counts run over the whole batch. Differentiable in
    `tokens`. Without any pair it is exactly 0.5 with zero gradient.
    Raises ValueError or TypeError for a wrong shape, dtype or device.
    Source: ToCo (Ru et al., CVPR 2023), equation 4.
    """
    checks.shape("patch_token_contrast", "tokens", tokens, "B", "N", "D")
    checks.shape("patch_token_contrast", "labels", labels, tokens.shape[0], tokens.shape[1])
    checks.floating("patch_token_contrast", tokens=tokens)
    checks.integral("patch_token_contrast", labels=labels)
    checks.same_device("patch_token_contrast", tokens=tokens, labels=labels)
    return choose("patch_token_contrast", tokens.device, backend)(tokens, labels, ignore_index)
