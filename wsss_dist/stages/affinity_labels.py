"""Labels for the training of an affinity network: a class, background, or undecided.

out/<split>/<id>.png: 0 background, 1..C classes, 255 undecided. Source: P-NOC (arXiv 2305.12522) with saliency, IRNet
(CVPR 2019) without.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from wsss_dist import dist
from wsss_dist.crf import LabelCRFConfig, crf_of_labels
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.dataset import Dataset
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Scores, Stage, StageConfig, label_writer, read_png, read_scores
from wsss_dist.stages.pseudo_masks import picture
from wsss_dist.stages.scores import IGNORE, score_labels

__all__ = ["Config", "picture", "run"]


class Config(StageConfig):
    """Affinity labels; the defaults are P-NOC's for VOC."""

    cams: ConfigPath  # folder of a stage of kind cams
    saliency: ConfigPath | None = None  # folder of a stage of kind saliency; null: the rule of IRNet
    foreground: float = Field(0.4, ge=0, le=1)  # tau_fg
    background: float = Field(0.1, ge=0, le=1)  # tau_bg: salient where the saliency is above; IRNet: its own 0.05
    crf: LabelCRFConfig = LabelCRFConfig()


def run(stage: Stage) -> dict[str, Any]:
    """Make the labels; returns kind "affinity_labels"."""
    cfg: Config = stage.config

    def work(sample: EvalSample, split: str, dataset: Dataset):
        size = tuple(sample.image.shape[-2:])
        scores = read_scores(cfg.cams, split, sample.id, size, sample.labels)
        if scores is None:
            device = dist.device()
            scores = Scores(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, *size, device=device))
        if cfg.saliency is None:
            return label_writer(labels_of_cams(scores, sample.image, cfg))
        salient = read_png(cfg.saliency, split, sample.id, size).float() / 255
        return label_writer(labels_with_saliency(scores, salient, sample.image, cfg))

    stage.make(".png", work)
    return score_labels(stage, lambda *key: read_png(stage.folder, *key), "affinity_labels")


def labels_with_saliency(scores: Scores, saliency: Tensor, image: Tensor, cfg: Config) -> Tensor:
    """Labels [H, W]: a class where the CRF of the confident, salient CAM says so, background where nothing is salient.

    Args:
        scores: CAMs of the tags, peak 1.
        saliency: [H, W] in [0, 1].
        image: [3, H, W] uint8.
        cfg: thresholds and CRF.
    """
    salient = crf_of_labels((saliency > cfg.background).long(), 2, image, cfg.crf)
    classes = _refined(scores, cfg.foreground, salient, image, cfg.crf)
    return torch.where(classes > 0, classes, torch.where(salient == 0, 0, IGNORE))


def labels_of_cams(scores: Scores, image: Tensor, cfg: Config) -> Tensor:
    """Labels [H, W] from the CAM alone: a class above tau_fg, background where nothing is above tau_bg, after CRFs."""
    high = _refined(scores, cfg.foreground, None, image, cfg.crf)
    low = _refined(scores, cfg.background, None, image, cfg.crf)
    return torch.where(high > 0, high, torch.where(low == 0, 0, IGNORE))


def _refined(scores: Scores, threshold: float, salient: Tensor | None, image: Tensor, crf: LabelCRFConfig) -> Tensor:
    """Class ids [H, W] int64 after a CRF over background and the image's tags."""
    size = scores.maps.shape[1:]
    stack = torch.cat([torch.full((1, *size), threshold, device=scores.maps.device), scores.maps])
    labels = stack.argmax(0)
    if salient is not None:
        labels = labels * salient
    names = torch.cat([scores.classes.new_zeros(1), scores.classes + 1])
    return names[crf_of_labels(labels, len(names), image, crf)]
