"""Patch-token contrast (PTC): patches of one class look alike, patches of two classes do not."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.gradient import fake_outputs, register_gradient, wanted
from kernels.patch_token_contrast import reference


def _native(tokens: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return torch.ops.wsss.patch_token_contrast(tokens, labels, ignore_index, wanted(tokens))[0]


def _triton(tokens: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    from kernels.patch_token_contrast import triton_impl  # needs the triton package

    return triton_impl.patch_token_contrast(tokens, labels, ignore_index, wanted(tokens))[0]


if native_problem("patch_token_contrast") is None:

    @torch.library.register_fake("wsss::patch_token_contrast")
    def _fake(tokens, labels, ignore_index, with_gradient):
        return fake_outputs(tokens, with_gradient)

    register_gradient("wsss::patch_token_contrast")


register("patch_token_contrast", reference=reference.patch_token_contrast, native=_native, triton=_triton)


def patch_token_contrast(
    tokens: Tensor, labels: Tensor, *, ignore_index: int = 255, backend: str | None = None
) -> Tensor:
    """1/2 (1 - sum_pos s / (n_pos + 1)) + 1/2 sum_neg s / (n_neg + 1) with s = |cos| of two patches of one image.

    tokens  [B, N, D] patch tokens, fp32, bf16, fp16 or fp64 (the reference alone).
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
    skipped = ("native", "triton") if tokens.dtype == torch.float64 else ()
    run = choose("patch_token_contrast", tokens.device, backend, pass_over=skipped)
    return run(tokens, labels, ignore_index)
