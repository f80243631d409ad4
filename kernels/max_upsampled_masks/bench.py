"""Benchmark cases of max_upsampled_masks, at the shapes the trainer uses."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from kernels.max_upsampled_masks.op import max_upsampled_masks
from kernels.radius_mask.reference import within
from kernels.select_regions.op import RegionSelection

# name: (B, h, w, pairs per image, members per pair, radius, with backward); 16 pixels per patch and side
SHAPES = {
    "4x28x28, 2x60 members r=5 backward": (4, 28, 28, 2, 60, 5.0, True),
    "4x28x28, 3x100 members": (4, 28, 28, 3, 100, None, False),
    "4x40x40, 2x100 members r=5 backward": (4, 40, 40, 2, 100, 5.0, True),
    "4x40x40, 3x150 members": (4, 40, 40, 3, 150, None, False),
}
TOLERANCE = 1e-5  # against fp64, maps in [0, 1]; the gradient, a sum over up to 1024 pixels, relative to its maximum
PEER_TOLERANCE = TOLERANCE


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, RegionSelection]:
    b, h, w, pairs, members, _, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(b, h * w, h * w, generator=make)
    chosen = torch.zeros(b * pairs, h * w, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(h * w, generator=make)[:members]] = True
    image = torch.arange(b).repeat_interleave(pairs)
    pair = torch.stack([image, torch.arange(pairs).repeat(b)], dim=1)
    return logits.to(device), RegionSelection(pair.to(device), chosen.to(device), None)


def once(name: str, logits: torch.Tensor, selection: RegionSelection, backend: str) -> list[torch.Tensor]:
    """The maps and, where the case says so, the gradient."""
    _, h, w, _, _, radius, backward = SHAPES[name]
    logits = logits.detach().requires_grad_(backward)
    out = max_upsampled_masks(logits, selection, grid=(h, w), size=(16 * h, 16 * w), radius=radius, backend=backend)
    return [out.detach(), *(torch.autograd.grad(out, logits, torch.ones_like(out)) if backward else ())]


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64, in units of the largest value."""
    logits, selection = inputs(name, device)
    return _error(name, device, once(name, logits, selection, backend))


@functools.cache
def _expected(name: str, device: torch.device) -> list[torch.Tensor]:
    logits, selection = inputs(name, device)
    return once(name, logits.double(), selection, "reference")


def _error(name: str, device: torch.device, got: list[torch.Tensor]) -> float:
    want = _expected(name, device)
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    logits, selection = inputs(name, device)
    return lambda: once(name, logits, selection, backend)


def _masks(logits: torch.Tensor, disc: torch.Tensor | None, h: int, w: int) -> torch.Tensor:
    """Maximum over the upsampled masks of the members of one pair, logits [n, N]."""
    masks = logits.sigmoid() if disc is None else logits.sigmoid() * disc
    return F.interpolate(masks.view(-1, 1, h, w), (16 * h, 16 * w), mode="bilinear").amax(0)[0]


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the masks of all members upsampled, then their maximum, by autograd; `compile`: the same, compiled."""
    _, h, w, _, _, radius, backward = SHAPES[name]
    logits, selection = inputs(name, device)
    disc = None if radius is None else within((h, w), radius, "euclidean", device).float()

    def run_with(function):
        def both() -> list[torch.Tensor]:
            leaf = logits.detach().requires_grad_(backward)
            rows = [member.nonzero().flatten() for member in selection.members]
            images = selection.pairs[:, 0].tolist()
            own = [None if disc is None else disc[r] for r in rows]
            out = torch.stack([function(leaf[i, r], d, h, w) for i, r, d in zip(images, rows, own, strict=True)])
            return [out.detach(), *(torch.autograd.grad(out, leaf, torch.ones_like(out)) if backward else ())]

        return both

    return {"eager": run_with(_masks), "compile": run_with(torch.compile(_masks))}


def peer_error(name: str, device: torch.device, peer: str, result: list[torch.Tensor]) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Members in, maps and winners out, with the gradient also that of the maps in and of the logits out; three
    operations for each pixel of a member, one to compare, where its disc or the whole map is."""
    b, h, w, pairs, members, radius, backward = SHAPES[name]
    n, pixels = h * w, 256 * h * w
    inside = n if radius is None else int(within((h, w), radius, "euclidean", torch.device("cpu")).sum()) // n
    moved = 4 * b * pairs * (members * inside + 2 * pixels)
    moved += 4 * b * (pairs * pixels + n * n) if backward else 0
    return moved, 4 * 256 * b * pairs * members * inside
