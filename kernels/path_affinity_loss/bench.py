"""Benchmark cases of path_affinity_loss, forward and backward, at the grid of its users: crops of 512 at stride 4.

The peer `eager` is what IRN's published code does: index tensors for the paths, sorted by their length, the edges
gathered for all of them at once, a maximum over each path, three masks. Its indices are made beforehand and not timed.
`compile` is the same, compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.patch_token_contrast.bench import loss_and_gradient, worst_error
from kernels.path_affinity_loss import reference
from kernels.path_affinity_loss.op import path_affinity_loss
from kernels.random_walk.reference import offsets, path

# name: (B, h, w, radius)
SHAPES = {f"{b}x128x128 r=10": (b, 128, 128, 10) for b in (2, 8)}
TOLERANCE = 1e-5  # relative L2 error of the gradient, and ten times the relative error of the loss
PEER_TOLERANCE = 1e-4  # an affinity that is 1 - edge in fp32


def inputs(case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits: hills, noise, ridges where labels change. Labels: boxes of 21 classes, parts of them ignored."""
    b, h, w, _ = SHAPES[case]
    make = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 26, (b, 1, 5, 6), generator=make).float()
    labels = F.interpolate(torch.where(coarse > 20, 0, coarse), (h, w), mode="nearest")[:, 0].long()
    change = torch.zeros(b, h, w)
    change[:, 1:] = (labels[:, 1:] != labels[:, :-1]).float()
    change[:, :, 1:] += (labels[:, :, 1:] != labels[:, :, :-1]).float()
    hills = F.interpolate(torch.randn(b, 1, 12, 12, generator=make), (h, w), mode="bilinear")[:, 0]
    logits = hills + 0.5 * torch.randn(b, h, w, generator=make) + 3 * change - 2
    unsure = F.interpolate(torch.rand(b, 1, 9, 9, generator=make), (h, w), mode="bilinear")[:, 0] > 0.7
    return logits.to(device), torch.where(unsure, 255, labels).to(device)


@functools.cache
def expected(case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    logits, labels = inputs(case, device)
    radius = SHAPES[case][3]
    return loss_and_gradient(
        lambda x: path_affinity_loss(x, labels, radius=radius, backend="reference"), logits.double()
    )


def check(case: str, device: torch.device, backend: str) -> float:
    """Error against the reference in fp64; see `TOLERANCE`."""
    return worst_error(run(case, device, backend)(), expected(case, device))


def run(case: str, device: torch.device, backend: str) -> Callable:
    """A function without arguments that runs the op once, forward and backward."""
    logits, labels = inputs(case, device)
    radius = SHAPES[case][3]
    return lambda: loss_and_gradient(lambda x: path_affinity_loss(x, labels, radius=radius, backend=backend), logits)


def path_indices(h: int, w: int, radius: int, device: torch.device) -> list[tuple[list[tuple[int, int]], Tensor]]:
    """For each length of a path: its directions and the pixels [directions, length, sources]."""
    pixels = torch.arange(h * w, device=device).view(1, h, w)
    groups: dict[int, list[tuple[int, int]]] = {}
    for d in offsets(radius):
        groups.setdefault(len(path(*d)), []).append(d)

    def on_path(d: tuple[int, int]) -> Tensor:
        return torch.stack([reference.shifted(pixels, *cell, radius).flatten() for cell in path(*d)])

    return [(ds, torch.stack([on_path(d) for d in ds])) for _, ds in sorted(groups.items())]


def eager(logits: Tensor, labels: Tensor, indices: list, radius: int) -> Tensor:
    edges = torch.sigmoid(logits).flatten(1)
    affinities, partners = [], []
    for directions, index in indices:
        on_paths = torch.index_select(edges, -1, index.flatten()).view(len(edges), *index.shape)
        affinities.append(1 - F.max_pool2d(on_paths, (index.shape[1], 1)).squeeze(2))
        partners += [reference.shifted(labels, *d, radius).flatten(1) for d in directions]
    affinity, target = torch.cat(affinities, 1), torch.stack(partners, 1)
    source = reference.shifted(labels, 0, 0, radius).flatten(1).unsqueeze(1)
    valid, same = (source < 255) & (target < 255), source == target
    background = (valid & same & (source == 0)).float()
    foreground = (valid & same & (source > 0)).float()
    negative = (valid & ~same).float()
    positive_loss, negative_loss = -torch.log(affinity + 1e-5), -torch.log(1.0 + 1e-5 - affinity)
    on_background = (background * positive_loss).sum() / (background.sum() + 1e-5)
    on_foreground = (foreground * positive_loss).sum() / (foreground.sum() + 1e-5)
    on_negative = (negative * negative_loss).sum() / (negative.sum() + 1e-5)
    return (on_background / 2 + on_foreground / 2) / 2 + on_negative / 2


def peers(case: str, device: torch.device) -> dict[str, Callable]:
    """name -> function without arguments: the same loss and gradient by others."""
    logits, labels = inputs(case, device)
    _, h, w, radius = SHAPES[case]
    indices = path_indices(h, w, radius, device)
    compiled = torch.compile(lambda x: eager(x, labels, indices, radius))
    return {
        "eager": lambda: loss_and_gradient(lambda x: eager(x, labels, indices, radius), logits),
        "compile": lambda: loss_and_gradient(compiled, logits),
    }


def peer_error(case: str, device: torch.device, peer: str, result: tuple[Tensor, Tensor]) -> float:
    return worst_error(result, expected(case, device))


def cost(case: str) -> tuple[int, int]:
    """Logits and int64 labels in, gradient out; for each pair one maximum (its path extends another one), two
    comparisons of labels and one count."""
    b, h, w, radius = SHAPES[case]
    pairs = b * (h - radius + 1) * (w - 2 * radius + 2) * len(offsets(radius))
    return 16 * b * h * w, 4 * pairs
