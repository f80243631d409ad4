"""Region-radius masking: each patch's mask is cut to the disc around the patch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.radius_mask import reference

NO_LIMIT = 2**62  # above every squared distance


def disc_limit(radius: float | None, metric: str = "euclidean") -> int:
    """The disc of `reference.near` in integers: the largest squared distance (chebyshev: distance) inside it.

    -1 if not even the centre is inside; NO_LIMIT for None, no disc.
    """
    if radius is None:
        return NO_LIMIT
    if metric == "euclidean":
        bound = radius * radius + reference.SLACK
    elif metric == "euclidean_open":
        bound = math.ceil(min(radius * radius - reference.SLACK, NO_LIMIT)) - 1
    else:
        bound = radius + reference.SLACK
    return math.floor(min(bound, NO_LIMIT))


def _native(logits: Tensor, grid: tuple[int, int], radius: float, metric: str) -> Tensor:
    return torch.ops.wsss.radius_mask(logits, *grid, disc_limit(radius, metric), metric == "chebyshev")


def _triton(logits: Tensor, grid: tuple[int, int], radius: float, metric: str) -> Tensor:
    from kernels.radius_mask import triton_impl  # needs the triton package

    return triton_impl.radius_mask(logits, *grid, disc_limit(radius, metric), metric == "chebyshev")


def register_gradient(forward: str, backward) -> None:
    """Autograd of an op (logits, h, w, limit, chebyshev) whose gradient `backward(grad, out, ...)` needs the result."""

    def setup(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.disc = inputs[1:]

    def gradient(ctx, grad):
        (out,) = ctx.saved_tensors
        return backward(grad, out, *ctx.disc), None, None, None, None

    torch.library.register_autograd(forward, gradient, setup_context=setup)


def register_second_gradient(name: str, backward) -> None:
    """Autograd of `backward`, the op called `name`: grad * out * (1 - out)."""

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.disc = inputs[2:]

    def gradient(ctx, grad):
        first, out = ctx.saved_tensors
        # Not cut to the disc: `out` came from the forward op, whose own gradient does that.
        return backward(grad, out, *ctx.disc), grad * first * (1 - 2 * out), None, None, None, None

    torch.library.register_autograd(name, gradient, setup_context=setup)


if native_problem("radius_mask") is None:

    @torch.library.register_fake("wsss::radius_mask")
    def _fake(logits, h, w, limit, chebyshev):
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("wsss::radius_mask_backward")
    def _fake_backward(grad, out, h, w, limit, chebyshev):
        return out.new_empty(out.shape)

    register_gradient("wsss::radius_mask", torch.ops.wsss.radius_mask_backward)
    register_second_gradient("wsss::radius_mask_backward", torch.ops.wsss.radius_mask_backward)


register("radius_mask", reference=reference.radius_mask, native=_native, triton=_triton)


def check_metric(op: str, metric: str) -> None:
    if metric not in reference.METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(reference.METRICS)}, got {metric!r}")


def radius_mask(
    logits: Tensor, grid: tuple[int, int], radius: float, *, metric: str = "euclidean", backend: str | None = None
) -> Tensor:
    """sigmoid(logits) where two patches are within the radius, exactly 0 elsewhere.

    logits  [B, N, N], row i is the mask (or affinity) of patch i; fp32, bf16, fp16 or fp64.
    grid    (h, w) with h * w = N, patches row-major.
    radius  grid units, >= 0, real; no gradient reaches it.
    metric  "euclidean" (distance <= radius, PCRE), "euclidean_open" (< radius, IRN), "chebyshev" (<= radius, AFA).
    Returns [B, N, N] in the dtype of `logits`, differentiable in `logits`.
    Raises ValueError or TypeError for a wrong shape, dtype, radius or metric.
    Source: PCRE (CVPR 2025), equation 5.
    """
    checks.shape("radius_mask", "logits", logits, "B", "N", "N")
    checks.shape("radius_mask", "logits", logits, "B", logits.shape[1], logits.shape[1])
    checks.floating("radius_mask", logits=logits)
    grid = checks.grid("radius_mask", grid, logits.shape[1])
    checks.number("radius_mask", "radius", radius, low=0.0)
    check_metric("radius_mask", metric)
    return choose("radius_mask", logits.device, backend)(logits, grid, float(radius), metric)
