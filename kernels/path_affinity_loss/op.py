"""Path affinity loss: edges lie between classes, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.gradient import fake_outputs, register_gradient, wanted
from kernels.path_affinity_loss import reference

_LOSS, _COUNTS = "path_affinity_loss", "path_affinity_counts"
MAX_RADIUS = 16
MAX_LABEL = 32766


def _native(logits: Tensor, labels: Tensor, radius: int, ignore_index: int, counts: Tensor | None) -> Tensor:
    if logits.dtype == torch.float64:
        raise TypeError(f"{_LOSS}: the native backend takes fp32, bf16 and fp16; use backend='reference' for float64")
    with_gradient = wanted(logits)
    return torch.ops.wsss.path_affinity_loss(logits.float(), labels, radius, ignore_index, counts, with_gradient)[0]


def _native_counts(labels: Tensor, radius: int, ignore_index: int) -> Tensor:
    return torch.ops.wsss.path_affinity_counts(labels, radius, ignore_index)


if native_problem(_LOSS) is None:

    @torch.library.register_fake("wsss::path_affinity_loss")
    def _fake(edge_logits, labels, radius, ignore_index, counts, with_gradient):
        return fake_outputs(edge_logits, with_gradient)

    @torch.library.register_fake("wsss::path_affinity_counts")
    def _fake_counts(labels, radius, ignore_index):
        return labels.new_empty((3,), dtype=torch.int64)

    register_gradient("wsss::path_affinity_loss")


register(_LOSS, reference=reference.path_affinity_loss, native=_native)
register(_COUNTS, reference=reference.path_affinity_counts, native=_native_counts)


def _checked(op: str, labels: Tensor, radius: int, ignore_index: int) -> tuple[Tensor, int, int]:
    """The labels as int64, and both numbers as int."""
    checks.integral(op, labels=labels)
    if not 1 <= radius <= MAX_RADIUS or radius != int(radius):
        raise ValueError(f"{op}: radius must be an integer in [1, {MAX_RADIUS}], got {radius}")
    if ignore_index != int(ignore_index):
        raise ValueError(f"{op}: ignore_index must be an integer, got {ignore_index}")
    labels = labels.long()
    if labels.device.type == "cpu" and labels.numel() > 0 and not torch.compiler.is_compiling():
        low, high = torch.where(labels == ignore_index, 0, labels).aminmax()
        if low < 0 or high > MAX_LABEL:
            wrong = (low if low < 0 else high).item()
            raise ValueError(f"{op}: labels must lie in [0, {MAX_LABEL}] or be {ignore_index} (ignored), got {wrong}")
    return labels, int(radius), int(ignore_index)


def path_affinity_counts(
    labels: Tensor, *, radius: int = 10, ignore_index: int = 255, backend: str | None = None
) -> Tensor:
    """How many pairs of `path_affinity_loss` are background, foreground and negative.

    labels, radius, ignore_index  as for `path_affinity_loss`.
    Returns [3] int64. The sum over all ranks is what each of them hands to `path_affinity_loss` as `counts`.
    Raises ValueError or TypeError as `path_affinity_loss`.
    """
    checks.shape(_COUNTS, "labels", labels, "B", "h", "w")
    labels, radius, ignore_index = _checked(_COUNTS, labels, radius, ignore_index)
    return choose(_COUNTS, labels.device, backend)(labels, radius, ignore_index)


def path_affinity_loss(
    edge_logits: Tensor,
    labels: Tensor,
    *,
    radius: int = 10,
    ignore_index: int = 255,
    counts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1/4 sum_bg -ln(a + eps) / (n_bg + eps) + 1/4 sum_fg -ln(a + eps) / (n_fg + eps)
    + 1/2 sum_neg -ln(1 + eps - a) / (n_neg + eps), eps = 1e-5, over pairs of pixels closer than `radius`.

    The affinity of a pair is a = 1 - max of sigmoid(edge_logits) on the path between its pixels. Background: both have
    label 0; foreground: both have the same class; negative: different labels. A pair counts once: its first pixel, the
    upper or in one row the left one, lies in the rows 0 .. h - radius and the columns radius - 1 .. w - radius, so that
    each of these has all its partners.

    edge_logits   [B, 1, h, w] or [B, h, w], finite; fp32, bf16, fp16 or fp64 (the reference alone).
    labels        [B, h, w] integers: 0 background, 1..32766 classes, `ignore_index` = no pair with this pixel.
    radius        in pixels of the grid, integer in [1, 16]; 10: 152 directions, 5: 34, 1: none.
    counts        [3] int64, n_bg, n_fg, n_neg to divide by, >= 0. None: those of this call. With the counts of all
                  ranks the losses of the ranks add up to that of the whole batch.
    Returns a scalar float32 (float64 for float64 logits), differentiable in `edge_logits`; 0 with zero gradient without
    any pair. The gradient of a maximum goes to the first of the highest logits of the path, row by row.
    Raises ValueError or TypeError for a wrong shape, dtype, device, range or backend; on the CPU, and not inside
    torch.compile, also for logits that are not finite, labels out of range and negative counts (on CUDA the look at the
    values would stall the stream; labels out of range are ignored there).
    Source: IRN (Ahn et al., CVPR 2019), loss of the class boundaries, with the paths of its published code.
    """
    if isinstance(edge_logits, Tensor) and edge_logits.dim() == 3:
        checks.shape(_LOSS, "edge_logits", edge_logits, "B", "h", "w")
        logits = edge_logits
    else:
        checks.shape(_LOSS, "edge_logits", edge_logits, "B", 1, "h", "w")
        logits = edge_logits.squeeze(1)
    checks.shape(_LOSS, "labels", labels, *logits.shape)
    checks.floating(_LOSS, edge_logits=logits)
    checks.same_device(_LOSS, edge_logits=logits, labels=labels)
    labels, radius, ignore_index = _checked(_LOSS, labels, radius, ignore_index)
    checks.finite(_LOSS, edge_logits=logits)
    if counts is not None:
        checks.shape(_LOSS, "counts", counts, 3)
        checks.same_device(_LOSS, edge_logits=logits, counts=counts)
        if counts.dtype != torch.int64:
            raise TypeError(f"{_LOSS}: counts must be int64, got {counts.dtype}")
        if counts.device.type == "cpu" and not torch.compiler.is_compiling() and (counts < 0).any():
            raise ValueError(f"{_LOSS}: counts must be >= 0, got {counts.tolist()}")
    run = choose(_LOSS, logits.device, backend, pass_over=("native",) if logits.dtype == torch.float64 else ())
    return run(logits, labels, radius, ignore_index, counts)
