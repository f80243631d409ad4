"""Gated dense energy in plain torch; the definition of the op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import accumulate_dtype, no_autocast
from kernels.lattice import Lattice, exact_filter, pixel_features

WEIGHT = 1e-7


def _filter(image: Tensor, planes: Tensor, sigma_xy: float, sigma_rgb: float, scale: str) -> Tensor:
    """kappa applied to planes [K, H, W] of one image [3, H, W]."""
    features = pixel_features(image, sigma_xy, sigma_rgb)
    values = planes.flatten(1).t().contiguous()
    out = Lattice(features).filter(values) if scale == "lattice" else exact_filter(features, values)
    return out.t().reshape(planes.shape)


class GatedEnergy(torch.autograd.Function):
    """One filtering for the value and the gradient; the gradient is the convention in the doc of the op."""

    @staticmethod
    def forward(ctx, probs, image, roi, gate, sigma_xy, sigma_rgb, scale):
        planes = probs * roi
        with no_autocast(probs):
            smooth = [_filter(i, p, sigma_xy, sigma_rgb, scale) for i, p in zip(image, planes, strict=True)]
        smooth = gate * torch.stack(smooth)
        factor = WEIGHT / len(probs)
        ctx.save_for_backward((-2 * factor) * smooth * roi)
        return -factor * (planes * smooth).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None, None, None


def dense_energy(
    probs: Tensor,
    image: Tensor,
    roi: Tensor,
    labels: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    scale_factor: float,
    scale: str,
) -> Tensor:
    dtype = accumulate_dtype(probs)
    probs, image, roi = probs.to(dtype), image.to(dtype), roi.to(dtype).unsqueeze(1)
    if probs.numel() == 0:
        return probs.sum()
    size = [max(1, int(s * scale_factor)) for s in probs.shape[-2:]]
    probs = F.interpolate(probs, size, mode="bilinear")
    image = F.interpolate(image, size)
    roi = F.interpolate(roi, size)
    unlabelled = F.interpolate((labels == 255).to(dtype).unsqueeze(1), size) > 0
    gate = (roi - probs.detach().amax(dim=1, keepdim=True)).clamp_min(0)
    gate = torch.where(unlabelled, 1.0, gate)
    return GatedEnergy.apply(probs, image, roi, gate, sigma_xy * scale_factor, sigma_rgb, scale)
