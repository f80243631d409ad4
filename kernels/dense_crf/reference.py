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


class GridKernel:
    """The same for f = (x, y) / sigma on a grid of h * w pixels: a sum along the rows, then one across them."""

    def __init__(self, image: Tensor, sigma: float, weight: float):
        self.weight = weight
        self.across, self.along = (self._axis(image, size, sigma) for size in image.shape[-2:])
        self.norm = (self.across.sum(1)[:, None] * self.along.sum(1) + 1e-20).rsqrt().reshape(-1, 1)

    @staticmethod
    def _axis(image: Tensor, size: int, sigma: float) -> Tensor:
        place = torch.arange(size, device=image.device, dtype=image.dtype)
        return torch.exp(-0.5 * ((place[:, None] - place) / sigma).square())

    def filter(self, values: Tensor) -> Tensor:
        h, w = len(self.across), len(self.along)
        sums = self.along @ (self.norm * values).reshape(h, w, -1)
        sums = (self.across @ sums.reshape(h, -1)).reshape(h * w, -1)
        return self.weight * self.norm * sums


def _spatial(image: Tensor, sigma: float, weight: float, mode: str) -> Lattice | GridKernel:
    if mode == "fast":
        return Lattice(pixel_features(image, sigma, None)).normalised(weight)
    return GridKernel(image, sigma, weight)


def _bilateral(image: Tensor, sigma_xy: float, sigma_rgb: float, weight: float, mode: str) -> Lattice | ExactKernel:
    features = pixel_features(image, sigma_xy, sigma_rgb)
    if mode == "exact":
        return ExactKernel(features, weight)
    return Lattice(features, ring=mode == "ring").normalised(weight)


@torch.no_grad()
def dense_crf(
    unary: Tensor,
    image: Tensor,
    spatial: tuple[float, float],
    bilateral: tuple[float, float, float],
    iterations: int,
    mode: str,
    prune: float = 0.0,
    sizes: list[tuple[int, int]] | None = None,
) -> Tensor:
    dtype = accumulate_dtype(unary)
    out = torch.zeros(unary.shape, dtype=dtype, device=unary.device)
    if out.numel() == 0:
        return out
    image = image.to(dtype)
    with no_autocast(unary):
        fixed = {}  # the spatial kernel, one per size
        for n, (h, w) in enumerate(sizes or [unary.shape[-2:]] * len(unary)):
            if h * w == 0:
                continue
            own = image[n, :, :h, :w]
            messages = []
            if spatial[1] > 0:
                if (h, w) not in fixed:
                    fixed[h, w] = _spatial(own, *spatial, mode)
                messages.append(fixed[h, w])
            if bilateral[2] > 0:
                messages.append(_bilateral(own, *bilateral, mode))
            negative = -unary[n, :, :h, :w].to(dtype).flatten(1).t().contiguous()  # [pixels, K]
            q = _mean_field(negative, messages, iterations, prune)
            out[n, :, :h, :w] = q.t().reshape(-1, h, w)
    return out


def _mean_field(
    negative: Tensor, messages: list[Lattice | GridKernel | ExactKernel], iterations: int, prune: float
) -> Tensor:
    """negative = -U [pixels, K] -> Q [pixels, K]."""
    q = negative.softmax(dim=1)
    live = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
    if prune > 0 and messages:
        ones = torch.ones_like(q[:, :1])
        reach = sum(message.filter(ones) for message in messages).amax()  # message of a class with Q = 1 everywhere
        live = q.amax(dim=0) * reach >= prune
    if not messages or not live.any():
        return q
    for _ in range(iterations):
        values = q[:, live]
        total = negative.clone()
        for message in messages:
            total[:, live] += message.filter(values)
        q = total.softmax(dim=1)
    return q


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
