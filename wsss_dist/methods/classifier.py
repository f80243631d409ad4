"""A classifier on image tags and its class activation maps (Zhou et al., CVPR 2016): the seed that WSSS starts from.

Letters: B batch, C foreground classes, H W pixels, h w feature grid, D channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wsss_dist import cam as cams
from wsss_dist.data.batch import Batch
from wsss_dist.losses import tag_loss
from wsss_dist.methods.base import BaseMethod, Prediction, Views
from wsss_dist.models.features import FeatureConfig, FeatureExtractor
from wsss_dist.schema import StrictModel


class Config(StrictModel):
    """Plain classifier."""

    name: Literal["classifier"] = "classifier"
    backbone: FeatureConfig = FeatureConfig(last_block="attention")
    pool: Literal["max", "avg"] = "max"  # over the feature grid, before the linear classifier
    head_lr_mult: float = Field(10.0, gt=0)

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        self.backbone.check_views(run.data)


class Method(BaseMethod):
    """Backbone, pooling, one linear layer without bias."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.backbone = FeatureExtractor(cfg.backbone)
        self.patch_size = self.backbone.patch_size
        self.classifier = nn.Conv2d(self.backbone.dim, num_classes, 1, bias=False)

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def param_groups(self) -> list[dict]:
        """Backbone (x1) and classifier (x head_lr_mult)."""
        groups = [("backbone", self.backbone, 1.0), ("heads", self.classifier, self.cfg.head_lr_mult)]
        return [
            {"name": n, "params": [p for p in m.parameters() if p.requires_grad], "lr_mult": x} for n, m, x in groups
        ]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Multi-label soft-margin loss of the pooled features."""
        fmap = self.backbone(batch.images)
        loss = tag_loss(self.classifier(cams.pool(fmap, self.cfg.pool)).flatten(1), batch.labels)
        return {"loss": loss, "loss_cls": loss.detach()}

    @torch.no_grad()
    def predict(self, batch: Batch, views: Views) -> Prediction:
        size, pairs = batch.images.shape[-2:], cams.present_pairs(batch.labels)
        total = None
        for scale in views.cam_scales:
            x = cams.upsample(batch.images, cams.scaled_size(size, scale))
            maps = self.classifier(self.backbone(torch.cat([x, x.flip(-1)])))
            maps = cams.merge_mirror(maps, pairs, size).relu()
            total = maps if total is None else total + maps
        return Prediction(cam=cams.all_classes(cams.minmax(total), pairs, batch.labels))
