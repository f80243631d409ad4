"""Benchmark cases of select_regions, at the shapes the trainer uses."""

from __future__ import annotations

import math

import torch

from kernels.radius_mask.reference import within
from kernels.select_regions import reference
from kernels.select_regions.op import RegionSelection, select_regions

# name: (B, h, w, C, classes present per image, radius)
SHAPES = {
    "4x28x28 C=20 r=5": (4, 28, 28, 20, 2, 5.0),
    "4x28x28 C=80": (4, 28, 28, 80, 3, None),
    "4x40x40 C=20 r=5": (4, 40, 40, 20, 2, 5.0),
    "4x40x40 C=80": (4, 40, 40, 80, 3, None),
}
TOLERANCE = PEER_TOLERANCE = 0.0
TAU, LOW, HIGH, MAX_SEEDS, TOP = 0.7, 0.3, 0.5, 5, 300


def blobs(count: int, h: int, w: int, make: torch.Generator) -> torch.Tensor:
    """Smooth random maps [count, h * w] with unit spread."""
    coarse = torch.randn(count, 1, 6, 6, generator=make)
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").flatten(1)


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks that are smooth and alike for patches that lie together; scores with the present classes above the rest."""
    b, h, w, c, count, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    embed = blobs(b * 6, h, w, make).view(b, 6, h * w)
    logits = embed.mT @ embed + 0.3 * torch.randn(b, h * w, h * w, generator=make)
    present = torch.zeros(b, c)
    present[:, :count] = 1
    scores = blobs(b * c, h, w, make).view(b, c, -1).mT + 2 * present[:, None] * torch.rand(b, h * w, 1, generator=make)
    return logits.to(device), scores.softmax(1).to(device), present.to(device)


def once(name: str, args: tuple[torch.Tensor, ...], backend: str) -> RegionSelection:
    _, h, w, _, _, radius = SHAPES[name]
    return select_regions(*args, grid=(h, w), radius=radius, backend=backend)


def check(name: str, device: torch.device, backend: str) -> float:
    """Number of values that differ from the reference."""
    return _error(name, device, once(name, inputs(name, device), backend))


def _error(name: str, device: torch.device, got: RegionSelection) -> float:
    pairs = zip(got, once(name, inputs(name, device), "reference"), strict=True)
    return float(sum((x != y).sum().item() for x, y in pairs))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    args = inputs(name, device)
    return lambda: once(name, args, backend)


def _loops(name: str, logits: torch.Tensor, scores: torch.Tensor, present: torch.Tensor, candidates) -> RegionSelection:
    """Image by image, class by class, seed by seed, as research code has it."""
    _, h, w, _, _, radius = SHAPES[name]
    disc = None if radius is None else within((h, w), radius, "euclidean", logits.device)
    relative, winner = candidates(scores)
    pairs, members, seeds = [], [], []
    for image in range(len(scores)):
        for label in present[image].nonzero().flatten().tolist():
            mine = (winner[image] == label).nonzero().flatten()
            order = mine[relative[image, mine, label].sort(descending=True, stable=True).indices[:TOP]]
            regions = logits[image, order] > math.log(TAU / (1 - TAU))
            regions = (regions if disc is None else regions & disc[order]).float()
            member, chosen = torch.zeros(h * w, dtype=torch.bool, device=logits.device), []
            is_open = torch.ones(len(order), dtype=torch.bool, device=logits.device)
            while len(chosen) < MAX_SEEDS and is_open.any():
                seed = int(is_open.nonzero()[0])
                ratio = regions @ regions[seed] / regions[seed].sum().clamp_min(1e-6)
                joins = (ratio >= LOW) & (ratio <= HIGH)
                joins[seed] = True
                member[order[joins]] = True
                is_open &= ~(joins | (ratio > HIGH))
                chosen.append(int(order[seed]))
            pairs.append((image, label))
            members.append(member)
            seeds.append(chosen + [-1] * (MAX_SEEDS - len(chosen)))
    place = logits.device
    return RegionSelection(torch.tensor(pairs, device=place), torch.stack(members), torch.tensor(seeds, device=place))


def peers(name: str, device: torch.device) -> dict:
    """`eager`: loops over images, classes and seeds; `compile`: the reference, which has none over pairs, with its
    candidates and its expansion compiled. The number of candidates depends on the data, so more cannot be."""
    args = inputs(name, device)
    _, h, w, _, _, radius = SHAPES[name]
    candidates, expand = torch.compile(reference.candidates), torch.compile(reference.expand)

    def compiled() -> RegionSelection:
        plain = reference.candidates, reference.expand
        reference.candidates, reference.expand = candidates, expand
        try:
            pairs = (args[2] > 0).nonzero()
            rest = reference.select_regions(*args[:2], pairs, (h, w), radius, TAU, (LOW, HIGH), MAX_SEEDS, TOP)
            return RegionSelection(pairs, *rest)
        finally:
            reference.candidates, reference.expand = plain

    return {"eager": lambda: _loops(name, *args, reference.candidates), "compile": compiled}


def peer_error(name: str, device: torch.device, peer: str, result: RegionSelection) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Scores in, and the mask of each candidate once, inside its disc; the operations on bits do not count."""
    b, h, w, c, _, radius = SHAPES[name]
    _, scores, present = inputs(name, torch.device("cpu"))
    _, winner = reference.candidates(scores)
    rows = sum(min(TOP, int((winner[i] == k).sum())) for i, k in present.nonzero().tolist())
    inside = h * w if radius is None else int(within((h, w), radius, "euclidean", scores.device).sum()) // (h * w)
    return 4 * (b * h * w * c + rows * inside), 0
