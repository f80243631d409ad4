"""Confidence region selection in plain torch; the definition of the op. No loop over pairs, no sync.

Letters: P (image, class) pairs, T candidates kept per pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.checks import no_autocast
from kernels.radius_mask.reference import within

PAIRS_AT_ONCE = 16  # bounds the memory of the binary masks: 16 * 300 * 1764 floats are 34 MB


def candidates(scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores [B, N, C] -> (relative scores [B, N, C], every class peaks at 1; winner [B, N]).

    A patch has no class, -1 or C, if no score of it is > 0 or one of its relative scores is NaN.
    """
    top = torch.where(scores.isnan(), -math.inf, scores).amax(dim=1, keepdim=True)
    relative = scores / torch.where(top > 0, top, torch.ones_like(top))
    best = relative.amax(dim=2, keepdim=True)
    classes = torch.arange(scores.shape[2], device=scores.device)
    winner = torch.where(relative == best, classes, scores.shape[2]).amin(dim=2)  # ties: lowest class
    return relative, torch.where(scores.amax(dim=2) > 0, winner, -1)


def expand(regions: Tensor, valid: Tensor, overlap: tuple[float, float], max_seeds: int) -> tuple[Tensor, Tensor]:
    """Progressive expansion of sorted candidates.

    regions [P, T, N] 0/1 float, valid [P, T] bool -> members [P, T] bool, seeds [P, max_seeds] positions or -1.
    """
    low, high = overlap
    num = valid.shape[1]
    positions = torch.arange(num, device=valid.device)
    is_open, members = valid.clone(), torch.zeros_like(valid)
    seeds = torch.full((len(valid), max_seeds), -1, dtype=torch.int64, device=valid.device)
    for turn in range(max_seeds):
        active = is_open.any(dim=1)
        seed = torch.where(is_open, positions, num).amin(dim=1).clamp_max(num - 1)  # first open candidate
        region = regions[torch.arange(len(seed), device=seed.device), seed]  # [P, N]
        shared = torch.bmm(regions, region.unsqueeze(2)).squeeze(2)  # exact: counts below 2^24
        ratio = shared / region.sum(dim=1, keepdim=True).clamp_min(1e-6)
        running = active.unsqueeze(1) & valid
        is_seed = running & (positions == seed.unsqueeze(1))
        joins = running & (ratio >= low) & (ratio <= high)
        members |= is_seed | joins
        is_open &= ~(is_seed | joins | (running & (ratio > high)))
        seeds[:, turn] = torch.where(active, seed, -1)
    return members, seeds


@torch.no_grad()
def select_regions(
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
    num_patches = scores.shape[1]
    image, label = pairs.unbind(1)
    members = torch.zeros(len(pairs), num_patches, dtype=torch.bool, device=scores.device)
    seeds = torch.full((len(pairs), max_seeds), -1, dtype=torch.int64, device=scores.device)
    if len(pairs) == 0 or num_patches == 0:
        return members, seeds
    relative, winner = candidates(scores.float())
    mine = winner[image] == label.unsqueeze(1)  # [P, N]
    confidence = torch.where(mine, relative[image, :, label], -1.0)
    order = confidence.sort(dim=1, descending=True, stable=True).indices[:, :top]  # ties: patch index
    valid = mine.gather(1, order)
    disc = None if radius is None else within(grid, radius, "euclidean", scores.device)
    threshold = math.log(tau / (1 - tau))
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        regions = mask_logits[image[part].unsqueeze(1), order[part]].float() > threshold  # [P, T, N]
        if disc is not None:
            regions &= disc[order[part]]
        with no_autocast(scores):
            chosen, first = expand(regions.float(), valid[part], overlap, max_seeds)
        members[part] = members[part].scatter(1, order[part], chosen)
        seeds[part] = torch.where(first >= 0, order[part].gather(1, first.clamp_min(0)), -1)
    return members, seeds
