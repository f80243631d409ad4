"""Class activation maps of a trained CAM network, of the tags of each image.

out/<split>/<id>.npz: `labels` [K], `s4` [K, ceil(H/4), ceil(W/4)] and `full` [K, H, W], each map with peak 1. An image
without tags has no file. Source: P-NOC (arXiv 2305.12522), as Puzzle-CAM and IRNet do it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat

from wsss_dist.cam import peak_normalised, present_pairs, upsample
from wsss_dist.data.batch import EvalSample
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Scores, Stage, StageConfig, output, read_scores, scores_writer, views
from wsss_dist.stages.scores import score_maps

GRID = 16  # the full maps are resized to a multiple of it, then cut


class Config(StageConfig):
    """CAM inference."""

    network: ConfigPath  # folder of a training stage
    scales: list[PositiveFloat] = Field([0.5, 1.0, 1.5, 2.0], min_length=1)  # each with its mirror image


def run(stage: Stage) -> dict[str, Any]:
    """Make the maps; returns kind "cam"."""
    cfg: Config = stage.config
    method = stage.network(cfg.network, "class_maps", "class activation maps")

    @torch.no_grad()
    def work(sample: EvalSample, *_: Any):
        if not sample.labels.any():
            return None
        height, width = sample.image.shape[-2:]
        small = (math.ceil(height / 4), math.ceil(width / 4))
        full = (GRID * math.ceil(height / GRID), GRID * math.ceil(width / GRID))
        pairs = present_pairs(sample.labels[None])
        sums = [0.0, 0.0]
        for pair in views(sample.image, cfg.scales):
            maps = method.class_maps(pair[:1], pairs.to(pair.device))[:, None]
            sums = [total + upsample(maps, size)[:, 0] for total, size in zip(sums, (small, full), strict=True)]
        s4, whole = (peak_normalised(x) for x in (sums[0], sums[1][:, :height, :width]))
        return scores_writer(Scores(pairs[:, 1], whole, s4))

    stage.make(".npz", work)
    return score_maps(stage, lambda *key: read_scores(stage.folder, *key), "cam")


def picture(folder: Path, split: str, image_id: str) -> tuple[str, np.ndarray] | None:
    """The maps of an image as heat, uint8 [K, H, W]."""
    path = output(folder, split, image_id, ".npz")
    if not path.is_file():
        return None
    with np.load(path) as file:
        return "heat", (file["full"].astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
