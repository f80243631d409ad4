"""Saliency of a trained network without classes: grey maps, or masks after a threshold and a dense CRF.

out/<split>/<id>.png: 8-bit grey, 255 for foreground. Source: C2AM (CVPR 2022) and P-NOC (arXiv 2305.12522).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveFloat

from wsss_dist.cam import peak_normalised, upsample
from wsss_dist.crf import LabelCRFConfig, crf_of_labels
from wsss_dist.data.batch import EvalSample
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Stage, StageConfig, output, png_writer, read_png, views
from wsss_dist.stages.scores import score_labels


class Config(StageConfig):
    """Saliency inference; the defaults are those of C2AM-H."""

    network: ConfigPath  # folder of a training stage
    scales: list[PositiveFloat] = Field([0.5, 1.0, 1.5, 2.0], min_length=1)
    mirror: bool = True  # each scale with its mirror image
    peak: bool = True  # divide the mean over the views by its maximum
    threshold: float | None = Field(0.2, ge=0, lt=1)  # above: foreground; null: grey maps
    crf: LabelCRFConfig | None = LabelCRFConfig()  # of the mask


def run(stage: Stage) -> dict[str, Any]:
    """Make the pictures; returns kind "saliency": two classes, a grey map cut at one half."""
    cfg: Config = stage.config
    method = stage.network(cfg.network, "foreground", "saliency")

    @torch.no_grad()
    def work(sample: EvalSample, *_: Any):
        size, total = tuple(sample.image.shape[-2:]), 0.0
        for pair in views(sample.image, cfg.scales):
            maps = upsample(method.foreground(pair if cfg.mirror else pair[:1]), size)[:, 0]
            total = total + (maps[0] + maps[1].flip(-1) if cfg.mirror else maps[0])
        value = total / (len(cfg.scales) * (2 if cfg.mirror else 1))
        if cfg.peak:
            value = peak_normalised(value)
        if cfg.threshold is None:
            return png_writer((value.clamp(0, 1) * 255).round())
        mask = (value > cfg.threshold).long()
        if cfg.crf is not None:
            mask = crf_of_labels(mask, 2, sample.image, cfg.crf)
        return png_writer(mask * 255)

    stage.make(".png", work)
    return score_labels(stage, lambda *key: (read_png(stage.folder, *key) > 127).to(torch.uint8), "saliency", classes=1)


def picture(folder: Path, split: str, image_id: str) -> tuple[str, np.ndarray] | None:
    """The map of an image as heat, uint8 [1, H, W]."""
    path = output(folder, split, image_id, ".png")
    return ("heat", np.asarray(Image.open(path))[None]) if path.is_file() else None
