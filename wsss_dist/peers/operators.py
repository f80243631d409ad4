"""The operators of PCRE as research code has them: loops over images, classes and seeds, everything materialised.

The names and the arguments are those of `kernels`, which the tests compare them with. Each is written from its equation
(PCRE, CVPR 2025, and what it builds on), in the form that such code commonly has.

Letters: B batch, C foreground classes, K = C + 1, N = h*w patches, D width, P pairs of an image and one of its tags.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import RegionSelection
from wsss_dist.models.vit import Features, ViT, resize_positions

IGNORE = 255
ENERGY_WEIGHT = 1e-7


def has_lattice() -> bool:
    """Is the C++ filter that the dense energy needs installed?"""
    return importlib.util.find_spec("pydensecrf") is not None


def backbone(vit: ViT, images: Tensor) -> Features:
    """The ViT with its scores [B, heads, T, T] and their mask [T, T] in memory: nobody reads the class tokens."""
    grid, c = vit.grid_of(images.shape[-2:]), vit.num_class_tokens
    h, w = grid
    x = vit.patch_embed(images[..., : h * vit.patch_size, : w * vit.patch_size]).flatten(1, 2)
    x = vit.norm_pre(x + resize_positions(vit.patch_pos, vit.pos_grid, grid, vit.cfg.pos_antialias))
    own = (vit.class_tokens + vit.class_pos).unsqueeze(0).repeat(len(x), 1, 1)
    x = torch.cat([vit.norm_pre(own), x], dim=1)
    blocked = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    blocked[:, :c] = -math.inf
    aux = None
    for i, block in enumerate(vit.blocks):
        y, heads = block.norm1(x), block.attn.num_heads
        qkv = block.attn.qkv(y).reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if i == vit.depth - 1 and vit.cfg.last_block == "value_only":
            out = v
        else:
            q, k = block.attn.q_norm(q), block.attn.k_norm(k)
            scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            out = (scores + blocked).softmax(dim=-1).to(v) @ v
        x = x + block.ls1(block.attn.proj(out.transpose(1, 2).reshape(y.shape)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if i + 1 == vit.aux_block:
            aux = F.layer_norm(x, (vit.dim,)) if vit.cfg.aux_norm else x
    x = vit.norm(x)
    return Features(x[:, :c], x[:, c:], aux[:, c:], grid)


def cosine_to_prototypes(patches: Tensor, prototypes: Tensor) -> Tensor:
    """|cos| of patches [B, N, D] with prototypes [C, D], [B, N, C]."""
    return (F.normalize(patches.float(), dim=-1) @ F.normalize(prototypes, dim=-1).T).abs()


def patch_token_contrast(tokens: Tensor, labels: Tensor) -> Tensor:
    """PTC of tokens [B, N, D] with labels [B, N]: similarity and relation of all pairs, [B, N, N] each."""
    unit = F.normalize(tokens.float(), dim=-1, eps=1e-8)
    similarity = torch.matmul(unit, unit.transpose(1, 2)).abs()
    relation = torch.full(similarity.shape, IGNORE, dtype=torch.int64, device=tokens.device)
    for b, label in enumerate(labels):
        same = (label[:, None] == label[None]).long()
        same[label == IGNORE, :] = IGNORE
        same[:, label == IGNORE] = IGNORE
        relation[b] = same.fill_diagonal_(IGNORE)
    return _contrast(similarity, relation)


def class_patch_contrast(class_tokens: Tensor, patches: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """CPE of class tokens [B, C, D] and patches [B, N, D], labels [B, N], tags [B, C]; relation [B, C, N]."""
    z = F.normalize(class_tokens.float(), dim=-1, eps=1e-8)
    f = F.normalize(patches.float(), dim=-1, eps=1e-8)
    similarity = torch.matmul(z, f.transpose(1, 2)).abs()
    relation = torch.full(similarity.shape, IGNORE, dtype=torch.int64, device=patches.device)
    for b in range(len(labels)):
        for c in present[b].nonzero().flatten().tolist():
            relation[b, c] = (labels[b] == c + 1).long()
            relation[b, c][labels[b] == IGNORE] = IGNORE
    return _contrast(similarity, relation)


def _contrast(similarity: Tensor, relation: Tensor) -> Tensor:
    """Half one minus the mean of the positives, half the mean of the negatives, counts plus one."""
    positive, negative = (relation == 1).float(), (relation == 0).float()
    near = (positive * similarity).sum() / (positive.sum() + 1)
    far = (negative * similarity).sum() / (negative.sum() + 1)
    return 0.5 * (1 - near) + 0.5 * far


def par(image: Tensor, maps: Tensor, *, dilations: tuple[int, ...], iterations: int) -> Tensor:
    """PAR of maps [B, k, h, w] along image [B, 3, h, w]; the neighbours of every pixel are copied in every sweep."""
    around = _neighbours(image, dilations)  # [B, 3, n, h, w]
    sigma = around.std(dim=2, keepdim=True)
    colour = -(((around - image.unsqueeze(2)).abs() / (sigma + 1e-8) / 0.3) ** 2).mean(dim=1, keepdim=True)
    steps = (math.sqrt(2), 1, math.sqrt(2), 1, 1, math.sqrt(2), 1, math.sqrt(2))
    length = torch.tensor([d * s for d in dilations for s in steps], device=image.device).view(1, 1, -1, 1, 1)
    place = -((length / (length.std() + 1e-8) / 0.3) ** 2)
    weights = colour.softmax(dim=2) + 0.01 * place.softmax(dim=2)
    for _ in range(iterations):
        maps = (_neighbours(maps, dilations) * weights).sum(dim=2)
    return maps


def _neighbours(x: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """[B, C, h, w] -> the 8 neighbours at each dilation, [B, C, n, h, w], edges repeated: a convolution with ones."""
    b, c, h, w = x.shape
    taps = torch.eye(9, device=x.device, dtype=x.dtype).view(9, 1, 3, 3)[[0, 1, 2, 3, 5, 6, 7, 8]]
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which would round what is only copied
        for d in dilations:
            padded = F.pad(x, (d, d, d, d), mode="replicate").view(b * c, 1, h + 2 * d, w + 2 * d)
            found.append(F.conv2d(padded, taps, dilation=d).view(b, c, 8, h, w))
    return torch.cat(found, dim=2)


@functools.lru_cache(maxsize=8)
def _discs(grid: tuple[int, int], radius: float, device: torch.device) -> Tensor:
    """For each patch the patches within the radius, [N, N]; made once for a grid."""
    h, w = grid
    y, x = torch.arange(h * w, device=device) // w, torch.arange(h * w, device=device) % w
    squared = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    return (squared <= radius**2 + 1e-9).float()


@torch.no_grad()
def select_regions(
    mask_logits: Tensor,
    scores: Tensor,
    present: Tensor,
    *,
    grid: tuple[int, int],
    radius: float | None,
    tau: float,
    overlap: tuple[float, float],
    max_seeds: int,
    top: int,
) -> RegionSelection:
    """Regions of CRME, image by image, class by class, seed by seed, candidate masks [n, N] as floats."""
    low, high = overlap
    disc = None if radius is None else _discs(grid, radius, scores.device)
    pairs, members, seeds = [], [], []
    for b in range(len(scores)):
        relative = scores[b] / scores[b].max(dim=0, keepdim=True).values
        winner = relative.argmax(dim=1)
        winner[scores[b].max(dim=1).values <= 0] = -1
        for c in present[b].nonzero().flatten().tolist():
            own = (winner == c).nonzero().flatten()
            own = own[relative[own, c].sort(descending=True, stable=True).indices[:top]]
            masks = mask_logits[b, own].float().sigmoid()
            masks = masks if disc is None else masks * disc[own]
            masks = (masks > tau).float()
            chosen = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=scores.device)
            is_open, first = torch.ones(len(own), dtype=torch.bool, device=scores.device), []
            while len(first) < max_seeds and bool(is_open.any()):
                seed = int(is_open.nonzero()[0])
                is_open[seed], chosen[own[seed]] = False, True
                ratio = (masks * masks[seed]).sum(dim=1) / masks[seed].sum().clamp(min=1e-6)
                joins = (ratio >= low) & (ratio <= high)
                chosen[own[joins]] = True
                is_open[joins | (ratio > high)] = False
                first.append(int(own[seed]))
            pairs.append([b, c])
            members.append(chosen)
            seeds.append(first + [-1] * (max_seeds - len(first)))
    device, n = scores.device, scores.shape[1]
    return RegionSelection(
        torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2),
        torch.stack(members) if members else torch.zeros(0, n, dtype=torch.bool, device=device),
        torch.tensor(seeds, dtype=torch.int64, device=device).view(-1, max_seeds),
    )


def max_upsampled_masks(
    mask_logits: Tensor,
    selection: RegionSelection,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    radius: float | None = None,
) -> Tensor:
    """Masks [P, H, W]: those of all members of a pair at full size, then their maximum, by autograd."""
    disc = None if radius is None else _discs(grid, radius, mask_logits.device)
    out = []
    for (b, _), chosen in zip(selection.pairs.tolist(), selection.members, strict=True):
        rows = chosen.nonzero().flatten()
        if len(rows) == 0:
            out.append(torch.zeros(size, device=mask_logits.device))
            continue
        masks = mask_logits[b, rows].float().sigmoid()
        masks = masks if disc is None else masks * disc[rows]
        full = F.interpolate(masks.view(-1, 1, *grid), size, mode="bilinear", align_corners=False)
        out.append(full.max(dim=0).values[0])
    return torch.stack(out) if out else mask_logits.new_zeros(0, *size)


def dense_energy(
    probs: Tensor,
    image: Tensor,
    roi: Tensor,
    labels: Tensor,
    *,
    sigma_rgb: float,
    sigma_xy: float,
    scale_factor: float,
) -> Tensor:
    """Gated dense energy, the lattice of each image on the CPU, one class after the other through pydensecrf2."""
    size = [int(side * scale_factor) for side in probs.shape[-2:]]
    small = F.interpolate(image.float(), size), F.interpolate(roi.float()[:, None], size)
    unlabelled = F.interpolate((labels == IGNORE).float()[:, None], size)
    probs = F.interpolate(probs.float(), size, mode="bilinear", align_corners=False)
    return _Energy.apply(probs, *small, unlabelled, sigma_rgb, sigma_xy * scale_factor)


class _Energy(torch.autograd.Function):
    """-(1e-7/B) sum of s g (kappa s), s = probs * roi, g the gate, which counts as constant in the gradient."""

    @staticmethod
    def forward(ctx, probs, image, roi, unlabelled, sigma_rgb, sigma_xy):
        planes = probs * roi
        gate = (roi - probs.max(dim=1, keepdim=True).values).clamp(min=0)
        gate[unlabelled == 1] = 1.0
        pixels = image.permute(0, 2, 3, 1).to(torch.uint8).cpu().contiguous()
        host = planes.detach().cpu()
        sums = torch.stack([_filtered(p, i, sigma_rgb, sigma_xy) for p, i in zip(host, pixels, strict=True)])
        sums = gate * sums.to(probs.device)
        factor = ENERGY_WEIGHT / len(probs)
        ctx.save_for_backward(-2 * factor * sums * roi)
        return -factor * (planes * sums).sum()

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None, None


def _filtered(planes: Tensor, pixels: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """kappa applied to planes [K, h, w] of an image [h, w, 3] uint8.

    A mean-field step of a field with one label leaves the filtered values in its energies.
    """
    import numpy as np
    import pydensecrf.densecrf as crf

    k, h, w = planes.shape
    field = crf.DenseCRF2D(w, h, 1)
    field.addPairwiseBilateral(sigma_xy, sigma_rgb, pixels.numpy(), 1, normalization=crf.NO_NORMALIZATION)
    values, energies, scratch = (field.startInference()[0] for _ in range(3))
    out = torch.empty(k, h, w)
    for plane, row in zip(planes, out, strict=True):
        np.asarray(values)[:] = plane.reshape(1, -1).numpy()
        field.stepInference(values, energies, scratch)
        row[:] = torch.from_numpy(np.asarray(energies)).view(h, w)
    return out
