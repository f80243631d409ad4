"""Floating-point operations of a training step, and the rate that the device could do them at.

Counted are matrix products, convolutions and attention, a multiply-add as two, forward and backward, by
torch.utils.flop_counter. Operators of this repository, norms and the like are not: what has no such product is no
model flop. The scores that attention computes once more in its backward pass are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from kernels.measure import clock, seconds

# dense, without sparsity, in 1e12 operations per second, from the data sheets; bf16 and tf32 on tensor cores.
# The first entry whose words are all in the name of the device counts.
PEAKS = {
    "H200 NVL": {"bf16": 835, "tf32": 417, "fp32": 60},
    "H200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "tf32": 417, "fp32": 60},
    "H100": {"bf16": 989, "tf32": 494, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
}
REPEATS, SIDES = 7, {"cpu": 1536, "cuda": 8192}


def arithmetic(precision: str, convolutions: bool) -> str:
    """What a training on a GPU is computed in, "fp32", "tf32" or "bf16".

    Args:
        precision: `train.precision`. Of fp32 torch makes tf32 where it may: in convolutions, unless told not to, in
            matrix products only when told to.
        convolutions: is the most of it convolutions?
    """
    if precision != "fp32":
        return precision
    allowed = torch.backends.cudnn.allow_tf32 if convolutions else torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "fp32"


def mostly_convolutions(method: nn.Module) -> bool:
    """Are more than half of a method's weights those of convolutions?"""
    inside = sum(p.numel() for m in method.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())
    return inside > sum(p.numel() for p in method.parameters()) / 2


def peak(device: torch.device, precision: str, convolutions: bool) -> dict[str, Any]:
    """The rate of a device: {"flops_per_s", "kind" of the arithmetic, "source"}.

    From `PEAKS` where the device is in it, else the best of some products of square matrices.

    Args:
        device: where the training runs.
        precision, convolutions: see `arithmetic`.
    """
    kind = arithmetic(precision, convolutions) if device.type == "cuda" else precision
    words = re.split(r"[\s-]", torch.cuda.get_device_name(device)) if device.type == "cuda" else []
    for known, rates in PEAKS.items():
        if "MIG" not in words and all(word in words for word in known.split()):
            return {"flops_per_s": 1e12 * rates[kind], "kind": kind, "source": f"data sheet of {known}"}
    source = f"measured, products of {_side(device)}"
    return {"flops_per_s": _measured(device, kind), "kind": kind, "source": source}


def _side(device: torch.device) -> int:
    return SIDES.get(device.type, SIDES["cpu"])


def _measured(device: torch.device, kind: str) -> float:
    """Operations per second of a product of square matrices, the best of a few."""
    side, before = _side(device), torch.get_float32_matmul_precision()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high" if kind == "tf32" else before)
    try:
        torch.mm(a, b)
        return 2 * side**3 / min(seconds(lambda: torch.mm(a, b), device)[clock(device)] for _ in range(REPEATS))
    finally:
        torch.set_float32_matmul_precision(before)


def _conv_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Each of the two gradients takes what the convolution itself took; torch's formula forgets the groups in one."""
    *_, transposed, _, _, wanted = rest
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed)


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts what is done inside; attention on the CPU too, which torch's table lacks."""
    aten = torch.ops.aten
    table: dict[Any, Any] = {aten.convolution_backward: _conv_backward}
    for name, count in (("", sdpa_flop_count), ("_backward", sdpa_backward_flop_count)):
        operator = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{name}", None)
        if operator is not None:
            shift = 1 if name else 0  # the backward operator has the gradient in front
            table[operator] = lambda *shapes, count=count, shift=shift, out_shape=None, **_: count(*shapes[: 3 + shift])
    with FlopCounterMode(display=False, custom_mapping=table) as counter:
        yield counter
