"""Gated dense energy in plain torch; the definition of the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import accumulate_dtype, no_autocast
from kernels.lattice import Lattice, exact_filter, pixel_features

WEIGHT = 1e-7


def kernel_sums(image: Tensor, planes: Tensor, sigma_xy: float, sigma_rgb: float, scale: str) -> Tensor:
    """kappa applied to planes [B, K, h, w] of images [B, 3, h, w]."""
    sums = []
    with no_autocast(planes):
        for i, p in zip(image, planes, strict=True):
            features = pixel_features(i, sigma_xy, sigma_rgb)
            values = p.flatten(1).t().contiguous()
            out = Lattice(features).filter(values) if scale == "lattice" else exact_filter(features, values)
            sums.append(out.t().reshape(p.shape))
    return torch.stack(sums)


class GatedEnergy(torch.autograd.Function):
    """One filtering for the value and the gradient; the gradient is the convention in the doc of the op."""

    @staticmethod
    def forward(ctx, probs, roi, gate, smooth):
        """`smooth`: kappa applied to planes."""
        planes = probs * roi
        sums = gate * smooth(planes)
        factor = WEIGHT / len(probs)
        ctx.save_for_backward((-2 * factor) * sums * roi)
        return -factor * (planes * sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None


def shrink(
    image: Tensor, roi: Tensor, labels: Tensor, scale_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """To the nearest pixel: image [B, 3, h, w], roi [B, 1, h, w], whether the label is 255 [B, 1, h, w]."""
    size = [max(1, int(s * scale_factor)) for s in image.shape[-2:]]
    unlabelled = F.interpolate((labels == 255).to(torch.uint8).unsqueeze(1), size) > 0
    return F.interpolate(image.to(dtype), size), F.interpolate(roi.to(dtype).unsqueeze(1), size), unlabelled


def dense_energy(
    probs: Tensor,
    image: Tensor,
    roi: Tensor,
    labels: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    scale_factor: float,
    scale: str,
    sums: Callable = kernel_sums,
) -> Tensor:
    """`sums`: what computes `kernel_sums`."""
    dtype = accumulate_dtype(probs)
    probs = probs.to(dtype)
    if probs.numel() == 0:
        return probs.sum()
    image, roi, unlabelled = shrink(image, roi, labels, scale_factor, dtype)
    probs = F.interpolate(probs, image.shape[-2:], mode="bilinear")
    gate = (roi - probs.detach().amax(dim=1, keepdim=True)).clamp_min(0)
    gate = torch.where(unlabelled, 1.0, gate)

    def smooth(planes: Tensor) -> Tensor:
        return sums(image, planes, sigma_xy * scale_factor, sigma_rgb, scale)

    return GatedEnergy.apply(probs, roi, gate, smooth)
