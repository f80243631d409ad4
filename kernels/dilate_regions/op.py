"""Dilation of region maps by a disc."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.dilate_regions import reference
from kernels.radius_mask.op import check_metric, disc_limit


def _native(seeds: Tensor, radius: float, metric: str) -> Tensor:
    return torch.ops.wsss.dilate_regions(seeds, disc_limit(radius, metric), metric == "chebyshev")


if native_problem("dilate_regions") is None:

    @torch.library.register_fake("wsss::dilate_regions")
    def _fake(seeds, limit, chebyshev):
        return seeds.new_empty(seeds.shape)


register("dilate_regions", reference=reference.dilate_regions, native=_native)


def dilate_regions(seeds: Tensor, radius: float, *, metric: str = "euclidean", backend: str | None = None) -> Tensor:
    """True where a seed of the same map lies within the radius.

    seeds   [B, M, h, w] bool.
    radius  grid units, >= 0, real; 0 returns the seeds (nothing under "euclidean_open").
    metric  as for `radius_mask`.
    Returns [B, M, h, w] bool.
    Raises ValueError or TypeError for a wrong shape, dtype, radius or metric.
    """
    checks.shape("dilate_regions", "seeds", seeds, "B", "M", "h", "w")
    if seeds.dtype != torch.bool:
        raise TypeError(f"dilate_regions: seeds must be bool, got {seeds.dtype}")
    checks.number("dilate_regions", "radius", radius, low=0.0)
    check_metric("dilate_regions", metric)
    return choose("dilate_regions", seeds.device, backend)(seeds, float(radius), metric)
