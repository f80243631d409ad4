"""Gated dense energy: a loss that draws the probabilities of alike and near pixels together."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.dense_energy import reference
from kernels.gradient import wanted

_OP = "dense_energy"
SCALES = ("lattice", "true")


def _native_sums(image: Tensor, planes: Tensor, sigma_xy: float, sigma_rgb: float, scale: str) -> Tensor:
    if scale == "true":  # plain torch is all there is
        return reference.kernel_sums(image, planes, sigma_xy, sigma_rgb, scale)
    return torch.ops.wsss.lattice_filter(image, planes, float(sigma_xy), float(sigma_rgb))


def _native(
    probs: Tensor,
    image: Tensor,
    roi: Tensor,
    labels: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    scale_factor: float,
    scale: str,
) -> Tensor:
    if probs.dtype == torch.float64:
        raise TypeError(f"{_OP}: the native backend computes in fp32; use backend='reference' for float64")
    if scale == "true" or probs.device.type != "cpu" or probs.numel() == 0:
        return reference.dense_energy(
            probs, image, roi, labels, sigma_rgb, sigma_xy, scale_factor, scale, sums=_native_sums
        )
    image, roi, unlabelled = reference.shrink(image, roi, labels, scale_factor, torch.float32)
    sigmas = float(sigma_xy * scale_factor), float(sigma_rgb)
    arguments = image, roi.squeeze(1), unlabelled.squeeze(1), *sigmas, wanted(probs)
    return torch.ops.wsss.dense_energy(probs.float(), *arguments)[0]


def _row_floats(probs: Tensor, image: Tensor) -> int:
    """Size of the slope of an image: rows of 32 classes and of the rest, which is 1 to 4 or fills vectors of 8."""
    classes, pixels = probs.shape[1], image.shape[2] * image.shape[3]
    rest = (classes - 1) % 32 + 1
    return (classes - rest + (4 if rest <= 4 else -(-rest // 8) * 8)) * pixels


def _save_slope(ctx, inputs, output):
    ctx.sizes = inputs[0].shape, *inputs[1].shape[-2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _):
    (slope,) = ctx.saved_tensors
    return torch.ops.wsss.dense_energy_backward(grad, slope, *ctx.sizes), *(None,) * 6


def _second_gradient(ctx, grad):
    raise RuntimeError(f"{_OP}: the gradient itself is not differentiable")


if native_problem(_OP) is None:

    @torch.library.register_fake("wsss::lattice_filter")
    def _fake_filter(image, planes, sigma_xy, sigma_rgb):
        return planes.new_empty(planes.shape)

    @torch.library.register_fake("wsss::dense_energy")
    def _fake(probs, image, roi, unlabelled, sigma_xy, sigma_rgb, with_gradient):
        return probs.new_empty(()), probs.new_empty(len(probs) if with_gradient else 0, _row_floats(probs, image))

    @torch.library.register_fake("wsss::dense_energy_backward")
    def _fake_backward(grad, slope, shape, h, w):
        return slope.new_empty(shape)

    torch.library.register_autograd("wsss::dense_energy", _gradient, setup_context=_save_slope)
    torch.library.register_autograd("wsss::dense_energy_backward", _second_gradient)


register(_OP, reference=reference.dense_energy, native=_native)


def dense_energy(
    probs: Tensor,
    image: Tensor,
    roi: Tensor,
    labels: Tensor,
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale_factor: float = 0.5,
    scale: str = "lattice",
    backend: str | None = None,
) -> Tensor:
    """E = -(1e-7 / B) sum_b sum_k sum_i S_ki g_i (kappa S_k)_i with S = probs * roi, at `scale_factor` of the size.

    kappa_ij = exp(-|p_i - p_j|^2 / (2 (sigma_xy scale_factor)^2) - |I_i - I_j|^2 / (2 sigma_rgb^2)), i = j included, no
    normalisation. Gate g = max(0, roi - max_k probs), 1 where the label is 255. Image, roi and labels are shrunk to the
    nearest pixel, probs bilinearly.

    probs         [B, K, H, W] softmax over K, in [0, 1]; fp32, bf16, fp16, or fp64 (all in fp64, by the reference).
    image         [B, 3, H, W] RGB, floating point in 0..255.
    roi           [B, H, W] in {0, 1}: 1 on real image, 0 on padding.
    labels        [B, H, W] integers, 255 = unlabelled.
    sigma_rgb     grey levels; sigma_xy: pixels of the full-size image; scale_factor in (0, 1].
    scale         "lattice": the permutohedral sums as they are, about 0.57 of the true ones, which the published loss
                  weights were tuned with; "true": exact sums, O(n^2) time in the shrunk size.
    Returns a scalar float32 (float64 for float64 probs), <= 0; the factor 1e-7 is inside.
    Gradient, in `probs` alone: -2 (1e-7 / B) g (kappa S) roi, the convention of the published loss. It is not the true
    derivative: the gate counts as constant, and kappa (g S) is replaced by g (kappa S).
    Raises ValueError or TypeError for a wrong shape, dtype, device or range; on the CPU, and not inside torch.compile,
    also for an image that is not finite.
    Source: Tang et al., "On regularized losses for weakly-supervised CNN segmentation" (ECCV 2018); gate: AFA (CVPR
    2022) and its successors.
    """
    checks.shape(_OP, "probs", probs, "B", "K", "H", "W")
    b, _, h, w = probs.shape
    checks.shape(_OP, "image", image, b, 3, h, w)
    checks.shape(_OP, "roi", roi, b, h, w)
    checks.shape(_OP, "labels", labels, b, h, w)
    checks.floating(_OP, probs=probs, image=image)
    checks.integral(_OP, labels=labels)
    checks.real(_OP, roi=roi)
    checks.same_device(_OP, probs=probs, image=image, roi=roi, labels=labels)
    checks.number(_OP, "sigma_rgb", sigma_rgb, low=0.0, open=True)
    checks.number(_OP, "sigma_xy", sigma_xy, low=0.0, open=True)
    if not 0 < scale_factor <= 1:
        raise ValueError(f"{_OP}: scale_factor must lie in (0, 1], got {scale_factor}")
    if scale not in SCALES:
        raise ValueError(f"{_OP}: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    checks.finite(_OP, image=image)
    run = choose(_OP, probs.device, backend, pass_over=("native",) if probs.dtype == torch.float64 else ())
    return run(probs, image.detach(), roi, labels, sigma_rgb, sigma_xy, scale_factor, scale)
