"""Selection of the confident region masks of each class present in an image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.radius_mask.op import disc_limit
from kernels.select_regions import reference


@torch.no_grad()
def _native(
    mask_logits: Tensor,
    scores: Tensor,
    pairs: Tensor,
    grid: tuple[int, int],
    radius: float | None,
    tau: float,
    overlap: tuple[float, float],
    max_seeds: int,
    top: int,
) -> tuple[Tensor, Tensor]:
    limit, threshold = disc_limit(radius), math.log(tau / (1 - tau))
    return torch.ops.wsss.select_regions(
        mask_logits, scores.float(), pairs, *grid, limit, threshold, *overlap, max_seeds, top
    )


if native_problem("select_regions") is None:

    @torch.library.register_fake("wsss::select_regions")
    def _fake(mask_logits, scores, pairs, h, w, limit, threshold, low, high, max_seeds, top):
        members = scores.new_empty((pairs.shape[0], scores.shape[1]), dtype=torch.bool)
        return members, scores.new_empty((pairs.shape[0], max_seeds), dtype=torch.int64)


register("select_regions", reference=reference.select_regions, native=_native)


class RegionSelection(NamedTuple):
    """pairs [P, 2] int64 (image, class), ordered; members [P, N] bool; seeds [P, max_seeds] int64, -1 padded."""

    pairs: Tensor
    members: Tensor
    seeds: Tensor


def select_regions(
    mask_logits: Tensor,
    scores: Tensor,
    present: Tensor,
    *,
    pairs: Tensor | None = None,
    grid: tuple[int, int],
    radius: float | None = None,
    tau: float = 0.7,
    overlap: tuple[float, float] = (0.3, 0.5),
    max_seeds: int = 5,
    top: int = 300,
    backend: str | None = None,
) -> RegionSelection:
    """Progressive expansion over partly overlapping masks, seeded by the most confident patches.

    mask_logits  [B, N, N], row i is the mask of patch i over the grid.
    scores       [B, N, C] joint confidence >= 0; each class is divided by its maximum over the patches, and a patch is
                 a candidate of the class that wins among all C, absent ones included, if its score is > 0. A patch
                 with a NaN or an infinite score is a candidate of none.
    present      [B, C] bool or number; each (image, class) with present > 0 is a pair.
    pairs        [P, 2] int64, those of `present` in order, from a caller who has them: to count them the host waits
                 for a GPU. Their values are not looked at there.
    grid         (h, w), h * w = N.
    radius       masks are cut to this disc (grid units) before they are binarised; None: no disc.
    tau          a mask covers the patches where its probability is > tau, in (0, 1).
    overlap      (low, high): a candidate joins if it covers this share of the seed's region, both ends included
                 (compared in fp32); above `high` it is dropped.
    max_seeds    seeds per pair, >= 1.
    top          candidates kept per pair, the most confident; ties by patch index.
    Returns RegionSelection, without gradient; a pair without candidates has no members.
    Raises ValueError or TypeError for a wrong shape, dtype, device or range.
    Source: PCRE (CVPR 2025), progressive mask expansion, equation 7.
    """
    checks.shape("select_regions", "scores", scores, "B", "N", "C")
    b, n, c = scores.shape
    checks.shape("select_regions", "mask_logits", mask_logits, b, n, n)
    checks.shape("select_regions", "present", present, b, c)
    checks.floating("select_regions", mask_logits=mask_logits, scores=scores)
    checks.real("select_regions", present=present)
    checks.same_device("select_regions", mask_logits=mask_logits, scores=scores, present=present)
    if pairs is None:
        pairs = (present > 0).nonzero()
    else:
        checks.shape("select_regions", "pairs", pairs, "P", 2)
        if pairs.dtype != torch.int64:
            raise TypeError(f"select_regions: pairs must be int64, got {pairs.dtype}")
        checks.same_device("select_regions", pairs=pairs, scores=scores)
    grid = checks.grid("select_regions", grid, n)
    if radius is not None:
        checks.number("select_regions", "radius", radius, low=0.0)
    checks.number("select_regions", "tau", tau, low=0.0, high=1.0, open=True)
    checks.number("select_regions", "overlap[0]", overlap[0], low=0.0, high=1.0)
    checks.number("select_regions", "overlap[1]", overlap[1], low=overlap[0], high=1.0)
    checks.number("select_regions", "max_seeds", max_seeds, low=1)
    checks.number("select_regions", "top", top, low=1)
    run = choose("select_regions", scores.device, backend)
    return RegionSelection(pairs, *run(mask_logits, scores, pairs, grid, radius, tau, overlap, max_seeds, top))
