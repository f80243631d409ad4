"""Region-radius masking: each patch's mask is cut to the disc around the patch."""

from __future__ import annotations

from torch import Tensor

from kernels import checks
from kernels.backend import choose, register
from kernels.radius_mask import reference

register("radius_mask", reference=reference.radius_mask)


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
