"""Sigmoid within a radius in plain torch; the definition of the op, and of `within` for the others."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("euclidean", "euclidean_open", "chebyshev")
# Added to the squared radius: a radius such as sqrt(2) squares to an integer only up to rounding.
SLACK = 1e-9


def near(dy: Tensor, dx: Tensor, radius: float, metric: str) -> Tensor:
    """bool, broadcast of the integer distances dy and dx: whether they are within `radius` (grid units)."""
    if metric == "euclidean":
        return (dy * dy + dx * dx).double() <= radius * radius + SLACK
    if metric == "euclidean_open":
        return (dy * dy + dx * dx).double() < radius * radius - SLACK
    assert metric == "chebyshev"
    return torch.maximum(dy.abs(), dx.abs()).double() <= radius + SLACK


def within(grid: tuple[int, int], radius: float, metric: str, device: torch.device) -> Tensor:
    """bool [N, N]: whether two patches of the grid (h, w), row-major, are within `radius` of each other."""
    h, w = grid
    y = torch.arange(h, device=device)
    x = torch.arange(w, device=device)
    dy = (y[:, None] - y[None, :]).view(h, 1, h, 1)
    dx = (x[:, None] - x[None, :]).view(1, w, 1, w)
    return near(dy, dx, radius, metric).reshape(h * w, h * w)


def radius_mask(logits: Tensor, grid: tuple[int, int], radius: float, metric: str) -> Tensor:
    inside = within(grid, radius, metric, logits.device)
    zero = logits.new_zeros(())
    # The inner `where` keeps a non-finite logit outside the disc from turning its zero gradient into NaN.
    return torch.where(inside, torch.sigmoid(torch.where(inside, logits, zero)), zero)
