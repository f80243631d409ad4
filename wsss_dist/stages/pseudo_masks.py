"""Pseudo masks: score maps against a constant background, then a dense CRF.

out/<split>/<id>.png: 0 background, 1..C classes; an image without tags is background. Source: P-NOC (arXiv 2305.12522).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from wsss_dist.crf import LabelCRFConfig, crf_of_labels
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.dataset import Dataset
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Stage, StageConfig, label_writer, output, read_png, read_scores
from wsss_dist.stages.scores import score_labels


class Config(StageConfig):
    """Pseudo masks; the defaults are P-NOC's."""

    scores: ConfigPath  # folder of a stage of kind random_walk or cams
    background: float = Field(0.3, ge=0, le=1)
    crf: LabelCRFConfig | None = LabelCRFConfig(iterations=1, confidence=0.9)


def run(stage: Stage) -> dict[str, Any]:
    """Make the masks; returns kind "pseudo"."""
    cfg: Config = stage.config

    def work(sample: EvalSample, split: str, dataset: Dataset):
        size = tuple(sample.image.shape[-2:])
        scores = read_scores(cfg.scores, split, sample.id, size, sample.labels)
        if scores is None:
            return label_writer(torch.zeros(size))
        labels = torch.cat([torch.full_like(scores.maps[:1], cfg.background), scores.maps]).argmax(0)
        names = torch.cat([scores.classes.new_zeros(1), scores.classes + 1])
        if cfg.crf is not None:
            labels = crf_of_labels(labels, len(names), sample.image, cfg.crf)
        return label_writer(names[labels])

    stage.make(".png", work)
    return score_labels(stage, lambda *key: read_png(stage.folder, *key), "pseudo")


def picture(folder: Path, split: str, image_id: str) -> tuple[str, np.ndarray] | None:
    """The labels of an image, uint8 [H, W]."""
    path = output(folder, split, image_id, ".png")
    return ("labels", np.asarray(Image.open(path))) if path.is_file() else None
