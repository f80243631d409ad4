"""Pixel-adaptive refinement (PAR): smooths class maps along the colours of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.par import reference


def _native(image: Tensor, maps: Tensor, dilations: tuple[int, ...], iterations: int) -> Tensor:
    if torch.float64 in (image.dtype, maps.dtype):
        raise TypeError("par: the native backend computes in fp32; use backend='reference' for float64")
    place = reference.position_weights(dilations)
    return torch.ops.wsss.par(image.float(), maps.float(), list(dilations), place, iterations)


if native_problem("par") is None:

    @torch.library.register_fake("wsss::par")
    def _fake(image, maps, dilations, position_weights, iterations):
        return maps.new_empty(maps.shape)


register("par", reference=reference.par, native=_native)


def par(
    image: Tensor,
    maps: Tensor,
    *,
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    backend: str | None = None,
) -> Tensor:
    """Refine class maps by repeated colour-weighted averages over 8 directions times the dilations.

    image       [B, 3, H, W], in [0, 1], fp32, bf16 or fp16 (fp64: reference alone).
    maps        [B, C, H, W], any range; all C share the weights of their image.
    dilations   1 to 32 distances of the taps in pixels, each >= 1, < 2^31; neighbours beyond the border are clamped to
                it.
    iterations  number of sweeps, >= 0.
    Returns [B, C, H, W] float32 (float64 for float64 inputs), without gradient. The weights of a pixel sum to 1.01,
    so a constant map grows by that factor per sweep.
    Raises ValueError or TypeError for a wrong shape, dtype, device or range, or a backend that cannot run; on the CPU,
    and not inside torch.compile, also for an image that is not finite.
    Source: AFA (Ru et al., CVPR 2022), section 3.4, as used by ToCo and PCRE.
    """
    checks.shape("par", "image", image, "B", 3, "H", "W")
    checks.shape("par", "maps", maps, image.shape[0], "C", image.shape[2], image.shape[3])
    checks.floating("par", image=image, maps=maps)
    checks.same_device("par", image=image, maps=maps)
    dilations = tuple(int(d) for d in dilations)
    if not 1 <= len(dilations) <= 32 or not all(1 <= d < 2**31 for d in dilations):
        raise ValueError(f"par: dilations must be 1 to 32 integers >= 1 and < 2^31, got {dilations}")
    if iterations < 0:
        raise ValueError(f"par: iterations must be >= 0, got {iterations}")
    checks.finite("par", image=image)
    return choose("par", image.device, backend)(image.detach(), maps.detach(), dilations, iterations)
