"""The contrastive terms of C²AM in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulate_dtype, no_autocast

LOW, HIGH = 0.0005, 0.9995


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Unit vectors [B, D], [B, D] -> [B, B]: the clipped cosines; where the clip holds, no gradient passes."""
    with no_autocast(rows):
        cosine = rows @ columns.T
    return cosine.clamp(LOW, HIGH)


@torch.no_grad()
def ranks(s: Tensor) -> Tensor:
    """int64 [B, B]: the place of each entry in its row in descending order, from -1; ties: lower column first."""
    order = s.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(-1, s.shape[1] - 1, device=s.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def pull(units: Tensor, alpha: float) -> Tensor:
    s = similarity(units, units)
    return (torch.exp(-alpha * ranks(s).to(s.dtype)) * -s.log()).mean()


def c2am_contrast(foreground: Tensor, background: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(foreground, background)
    foreground, background = (F.normalize(x.to(dtype), dim=1, eps=1e-12) for x in (foreground, background))
    push = -(1 - similarity(background, foreground)).log().mean()
    return pull(foreground, alpha), pull(background, alpha), push
