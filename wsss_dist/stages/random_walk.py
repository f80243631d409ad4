"""CAMs spread by a random walk that the edges of an affinity network hold back.

out/<split>/<id>.npz: `labels` [K] and `full` [K, H, W], divided by the maximum over all classes and pixels.
Source: IRNet (CVPR 2019) as P-NOC (arXiv 2305.12522) uses it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import kernels
from wsss_dist.cam import upsample
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.dataset import Dataset
from wsss_dist.errors import UserError
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Scores, Stage, StageConfig, read_scores, scores_writer, views
from wsss_dist.stages.cams import picture
from wsss_dist.stages.scores import score_maps

__all__ = ["Config", "picture", "run"]
STRIDE = 4


class Config(StageConfig):
    """Random walk; the defaults are those of IRNet and P-NOC."""

    network: ConfigPath  # folder of the training stage of the affinity network
    cams: ConfigPath  # folder of a stage of kind cams
    canvas: int = Field(512, ge=1)  # images smaller than this square are padded at the bottom and on the right
    radius: int = Field(5, ge=1, le=16)
    beta: float = Field(10.0, gt=0)
    log2_steps: int = Field(8, ge=0, le=16)


def run(stage: Stage) -> dict[str, Any]:
    """Make the maps; returns kind "random_walk"."""
    cfg: Config = stage.config
    method = stage.network(cfg.network, "edges", "edges")

    @torch.no_grad()
    def work(sample: EvalSample, split: str, dataset: Dataset):
        size = tuple(sample.image.shape[-2:])
        scores = read_scores(cfg.cams, split, sample.id, size, sample.labels)
        if scores is None:
            return None
        if scores.small is None:
            raise UserError(f"stage '{stage.name}': '{cfg.cams.name}' has no maps of stride 4; expected kind cams")
        edge = edges(method, next(views(sample.image, [1.0])), cfg.canvas)
        if not edge.isfinite().all():
            raise UserError(
                f"stage '{stage.name}': '{cfg.network.name}' gives edges that are not finite for image {sample.id}; "
                "its training went wrong: lower its optim.lr"
            )
        return scores_writer(Scores(scores.classes, walk(scores.small, edge, size, cfg)))

    stage.make(".npz", work)
    return score_maps(stage, lambda *key: read_scores(stage.folder, *key), "random_walk")


def edges(method: nn.Module, pair: Tensor, canvas: int) -> Tensor:
    """Edge strength [ceil(H/4), ceil(W/4)] in [0, 1] of an image and its mirror image [2, 3, H, W], logits averaged."""
    height, width = pair.shape[-2:]
    padded = F.pad(pair, (0, max(0, canvas - width), 0, max(0, canvas - height)))
    logits = method.edges(padded)[:, 0].float()
    logits = logits[:, : (height - 1) // STRIDE + 1, : (width - 1) // STRIDE + 1]
    return ((logits[0] + logits[1].flip(-1)) / 2).sigmoid()


def walk(cams: Tensor, edge: Tensor, size: tuple[int, int], cfg: Config) -> Tensor:
    """CAMs [K, h, w] of stride 4 and edges [h, w] -> maps [K, *size], divided by the maximum over all of them."""
    seeds = cams * (1 - edge)
    steps = {"radius": cfg.radius, "beta": cfg.beta, "log2_steps": cfg.log2_steps}
    spread = kernels.random_walk(seeds[None], edge[None], **steps)
    full = upsample(spread, (spread.shape[-2] * STRIDE, spread.shape[-1] * STRIDE))[0, :, : size[0], : size[1]]
    return full / full.amax().clamp_min(1e-5)
