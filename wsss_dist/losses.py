"""Functional losses that more than one method uses. Every loss stays finite, with its graph, when nothing is valid.

Letters: B batch, C foreground classes, K = C + 1, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tag_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft margin of logits [B, C] against tags [B, C] in {0, 1}: mean over classes and images."""
    return F.multilabel_soft_margin_loss(logits.float(), labels)


def squared_softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of softmax(logits) [B, C] to y / |y|_1 of tags y [B, C] in {0, 1}: sum over classes, mean over
    images; an image without tags counts as 0. Source: HCP (TPAMI 2016), the loss of AE-PSL (CVPR 2017)."""
    tags = labels.sum(1)
    target = labels / tags.clamp_min(1)[:, None]
    distance = (logits.float().softmax(1) - target).square().sum(1)
    return torch.where(tags > 0, distance, 0.0).mean()


def squared_sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of sigmoid(logits) [B, C] to tags [B, C] in {0, 1}, mean over classes and images."""
    return (logits.float().sigmoid() - labels).square().mean()


def balanced_segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy with background and foreground averaged apart, half each (ToCo and PCRE, L_seg).

    Args:
        logits: [B, K, H, W].
        labels: [B, H, W] int64, 0 background, 1..C classes, `ignore_index` elsewhere.
    """
    ce = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")
    background = (labels == 0).float()
    foreground = ((labels != 0) & (labels != ignore_index)).float()
    return 0.5 * sum((ce * part).sum() / (part.sum() + 1e-6) for part in (background, foreground))


def mask_bce(masks: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of probabilities against {0, 1} targets per pixel, logs clamped at -100, no reduction.

    A pixel whose probability is exactly 0 or 1 gets exactly zero gradient (never NaN, whatever the precision).
    """
    inside = (masks > 0) & (masks < 1)
    safe = torch.where(inside, masks.float(), 0.5)
    loss = -(targets * safe.log().clamp(min=-100.0) + (1 - targets) * (-safe).log1p().clamp(min=-100.0))
    wrong = torch.where(masks > 0.5, 1 - targets, targets) * 100.0
    return torch.where(inside, loss, wrong)
