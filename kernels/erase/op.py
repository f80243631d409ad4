"""Erasing: the region that a class activation map marks is taken out of the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.erase import reference

MAX_SIDE = 2**24  # pixels; beyond, float32 does not tell neighbours apart


def _reference(function: str) -> Callable:
    return getattr(reference, function)


def _native(function: str) -> Callable:
    return getattr(torch.ops.wsss, function)


def _setup_maximum(ctx, inputs, output):
    maps, *ctx.size = inputs
    ctx.save_for_backward(output, maps)


def _maximum_gradient(ctx, grad):
    return torch.ops.wsss.erase_maximum_backward(grad, *ctx.saved_tensors, *ctx.size), None, None


def _setup_soft(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _soft_gradient(ctx, grad):
    return None, *torch.ops.wsss.erase_soft_backward(grad, *ctx.saved_tensors)


def _second_gradient(ctx, *grads):
    raise RuntimeError("erase: the gradient itself is not differentiable")


if native_problem("erase") is None:

    @torch.library.register_fake("wsss::erase_maximum")
    def _fake_maximum(maps, height, width):
        return maps.new_empty(())

    @torch.library.register_fake("wsss::erase_maximum_backward")
    def _fake_maximum_backward(grad, maximum, maps, height, width):
        return maps.new_empty(maps.shape)

    @torch.library.register_fake("wsss::erase_soft")
    def _fake_soft(images, maps, maximum):
        return images.new_empty(images.shape)

    @torch.library.register_fake("wsss::erase_soft_backward")
    def _fake_soft_backward(grad, images, maps, maximum):
        return maps.new_empty(maps.shape), maps.new_empty(())

    @torch.library.register_fake("wsss::erase_hard")
    def _fake_hard(images, maps, threshold):
        return images.new_empty(images.shape)

    torch.library.register_autograd("wsss::erase_maximum", _maximum_gradient, setup_context=_setup_maximum)
    torch.library.register_autograd("wsss::erase_soft", _soft_gradient, setup_context=_setup_soft)
    for _name in ("wsss::erase_maximum_backward", "wsss::erase_soft_backward"):
        torch.library.register_autograd(_name, _second_gradient)


register("erase", reference=_reference, native=_native)


def _check_maps(op: str, maps: Tensor, batch: int | str) -> None:
    checks.shape(op, "maps", maps, batch, "h", "w")
    checks.floating(op, maps=maps)
    if not 1 <= maps.shape[1] * maps.shape[2] <= MAX_SIDE:
        raise ValueError(f"{op}: maps must have 1 to 2^24 cells, got {tuple(maps.shape)}")


def _check_size(op: str, height: int, width: int) -> None:
    if not (0 <= height <= MAX_SIDE and 0 <= width <= MAX_SIDE):
        raise ValueError(f"{op}: size must be (H, W) of 0 to 2^24 pixels, got ({height}, {width})")


def _check_images(op: str, images: Tensor, maps: Tensor) -> None:
    checks.shape(op, "images", images, "B", 3, "H", "W")
    checks.floating(op, images=images)
    _check_maps(op, maps, images.shape[0])
    checks.same_device(op, images=images, maps=maps)
    _check_size(op, *images.shape[2:])


def erase_maximum(maps: Tensor, size: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """The largest value of a batch of class maps at pixel size: what `erase_soft` divides by.

    maps  [B, h, w] raw scores of one class per image, h, w >= 1; fp32, bf16, fp16 or fp64. Negative ones count as 0.
    size  (H, W) of the images in pixels, each at most 2^24; half-pixel centres, edges clamped.
    Returns a scalar >= 0, float32 (float64 for float64 maps); 0 without any pixel. Differentiable in `maps`: pixels
    that tie share the gradient evenly. Where several ranks hold one batch, give the maximum over them to `erase_soft`.
    Raises ValueError or TypeError for a wrong shape, dtype or size.
    """
    _check_maps("erase_maximum", maps, "B")
    height, width = (int(s) for s in size)
    _check_size("erase_maximum", height, width)
    maps = maps.to(checks.accumulate_dtype(maps))
    return choose("erase", maps.device, backend)("erase_maximum")(maps, height, width)


def erase_soft(images: Tensor, maps: Tensor, *, maximum: Tensor | None = None, backend: str | None = None) -> Tensor:
    """x (1 - psi), psi = Up(max(A, 0)) / (max + 1e-5): each pixel fades by its score relative to the whole batch.

    images   [B, 3, H, W], normalised: an erased pixel tends to 0, the mean colour; fp32, bf16, fp16 or fp64.
    maps     [B, h, w] raw scores A of the class to erase from each image, h, w >= 1, finite. Up resizes bilinearly to
             (H, W), each at most 2^24: half-pixel centres, edges clamped.
    maximum  scalar: the largest value of Up(max(A, 0)); None: `erase_maximum` of these maps. Where several ranks hold
             one batch: the maximum over the ranks of their `erase_maximum`.
    Returns [B, 3, H, W] in the dtype of `images`. Differentiable in `maps` and `maximum`, not in `images`; without
    `maximum` the gradient through it goes to the maps as well.
    Raises ValueError or TypeError for a wrong shape, dtype, size or device.
    Source: OC-CSE (Kweon et al., ICCV 2021), as used by P-NOC (arXiv 2305.12522): the input of the second classifier
    while the first one learns.
    """
    _check_images("erase_soft", images, maps)
    run = choose("erase", images.device, backend)
    dtype = checks.accumulate_dtype(images, maps)
    maps = maps.to(dtype)
    if maximum is None:
        maximum = run("erase_maximum")(maps, *images.shape[2:])
    else:
        checks.shape("erase_soft", "maximum", maximum)
        checks.floating("erase_soft", maximum=maximum)
        checks.same_device("erase_soft", images=images, maximum=maximum)
    wide = images.detach().to(dtype) if dtype == torch.float64 else images.detach()
    return run("erase_soft")(wide, maps, maximum.to(dtype)).to(images.dtype)


def erase_hard(images: Tensor, maps: Tensor, *, threshold: float = 0.2, backend: str | None = None) -> Tensor:
    """x where psi <= threshold, 0 elsewhere; psi = Up(max(A, 0)) / (max + 1e-5) with the maximum of each image.

    images     [B, 3, H, W], normalised: 0 is the mean colour; fp32, bf16, fp16 or fp64.
    maps       [B, h, w] raw scores A of the class to erase from each image, h, w >= 1, finite; resized as by
               `erase_soft`.
    threshold  in [0, 1].
    Returns [B, 3, H, W] in the dtype of `images`, without gradient.
    Raises ValueError or TypeError for a wrong shape, dtype, size, device or threshold.
    Source: P-NOC (arXiv 2305.12522): the input of the second classifier while it learns itself.
    """
    _check_images("erase_hard", images, maps)
    checks.number("erase_hard", "threshold", threshold, low=0.0, high=1.0)
    dtype = checks.accumulate_dtype(images, maps)
    wide = images.detach().to(dtype) if dtype == torch.float64 else images.detach()
    run = choose("erase", images.device, backend)("erase_hard")
    return run(wide, maps.detach().to(dtype), float(threshold)).to(images.dtype)
