"""Class-patch contrast: the token of a class looks like the patches of that class, and like no others."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.class_patch_contrast import reference
from kernels.gradient import fake_outputs, register_gradient, wanted

_OP = "class_patch_contrast"


def _native(class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, present: Tensor, ignore_index: int) -> Tensor:
    run = torch.ops.wsss.class_patch_contrast
    return run(class_tokens, patch_tokens.detach(), labels, present > 0, ignore_index, wanted(class_tokens))[0]


def _triton(class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, present: Tensor, ignore_index: int) -> Tensor:
    from kernels.class_patch_contrast import triton_impl  # needs the triton package

    run = triton_impl.class_patch_contrast
    return run(class_tokens, patch_tokens.detach(), labels, present > 0, ignore_index, wanted(class_tokens))[0]


if native_problem(_OP) is None:

    @torch.library.register_fake("wsss::class_patch_contrast")
    def _fake(class_tokens, patch_tokens, labels, present, ignore_index, with_gradient):
        return fake_outputs(class_tokens, with_gradient)

    register_gradient("wsss::class_patch_contrast")


register(_OP, reference=reference.class_patch_contrast, native=_native, triton=_triton)


def class_patch_contrast(
    class_tokens: Tensor,
    patch_tokens: Tensor,
    labels: Tensor,
    present: Tensor,
    *,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """1/2 (1 - sum_pos s / (n_pos + 1)) + 1/2 sum_neg s / (n_neg + 1) with s = |cos(class token, patch token)|.

    class_tokens  [B, C, D], fp32, bf16, fp16 or fp64 (the reference alone).
    patch_tokens  [B, N, D]; a constant, no gradient reaches it.
    labels        [B, N] integers: 0 background, c + 1 for class c, `ignore_index` = patch skipped.
    present       [B, C] bool or number, > 0 where the image has the class; absent classes are skipped.
    Returns a scalar float32 (float64 for float64 tokens), differentiable in `class_tokens`; 0.5 without any pair.
    Raises ValueError or TypeError for a wrong shape, dtype or device.
    Source: PCRE (CVPR 2025), class-prototype enhancement, token loss.
    """
    checks.shape(_OP, "class_tokens", class_tokens, "B", "C", "D")
    b, c, d = class_tokens.shape
    checks.shape(_OP, "patch_tokens", patch_tokens, b, "N", d)
    checks.shape(_OP, "labels", labels, b, patch_tokens.shape[1])
    checks.shape(_OP, "present", present, b, c)
    checks.floating(_OP, class_tokens=class_tokens, patch_tokens=patch_tokens)
    checks.integral(_OP, labels=labels)
    checks.same_device(_OP, class_tokens=class_tokens, patch_tokens=patch_tokens, labels=labels, present=present)
    only_reference = torch.float64 in (class_tokens.dtype, patch_tokens.dtype)
    run = choose(_OP, class_tokens.device, backend, pass_over=("native", "triton") if only_reference else ())
    return run(class_tokens, patch_tokens, labels, present, ignore_index)
