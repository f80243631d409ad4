"""Segmentation metrics from one confusion matrix over the whole set; exact on any number of ranks.

C foreground classes, K = C + 1 with background (0), H W pixels, T thresholds. Counts are int64, so the sum over images
and over ranks does not depend on the order: 1 rank and N ranks give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsss_dist import dist

SWEEP = tuple(i / 20 for i in range(1, 20))  # 0.05, 0.10, ..., 0.95


class ConfusionMatrix:
    """n[g, p] = pixels of ground-truth class g that were predicted as class p, over everything seen so far."""

    def __init__(self, num_classes: int, counts: Tensor | None = None) -> None:
        """num_classes is K, background included; counts [K, K] int64 starts from given counts (zeros if None)."""
        assert counts is None or (tuple(counts.shape) == (num_classes, num_classes) and counts.dtype == torch.int64)
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64) if counts is None else counts

    def update(self, pred: Tensor, gt: Tensor) -> None:
        """Add the pixels of one or more images.

        Args:
            pred: [..., H, W] integer labels, every one in 0..K-1.
            gt: the same shape; labels outside 0..K-1 (255 = ignore) are dropped.
        """
        assert pred.shape == gt.shape, f"prediction {tuple(pred.shape)} and truth {tuple(gt.shape)} differ in shape"
        k = self.num_classes
        gt, pred = gt.reshape(-1).long(), pred.reshape(-1).long()
        assert pred.numel() == 0 or (0 <= int(pred.min()) and int(pred.max()) < k), f"prediction outside 0..{k - 1}"
        valid = (gt >= 0) & (gt < k)
        counts = torch.bincount(gt[valid] * k + pred[valid], minlength=k * k).reshape(k, k)
        self.counts = self.counts.to(counts.device) + counts

    def reduced(self) -> ConfusionMatrix:
        """The sum over all ranks (a collective call: every rank has to make it)."""
        return ConfusionMatrix(self.num_classes, dist.all_reduce_sum(self.counts))

    def iou(self) -> Tensor:
        """IoU per class [K] float64, TP / (TP + FP + FN); nan where the class is in neither truth nor prediction."""
        return _ratio(self._tp(), self._gt() + self._pred() - self._tp())

    def miou(self) -> float:
        """Mean IoU over the classes that the ground truth holds; nan for an empty matrix."""
        return _mean(self.iou()[self._gt() > 0])

    def pixel_accuracy(self) -> float:
        """Share of the valid pixels with the right label."""
        return float(_ratio(self._tp().sum(), self.counts.sum()))

    def precision(self) -> Tensor:
        """TP / (TP + FP) per class [K]; nan where the class was never predicted."""
        return _ratio(self._tp(), self._pred())

    def recall(self) -> Tensor:
        """TP / (TP + FN) per class [K]; nan where the class is not in the ground truth."""
        return _ratio(self._tp(), self._gt())

    def oa(self) -> Tensor:
        """Over-activation rate per class [K]: FP / TP, lower is better (the measure usual since SEAM, CVPR 2020).

        nan where the class was never predicted, inf where it was predicted but never rightly.
        """
        return _ratio(self._pred() - self._tp(), self._tp())

    def oa_bg(self) -> Tensor:
        """Share of the pixels predicted as class c that are background, per class [K]; 0 is background itself: nan."""
        share = _ratio(self.counts[0], self._pred())
        share[0] = math.nan
        return share

    def _tp(self) -> Tensor:
        return self.counts.diagonal()

    def _gt(self) -> Tensor:
        return self.counts.sum(1)

    def _pred(self) -> Tensor:
        return self.counts.sum(0)

    def summary(self) -> dict:
        """All metrics as plain numbers for JSON: fractions, None where undefined, lists in class order (0 background).

        The means of `oa` and `oa_bg` run over the foreground classes where the value is a finite number; `oa_left_out`
        lists the foreground classes of the ground truth for which OA is not (no pixel of theirs was found), because a
        low mean over few classes would mislead.
        """
        oa, oa_bg = self.oa(), self.oa_bg()
        present = self._gt() > 0
        left_out = [c for c in range(1, self.num_classes) if present[c] and not math.isfinite(oa[c])]
        return {
            "miou": _plain(self.miou()),
            "pixel_accuracy": _plain(self.pixel_accuracy()),
            "oa": _plain(_mean(oa[1:][torch.isfinite(oa[1:])])),
            "oa_bg": _plain(_mean(oa_bg[1:][torch.isfinite(oa_bg[1:])])),
            "oa_left_out": left_out,
            "iou_per_class": [_plain(v) for v in self.iou().tolist()],
            "precision_per_class": [_plain(v) for v in self.precision().tolist()],
            "recall_per_class": [_plain(v) for v in self.recall().tolist()],
            "oa_per_class": [_plain(v) for v in oa.tolist()],
            "oa_bg_per_class": [_plain(v) for v in oa_bg.tolist()],
            "gt_pixels_per_class": self._gt().tolist(),
        }


class ThresholdSweep:
    """Confusion matrices of CAM labels for many thresholds from one pass over the pixels.

    The label of a pixel at threshold t is 1 + argmax_c cam[c] where max_c cam[c] > t, else 0. One histogram
    n[g, c, level] is kept, level = how many thresholds lie strictly below the value; every matrix is a sum of it.
    """

    def __init__(self, num_classes: int, thresholds: tuple[float, ...] = SWEEP) -> None:
        """num_classes is K, background included; thresholds in any order, doubles are merged."""
        self.num_classes = num_classes
        self.thresholds = tuple(sorted(set(thresholds)))
        size = (num_classes, num_classes, len(self.thresholds) + 1)
        self.counts = torch.zeros(size, dtype=torch.int64)

    def update(self, value: Tensor, label: Tensor, gt: Tensor) -> None:
        """Add the pixels of one or more images.

        Args:
            value: [..., H, W] float, max over classes of the CAM.
            label: [..., H, W] integer in 1..C, the class it belongs to (any class where value is 0).
            gt: [..., H, W] integer; labels outside 0..K-1 are dropped.
        """
        assert value.shape == label.shape == gt.shape
        k, levels = self.num_classes, len(self.thresholds) + 1
        value, label, gt = value.reshape(-1).float(), label.reshape(-1).long(), gt.reshape(-1).long()
        valid = (gt >= 0) & (gt < k)
        value, label, gt = value[valid], label[valid], gt[valid]
        assert label.numel() == 0 or (1 <= int(label.min()) and int(label.max()) < k), f"CAM class outside 1..{k - 1}"
        edges = torch.tensor(self.thresholds, dtype=torch.float32, device=value.device)
        level = torch.bucketize(value, edges)  # counts the edges < value: a value on an edge is not above it
        counts = torch.bincount((gt * k + label) * levels + level, minlength=k * k * levels).reshape(k, k, levels)
        self.counts = self.counts.to(counts.device) + counts

    def reduced(self) -> ThresholdSweep:
        """The sum over all ranks (a collective call: every rank has to make it)."""
        total = ThresholdSweep(self.num_classes, self.thresholds)
        total.counts = dist.all_reduce_sum(self.counts)
        return total

    def at(self, threshold: float) -> ConfusionMatrix:
        """The confusion matrix of the labels at one of the thresholds."""
        i = self.thresholds.index(threshold)
        counts = self.counts[..., i + 1 :].sum(-1)
        counts[:, 0] += self.counts[..., : i + 1].sum(dim=(1, 2))
        return ConfusionMatrix(self.num_classes, counts)

    def best(self, among: tuple[float, ...] = SWEEP) -> tuple[float, ConfusionMatrix]:
        """The threshold with the highest mIoU (ties: the lowest) and its matrix: an oracle, it looks at the truth."""
        scores = {t: self.at(t).miou() for t in among}
        threshold = max(scores, key=lambda t: -1.0 if math.isnan(scores[t]) else scores[t])
        return threshold, self.at(threshold)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """float64 quotient; 0/0 is nan, x/0 is inf."""
    return numerator.double() / denominator.double()


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
