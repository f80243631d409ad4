"""Affinity loss on the paths of an edge map in plain torch; the definition of the op.

Directions and paths are those of the walk (kernels/random_walk/reference.py), so a path is listed row by row, each row
from left to right. Its maximum belongs to the first of the highest logits in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.checks import accumulate_dtype
from kernels.random_walk.reference import offsets, path

EPS = 1e-5
WEIGHTS = (0.25, 0.25, 0.5)  # of background, foreground and negative pairs


def sources(h: int, w: int, radius: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose half of the neighbourhood, (dy, dx) in `offsets`, lies inside the map."""
    return slice(0, max(h - radius + 1, 0)), slice(radius - 1, max(w - radius + 1, radius - 1))


def shifted(x: Tensor, dy: int, dx: int, radius: int) -> Tensor:
    """x [B, h, w] at the pixels (dy, dx) from the sources: [B, rows, columns]."""
    rows, columns = sources(x.shape[1], x.shape[2], radius)
    return x[:, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx]


def kinds(labels: Tensor, dy: int, dx: int, radius: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of a direction are background, foreground, negative; [B, rows, columns] bool each."""
    source, target = shifted(labels, 0, 0, radius), shifted(labels, dy, dx, radius)
    valid = (source != ignore_index) & (target != ignore_index)
    same = source == target
    return valid & same & (source == 0), valid & same & (source != 0), valid & ~same


def path_affinity_counts(labels: Tensor, radius: int, ignore_index: int) -> Tensor:
    counts = labels.new_zeros(3, dtype=torch.int64)
    if 0 in shifted(labels, 0, 0, radius).shape:
        return counts
    for dy, dx in offsets(radius):
        counts = counts + torch.stack([kind.sum() for kind in kinds(labels, dy, dx, radius, ignore_index)])
    return counts


def direction_sums(logits: Tensor, labels: Tensor, dy: int, dx: int, radius: int, ignore_index: int) -> Tensor:
    """[3]: the losses of the pairs of a direction, summed for each kind. With e the highest edge of the path the
    affinity is a = 1 - e = sigmoid(-highest logit)."""
    cells = torch.stack([shifted(logits, y, x, radius) for y, x in path(dy, dx)])
    top = cells.gather(0, cells.detach().argmax(0, keepdim=True)).squeeze(0)  # argmax: the first of the highest
    positive = -(torch.sigmoid(-top) + EPS).log()
    negative = -(torch.sigmoid(top) + EPS).log()
    background, foreground, different = kinds(labels, dy, dx, radius, ignore_index)
    zero = torch.zeros_like(top)
    parts = (background, positive), (foreground, positive), (different, negative)
    return torch.stack([torch.where(kind, loss, zero).sum() for kind, loss in parts])


def path_affinity_loss(
    edge_logits: Tensor, labels: Tensor, radius: int, ignore_index: int, counts: Tensor | None
) -> Tensor:
    logits = edge_logits.double()  # in fp32 the sums over all directions are off by 1e-5
    sums = (0 * logits).sum() + logits.new_zeros(3)
    if 0 not in shifted(logits, 0, 0, radius).shape:
        for dy, dx in offsets(radius):
            # kept: the inputs alone; what a direction needs for its gradient is made again
            step = checkpoint(direction_sums, logits, labels, dy, dx, radius, ignore_index, use_reentrant=False)
            sums = sums + step
    if counts is None:
        counts = path_affinity_counts(labels, radius, ignore_index)
    loss = (logits.new_tensor(WEIGHTS) * sums / (counts.double() + EPS)).sum()
    return loss.to(accumulate_dtype(edge_logits))
