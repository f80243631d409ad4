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
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from kernels.measure import clock, seconds

# dense, without sparsity, in 1e12 operations per second, from the data sheets; bf16 and tf32 on tensor cores.
# The first entry whose words are all in the name of the device counts.
PEAKS = {
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


def peak(device: torch.device, precision: str) -> dict[str, Any]:
    """The rate of a device: {"flops_per_s", "kind" of the arithmetic, "source"}.

    From `PEAKS` where the device is in it, else the best of some products of square matrices.

    Args:
        device: where the training runs.
        precision: `train.precision`; fp32 is tf32 where torch is set to use it.
    """
    kind = precision
    if precision == "fp32" and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    words = re.split(r"[\s-]", torch.cuda.get_device_name(device)) if device.type == "cuda" else []
    for known, rates in PEAKS.items():
        if "MIG" not in words and all(word in words for word in known.split()):
            return {"flops_per_s": 1e12 * rates[kind], "kind": kind, "source": f"data sheet of {known}"}
    source = f"measured, products of {_side(device)}"
    return {"flops_per_s": _measured(device, precision), "kind": kind, "source": source}


def _side(device: torch.device) -> int:
    return SIDES.get(device.type, SIDES["cpu"])


def _measured(device: torch.device, precision: str) -> float:
    """Operations per second of a product of square matrices, the best of a few."""
    side = _side(device)
    a, b = (torch.rand(side, side, device=device).to(getattr(torch, _DTYPES[precision])) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b), device)[clock(device)] for _ in range(REPEATS))


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


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
