"""Argument checks shared by the ops. Each error names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

HALF_OR_FULL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(op: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """`x` has these dimensions; an int is a size that must match, a str is a letter that stands for any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout}")
    fits = x.dim() == len(wanted) and all(isinstance(w, str) or s == w for s, w in zip(x.shape, wanted, strict=False))
    if not fits:
        text = ", ".join(str(w) for w in wanted)
        raise ValueError(f"{op}: {name} must be [{text}], got {tuple(x.shape)}")


def floating(op: str, **tensors: Tensor) -> None:
    """Each tensor is fp32, fp64, bf16 or fp16."""
    for name, x in tensors.items():
        if x.dtype not in HALF_OR_FULL:
            raise TypeError(f"{op}: {name} must be floating point (fp32, fp64, bf16, fp16), got {x.dtype}")


def real(op: str, **tensors: Tensor) -> None:
    """No tensor is complex."""
    for name, x in tensors.items():
        if x.is_complex():
            raise TypeError(f"{op}: {name} must hold real numbers, got {x.dtype}")


def integral(op: str, **tensors: Tensor) -> None:
    """Each tensor holds integers (not bool)."""
    for name, x in tensors.items():
        if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
            raise TypeError(f"{op}: {name} must hold integers, got {x.dtype}")


def same_device(op: str, **tensors: Tensor) -> None:
    """All tensors live on one device."""
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{op}: tensors must be on one device, got " + ", ".join(f"{n} on {d}" for n, d in devices.items())
        )


def number(
    op: str, name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open: bool = False
) -> None:
    """`value` is a finite number in [low, high], or in (low, high) if `open`."""
    inside = math.isfinite(value) and (low < value < high if open else low <= value <= high)
    if not inside:
        brackets = "()" if open else "[]"
        raise ValueError(f"{op}: {name} must lie in {brackets[0]}{low}, {high}{brackets[1]}, got {value}")


def grid(op: str, value: Sequence[int], num_patches: int) -> tuple[int, int]:
    """`value` is (h, w) with h * w = num_patches."""
    h, w = (int(v) for v in value)
    if h * w != num_patches:
        raise ValueError(f"{op}: grid must have h * w = {num_patches} patches, got ({h}, {w})")
    return h, w


def finite(op: str, **tensors: Tensor) -> None:
    """No tensor holds NaN or infinity. Tensors off the CPU are not looked at, which would stall their stream, nor is
    anything inside torch.compile."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        # the extremes show NaN and infinity, several times cheaper than isfinite of every value
        if x.device.type == "cpu" and x.numel() > 0 and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor has it (tests, oracles), else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside, matrix products keep the dtype of their operands on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)
