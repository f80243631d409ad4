"""DeepLabV3+ (ECCV 2018) trained on pseudo masks, the segmentation network at the end of multi-stage methods.

Letters: B batch, C foreground classes, K = C + 1 with background, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from wsss_dist import cam as cams
from wsss_dist.data.batch import Batch
from wsss_dist.methods.base import BaseMethod, Prediction, Views, check_stage
from wsss_dist.models.deeplab import DeepLabDecoder
from wsss_dist.models.groups import pretrained_and_new
from wsss_dist.models.pretrained import load_part
from wsss_dist.models.pyramid import build_pyramid
from wsss_dist.models.resnet import ResNetConfig
from wsss_dist.schema import ConfigPath, StrictModel

IGNORE = 255


class Config(StrictModel):
    """DeepLabV3+ as P-NOC trains it."""

    backbone: ResNetConfig = ResNetConfig()
    # a finished run of a CAM network whose backbone it goes on from; null: the backbone's own weights, as published
    start: ConfigPath | None = None
    width: int = Field(256, ge=4, multiple_of=4)  # channels of the pyramid and of the decoder
    dropout: bool = True  # after the pyramid and in the decoder, 0.5, 0.5 and 0.1
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # eps: (1 - eps) one-hot + eps / K

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        check_stage(run, needs="labels", scored=True)


class Method(BaseMethod):
    """Backbone and decoder."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.backbone = build_pyramid(cfg.backbone)
        self.patch_size = cfg.backbone.output_stride
        if cfg.start is not None:
            load_part(self.backbone, cfg.start, "generator.backbone.", "method.start")
        low, high = self.backbone.channels[1], self.backbone.channels[4]
        self.decoder = DeepLabDecoder(low, high, num_classes + 1, cfg.width, cfg.dropout)

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def trained_weights(self) -> list[Path]:
        """The start of the backbone."""
        return [] if self.cfg.start is None else [self.cfg.start]

    def param_groups(self) -> list[dict]:
        """Pretrained weights x1, biases x2, new weights x10, new biases x20."""
        return pretrained_and_new([self.backbone], [self.decoder])

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy at full size, its mean over the labelled pixels of the micro batch; 0 where none is."""
        labels = batch.maps["labels"].long()
        logits = self.logits(batch.images, labels.shape[-2:]).float()
        total = F.cross_entropy(
            logits, labels, ignore_index=IGNORE, label_smoothing=self.cfg.label_smoothing, reduction="sum"
        )
        return {"loss": total / (labels != IGNORE).sum().clamp_min(1)}

    def logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, K, *size] of images [B, 3, H, W]; `size` None: on the grid of stride 4."""
        taps = self.backbone(images)
        return self.decoder(taps[1], taps[4], size)

    @torch.no_grad()
    def predict(self, batch: Batch, views: Views) -> Prediction:
        """Segmentation alone: logits at full size, plain and mirrored added, merged over scales."""
        size, per_scale, single = batch.images.shape[-2:], [], None
        for scale in views.seg_scales:
            x = cams.rescaled(batch.images, scale)
            plain, mirrored = self.logits(torch.cat([x, x.flip(-1)])).float().chunk(2)
            per_scale.append(cams.upsample(plain, size) + cams.upsample(mirrored.flip(-1), size))
            if scale == 1.0:
                single = cams.upsample(plain, size)
        return Prediction(logits=cams.fuse_logits(per_scale, list(views.seg_scales), views.fuse), single=single)
