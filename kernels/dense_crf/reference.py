"""Mean-field inference of the fully connected CRF in plain torch; the definition of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype, no_autocast
from kernels.lattice import Lattice, exact_filter, pixel_features


class ExactKernel:
    """weight * n_i K_ij n_j by true Gaussian sums; the O(n^2) oracle."""

    def __init__(self, features: Tensor, weight: float):
        self.features, self.weight = features, weight
        self.norm = (exact_filter(features, features.new_ones(len(features), 1)) + 1e-20).rsqrt()

    def filter(self, values: Tensor) -> Tensor:
        return self.weight * self.norm * exact_filter(self.features, self.norm * values)


def _kernel(features: Tensor, weight: float, mode: str) -> Lattice | ExactKernel:
    return Lattice(features).normalised(weight) if mode == "fast" else ExactKernel(features, weight)


@torch.no_grad()
def dense_crf(
    unary: Tensor,
    image: Tensor,
    spatial: tuple[float, float],
    bilateral: tuple[float, float, float],
    iterations: int,
    mode: str,
) -> Tensor:
    dtype = accumulate_dtype(unary)
    b, k, h, w = unary.shape
    out = torch.empty(unary.shape, dtype=dtype, device=unary.device)
    if out.numel() == 0:
        return out
    image = image.to(dtype)
    with no_autocast(unary):
        fixed = []
        if spatial[1] > 0:  # the same for all images
            fixed = [_kernel(pixel_features(image[0], spatial[0], None), spatial[1], mode)]
        for n in range(b):
            messages = list(fixed)
            if bilateral[2] > 0:
                messages.append(_kernel(pixel_features(image[n], *bilateral[:2]), bilateral[2], mode))
            negative = -unary[n].to(dtype).reshape(k, h * w).t().contiguous()  # [pixels, K]
            q = negative.softmax(dim=1)
            for _ in range(iterations):
                total = negative
                for message in messages:
                    total = total + message.filter(q)
                q = total.softmax(dim=1)
            out[n] = q.t().reshape(k, h, w)
    return out


def unary_from_probs(probs: Tensor, confidence: float | None, clip: float) -> Tensor:
    probs = probs.to(accumulate_dtype(probs))
    if confidence is not None:
        probs = confidence * probs + (1 - confidence) / probs.shape[1]
    return -probs.clamp(clip, 1.0).log()


def unary_from_labels(labels: Tensor, num_classes: int, confidence: float, ignore_index: int) -> Tensor:
    b, h, w = labels.shape
    ignored = (labels == ignore_index).unsqueeze(1)
    index = torch.where(ignored, 0, labels.long().unsqueeze(1))
    probs = torch.full((b, num_classes, h, w), (1 - confidence) / max(1, num_classes - 1), device=labels.device)
    probs.scatter_(1, index, confidence)
    return -torch.where(ignored, 1 / num_classes, probs).log()
