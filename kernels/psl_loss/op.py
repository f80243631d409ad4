"""Prohibitive segmentation loss: a network learns from a mask and, where the tags do not forbid it, from itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.psl_loss import reference

_OP = "psl_loss"
MAX_CLASSES = 255  # the mask is uint8
ROUNDING = 1e-5  # by which a softmax may exceed 1


class PSLLoss(NamedTuple):
    """What `psl_loss` returns, per image; the losses are differentiable in the logits."""

    labelled: Tensor  # [B] J(f, labels), float32 (float64 for float64 logits)
    online: Tensor  # [B] J(f, mask), the same
    mask: Tensor  # [B, H, W] uint8, 0..C: the online mask, classes absent from the image among them
    labelled_pixels: Tensor  # [B] int64: pixels that `labelled` averages
    online_pixels: Tensor  # [B] int64; 1 - online_pixels / (H W) is the prohibited share of the mask


def _reference(
    logits: Tensor, log_weights: Tensor, labels: Tensor, present: Tensor, ignore_index: int
) -> reference.Terms:
    checks.finite(_OP, logits=logits)
    if labels.device.type == "cpu" and labels.numel() > 0 and not torch.compiler.is_compiling():
        low, high = torch.where(labels == ignore_index, 0, labels).aminmax()
        if low < 0 or high >= logits.shape[1]:
            wrong = (low if low < 0 else high).item()
            raise ValueError(
                f"{_OP}: labels must lie in [0, {logits.shape[1] - 1}] or be {ignore_index} (ignored), got {wrong}"
            )
    return reference.psl_loss(logits, log_weights, labels, present, ignore_index)


def _native(logits: Tensor, log_weights: Tensor, labels: Tensor, present: Tensor, ignore_index: int) -> reference.Terms:
    if logits.dtype == torch.float64:
        raise TypeError(f"{_OP}: the native backend takes fp32, bf16 and fp16; use backend='reference' for float64")
    return torch.ops.wsss.psl_loss(logits, log_weights, labels, present, ignore_index)


def _setup(ctx, inputs, output):
    logits, _, labels, present, ctx.ignore_index = inputs
    _, _, mask, counts = output
    ctx.save_for_backward(logits, labels, present, mask, counts)
    ctx.mark_non_differentiable(mask, counts)
    ctx.set_materialize_grads(False)


def _gradient(ctx, labelled, online, *_):
    if labelled is None and online is None:
        return (None,) * 5
    logits, labels, present, mask, counts = ctx.saved_tensors
    zero = torch.zeros_like(online if labelled is None else labelled)
    flows = (zero if x is None else x for x in (labelled, online))
    backward = torch.ops.wsss.psl_loss_backward
    return backward(*flows, logits, labels, present, mask, counts, ctx.ignore_index), None, None, None, None


def _second_gradient(ctx, *grads):
    raise RuntimeError(f"{_OP}: the gradient itself is not differentiable")


if native_problem(_OP) is None:

    @torch.library.register_fake("wsss::psl_loss")
    def _fake(logits, log_weights, labels, present, ignore_index):
        batch, _, height, width = logits.shape
        losses = (logits.new_empty((batch,), dtype=torch.float32) for _ in range(2))
        mask = logits.new_empty((batch, height, width), dtype=torch.uint8)
        return *losses, mask, logits.new_empty((batch, 2), dtype=torch.int64)

    @torch.library.register_fake("wsss::psl_loss_backward")
    def _fake_backward(labelled, online, logits, labels, present, mask, counts, ignore_index):
        return logits.new_empty(logits.shape)

    torch.library.register_autograd("wsss::psl_loss", _gradient, setup_context=_setup)
    torch.library.register_autograd("wsss::psl_loss_backward", _second_gradient)


register(_OP, reference=_reference, native=_native)


def _log_weights(confidences: Tensor, dtype: torch.dtype) -> Tensor:
    """ln w [B, K], w = [1, v]. By way of fp64, where the last bit of a logarithm does not matter."""
    if confidences.device.type == "cpu" and confidences.numel() > 0 and not torch.compiler.is_compiling():
        low, high = confidences.aminmax()
        if not (low >= 0 and high <= 1 + ROUNDING):
            raise ValueError(f"{_OP}: confidences must lie in [0, 1], got {(high if low >= 0 else low).item()}")
    return torch.nn.functional.pad(confidences.detach().double().log().to(dtype), (1, 0))


def psl_loss(
    logits: Tensor,
    confidences: Tensor,
    labels: Tensor,
    present: Tensor,
    *,
    ignore_index: int = 255,
    backend: str | None = None,
) -> PSLLoss:
    """J(f, labels) and J(f, mask) of each image, J(f, Q) = -1/N sum_u ln f[Q(u)] over the N pixels u that are counted:
    Q(u) is background or a class that is present. f = softmax(logits), mask(u) = argmax_k w_k f_k(u), w = [1, v].

    logits        [B, K, H, W], K = C + 1 of 1 to 255 classes with background first, finite; fp32, bf16, fp16 or fp64
                  (the reference alone).
    confidences   [B, C] v in [0, 1] of the image-level classifier, floating point. A constant: no gradient goes there,
                  nor through the mask. Classes with confidence 0 never win; ones: argmax of f alone.
    labels        [B, H, W] integers at the size of the logits: 0 background, 1..C classes, `ignore_index`: not counted.
    present       [B, C] bool or number, > 0 where the image has the class. The mask may name any class, present or not;
                  what neither is present nor background has no loss, in the labels too.
    Returns a PSLLoss. The loss of a step is the mean of `labelled + online` over the batch; a sum without any pixel is
    0 with zero gradient. Nothing is shared between images, so the mean over ranks of equal batches is exact.
    The mask takes the first of the classes that tie. Gradient: dJ / dlogit_k = (f_k - [k = Q(u)]) / N at counted
    pixels, 0 elsewhere.
    Raises ValueError or TypeError for a wrong shape, dtype, device or backend; on the CPU also for logits that are not
    finite and labels or confidences out of range (on CUDA the look at the values would stall the stream; labels out of
    range are not counted there. Inside torch.compile only the native backend looks at logits and labels).
    Source: Wei et al., "Object Region Mining with Adversarial Erasing", CVPR 2017, section 3.2.
    """
    checks.shape(_OP, "logits", logits, "B", "K", "H", "W")
    checks.floating(_OP, logits=logits)
    b, k, h, w = logits.shape
    if not 1 <= k <= MAX_CLASSES:
        raise ValueError(f"{_OP}: logits must have 1 to {MAX_CLASSES} classes, got {k}")
    checks.shape(_OP, "confidences", confidences, b, k - 1)
    checks.floating(_OP, confidences=confidences)
    checks.shape(_OP, "labels", labels, b, h, w)
    checks.integral(_OP, labels=labels)
    checks.shape(_OP, "present", present, b, k - 1)
    checks.real(_OP, present=present)
    checks.same_device(_OP, logits=logits, confidences=confidences, labels=labels, present=present)
    if ignore_index != int(ignore_index):
        raise ValueError(f"{_OP}: ignore_index must be an integer, got {ignore_index}")
    log_weights = _log_weights(confidences, checks.accumulate_dtype(logits))
    run = choose(_OP, logits.device, backend, pass_over=("native",) if logits.dtype == torch.float64 else ())
    labelled, online, mask, counts = run(logits, log_weights, labels.long(), present > 0, int(ignore_index))
    return PSLLoss(labelled, online, mask, counts[:, 0], counts[:, 1])
