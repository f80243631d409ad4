"""C²AM contrast: foregrounds look alike, backgrounds look alike, a foreground and a background do not."""

from __future__ import annotations

from torch import Tensor

from kernels import checks
from kernels.backend import choose, register
from kernels.c2am_contrast import reference

# No native twin: at B = 128 half of the time goes into the matrix products, which it would need as well, and all of it
# is 3 % of what pooling as many images takes (`python -m kernels.bench c2am_contrast c2am_pool`).
register("c2am_contrast", reference=reference.c2am_contrast)


def c2am_contrast(
    foreground: Tensor, background: Tensor, *, alpha: float = 0.25, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of L_C2AM = pull(v_f) + pull(v_b) + push over all pairs of a batch.

    s(u, v) = clip(cos(u, v), 0.0005, 0.9995)
    pull(v) = mean_ij exp(-alpha rank_ij) (-ln s(v_i, v_j)), rank_ij = place of s_ij in row i, descending, from -1
    push    = mean_ij -ln(1 - s(v_b_i, v_f_j)), i = j included

    foreground  [B, D] from `c2am_pool`, those of all ranks, B >= 1; fp32, bf16, fp16 or fp64.
    background  [B, D].
    alpha       >= 0: how fast the weight falls with the rank.
    Returns three scalars (pull_foreground, pull_background, push), float32 (float64 for float64 vectors).
    Differentiable in both vectors. The ranks have no gradient, nor has an entry that was clipped; entries that tie,
    such as clipped ones, are ranked by ascending column.
    Raises ValueError or TypeError for a wrong shape, dtype, device or range.
    Source: C²AM (Xie et al., CVPR 2022), equations 3 to 5.
    """
    checks.shape("c2am_contrast", "foreground", foreground, "B", "D")
    checks.shape("c2am_contrast", "background", background, *foreground.shape)
    checks.floating("c2am_contrast", foreground=foreground, background=background)
    checks.same_device("c2am_contrast", foreground=foreground, background=background)
    if len(foreground) == 0:
        raise ValueError("c2am_contrast: foreground must be [B, D] with B >= 1, got none")
    checks.number("c2am_contrast", "alpha", alpha, low=0.0)
    return choose("c2am_contrast", foreground.device, backend)(foreground, background, float(alpha))
