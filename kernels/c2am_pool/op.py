"""C²AM pooling: one vector of the foreground and one of the background per image."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.c2am_pool import reference


def _native(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.wsss.c2am_pool(features, logits)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad_foreground, grad_background):
    return torch.ops.wsss.c2am_pool_backward(grad_foreground, grad_background, *ctx.saved_tensors)


def _second_gradient(ctx, *grads):
    raise RuntimeError("c2am_pool: the gradient itself is not differentiable")


if native_problem("c2am_pool") is None:

    @torch.library.register_fake("wsss::c2am_pool")
    def _fake(features, logits):
        return logits.new_empty(features.shape[:2]), logits.new_empty(features.shape[:2])

    @torch.library.register_fake("wsss::c2am_pool_backward")
    def _fake_backward(grad_foreground, grad_background, features, logits):
        return features.new_empty(features.shape), logits.new_empty(logits.shape)

    torch.library.register_autograd("wsss::c2am_pool", _gradient, setup_context=_setup)
    torch.library.register_autograd("wsss::c2am_pool_backward", _second_gradient)


register("c2am_pool", reference=reference.c2am_pool, native=_native)


def c2am_pool(features: Tensor, logits: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Means of the features weighted by q = sigmoid(logits) and by 1 - q: v_f = mean_p q F, v_b = mean_p (1 - q) F.

    features  [B, D, h, w], h * w >= 1; fp32, bf16, fp16 or fp64.
    logits    [B, 1, h, w] of the foreground.
    Returns (foreground [B, D], background [B, D]), float32 (float64 if one of the inputs is). Differentiable in both
    inputs; the features are read once forward and once backward.
    Raises ValueError or TypeError for a wrong shape, dtype or device.
    Source: C²AM (Xie et al., CVPR 2022), equation 1.
    """
    checks.shape("c2am_pool", "features", features, "B", "D", "h", "w")
    b, _, h, w = features.shape
    checks.shape("c2am_pool", "logits", logits, b, 1, h, w)
    checks.floating("c2am_pool", features=features, logits=logits)
    checks.same_device("c2am_pool", features=features, logits=logits)
    if h * w == 0:
        raise ValueError(f"c2am_pool: features must have h * w >= 1, got {tuple(features.shape)}")
    dtype = checks.accumulate_dtype(features, logits)
    if dtype == torch.float64:
        features = features.to(dtype)
    run = choose("c2am_pool", features.device, backend)
    return run(features.flatten(2), logits.flatten(1).to(dtype))
