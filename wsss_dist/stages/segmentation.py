"""The final prediction of a trained segmentation network: multi-scale, with mirror images, and a dense CRF.

out/<split>/<id>.png: 0 background, 1..C classes, without any tag unless the method asks for them. Source: P-NOC (arXiv
2305.12522).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat

from wsss_dist.cam import upsample
from wsss_dist.crf import CRFConfig, crf_labels
from wsss_dist.data.batch import EvalSample, batch_of
from wsss_dist.errors import UserError
from wsss_dist.methods.base import Views
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Stage, StageConfig, label_writer, read_png, views
from wsss_dist.stages.pseudo_masks import picture
from wsss_dist.stages.scores import score_labels

__all__ = ["Config", "picture", "run"]


class Config(StageConfig):
    """Segmentation inference; the defaults are P-NOC's for VOC."""

    network: ConfigPath  # folder of a training stage
    method: dict[str, Any] = {}  # keys of its method section that take other values than in training
    scales: list[PositiveFloat] = Field([0.5, 1.0, 1.5, 2.0], min_length=1)  # each with its mirror image
    fuse: Literal["mean", "voc", "coco"] = "mean"  # how the logits of the scales are merged
    crf: CRFConfig | None = CRFConfig(spatial=(3.0, 1.0), bilateral=(67.0, 3.0, 4.0))


def run(stage: Stage) -> dict[str, Any]:
    """Make the labels; returns kind "seg_crf" ("seg_tags_crf" where tags are used), without "_crf" if there is none."""
    cfg: Config = stage.config
    method = stage.network(cfg.network, changes=cfg.method)
    multi_scale = Views(seg_scales=cfg.scales, fuse=cfg.fuse)

    @torch.no_grad()
    def work(sample: EvalSample, *_: Any):
        image = next(views(sample.image, [1.0]))[:1]
        logits = method.predict(batch_of([sample], image), multi_scale).logits
        if logits is None:
            raise UserError(f"stage '{stage.name}': the network of '{cfg.network.name}' gives no segmentation")
        logits = upsample(logits.float(), tuple(sample.image.shape[-2:]))[0]
        return label_writer(logits.argmax(0) if cfg.crf is None else crf_labels(logits, sample.image, cfg.crf))

    stage.make(".png", work)
    kind = ("seg_tags" if method.knows_tags else "seg") + ("" if cfg.crf is None else "_crf")
    return score_labels(stage, lambda *key: read_png(stage.folder, *key), kind)
