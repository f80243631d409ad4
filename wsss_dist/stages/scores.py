"""Scores of what a stage made, at the native size, on the splits that have masks.

They are read from the files, so that a stage that was killed in the middle scores what an unbroken one scores. The
ranks share the images, whoever is free takes the next ones; integer counts alone travel between them.

H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wsss_dist import dist
from wsss_dist.data.dataset import Dataset
from wsss_dist.metrics import SWEEP, ConfusionMatrix, ThresholdSweep
from wsss_dist.stages.base import Scores, Stage

# background thresholds that the CAM papers sweep: 0.05 to 0.80
THRESHOLDS = tuple(t for t in SWEEP if t <= 0.8)
IGNORE = 255


def score_maps(
    stage: Stage, read: Callable[[str, str, tuple[int, int], Tensor], Scores | None], kind: str
) -> dict[str, dict[str, Any]]:
    """mIoU of score maps at the best of the thresholds 0.05 .. 0.80; an image without maps is background.

    Args:
        stage: the stage.
        read: (split, id, size, tags [C]) -> the scores of an image.
        kind: name of the result.
    Returns:
        split -> {kind: metrics with "threshold"}.
    """
    out = {}
    for split, dataset, rows in _scored(stage):
        sweep = ThresholdSweep(len(dataset.class_names) + 1, THRESHOLDS)
        with dist.shared(len(rows)) as mine:
            for row in (rows[k] for k in mine):
                truth = torch.from_numpy(dataset.mask(row)).to(dist.device())
                labels = torch.from_numpy(dataset.labels(row))
                scores = read(split, dataset.id(row), tuple(truth.shape), labels)
                if scores is None or not len(scores.classes):
                    sweep.update(torch.zeros(truth.shape, device=truth.device), torch.ones_like(truth), truth)
                else:
                    value, best = scores.maps.max(0)
                    sweep.update(value, scores.classes[best] + 1, truth)
        threshold, matrix = sweep.reduced().best(THRESHOLDS)
        out[split] = {kind: {**matrix.summary(), "threshold": threshold}}
    return out


def score_labels(
    stage: Stage, read: Callable[[str, str, tuple[int, int]], Tensor], kind: str, classes: int | None = None
) -> dict[str, dict[str, Any]]:
    """mIoU of label maps; undecided pixels (255) are left out, and their share is given.

    Args:
        stage: the stage.
        read: (split, id, size) -> labels [H, W] of an image, 255 undecided.
        kind: name of the result.
        classes: 1: the truth is any class against background; None: the classes of the data set.
    Returns:
        split -> {kind: metrics with "ignored"}.
    """
    out = {}
    for split, dataset, rows in _scored(stage):
        matrix = ConfusionMatrix((classes or len(dataset.class_names)) + 1)
        undecided = torch.zeros(2, dtype=torch.int64)
        with dist.shared(len(rows)) as mine:
            for row in (rows[k] for k in mine):
                truth = torch.from_numpy(dataset.mask(row)).to(dist.device())
                labels = read(split, dataset.id(row), tuple(truth.shape)).to(truth.device)
                if classes == 1:
                    truth = torch.where(truth == IGNORE, IGNORE, (truth > 0).to(truth.dtype))
                open_ = labels == IGNORE
                undecided += torch.stack([(open_ & (truth != IGNORE)).sum(), (truth != IGNORE).sum()]).cpu()
                matrix.update(labels.masked_fill(open_, 0), truth.masked_fill(open_, IGNORE))
        left, total = dist.all_reduce_sum(undecided).tolist()
        out[split] = {kind: {**matrix.reduced().summary(), "ignored": left / total if total else None}}
    return out


def score_regions(
    stage: Stage, read: Callable[[str, str, tuple[int, int], int], tuple[Tensor, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Precision and recall of regions per tag, over all pixels and tags; mIoU of the pixels that one region claims.

    Args:
        stage: the stage.
        read: (split, id, size, number of classes) -> tags [K] and regions bool [K, H, W].
    Returns:
        split -> {"regions": metrics with "region_precision", "region_recall", "region_share"}, fractions: of the
        claimed pixels those of the tag, of the tag's pixels those claimed, of all pixels those claimed by any tag.
    """
    out = {}
    for split, dataset, rows in _scored(stage):
        matrix = ConfusionMatrix(len(dataset.class_names) + 1)
        counts = torch.zeros(5, dtype=torch.int64)  # hits, claimed, true pixels, claimed by any, all
        with dist.shared(len(rows)) as mine:
            for row in (rows[k] for k in mine):
                truth = torch.from_numpy(dataset.mask(row)).to(dist.device())
                classes, regions = read(split, dataset.id(row), tuple(truth.shape), len(dataset.class_names))
                valid = truth != IGNORE
                own = (truth == classes[:, None, None] + 1) & valid
                regions = regions & valid
                claims = regions.sum(0)
                tagged = (truth > 0) & valid
                sums = [(regions & own).sum(), regions.sum(), tagged.sum(), (claims > 0).sum(), valid.sum()]
                counts += torch.stack(sums).cpu()
                names = torch.cat([classes + 1, classes.new_zeros(1)])
                first = torch.cat([regions, torch.ones_like(valid)[None]]).int().argmax(0)
                matrix.update(torch.where(claims == 1, names[first], 0), truth)
        hits, claimed, true, area, pixels = dist.all_reduce_sum(counts).tolist()
        out[split] = {
            "regions": {
                **matrix.reduced().summary(),
                "region_precision": hits / claimed if claimed else None,
                "region_recall": hits / true if true else None,
                "region_share": area / pixels if pixels else None,
            }
        }
    return out


def _scored(stage: Stage) -> list[tuple[str, Dataset, list[int]]]:
    """Split, data set and the positions of its images, of the splits with masks."""
    found = []
    for split, (dataset, rows) in stage.splits().items():
        if dataset.has_masks:
            dataset.open_masks()
            found.append((split, dataset, rows.tolist()))
    return found
