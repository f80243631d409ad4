"""PoolNet (CVPR 2019) trained on the saliency masks of an earlier stage: P-NOC's saliency refiner.

Letters: B batch, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from wsss_dist.data.batch import Batch
from wsss_dist.data.transforms import denormalise
from wsss_dist.methods.base import BaseMethod, check_stage
from wsss_dist.models.poolnet import PoolNet, PoolNetConfig, caffe_input
from wsss_dist.schema import StrictModel


class Config(StrictModel):
    """PoolNet as P-NOC trains it; its backbone starts from image tags alone, so no saliency label enters."""

    backbone: PoolNetConfig = PoolNetConfig()
    # the sum over the pixels of an image is divided by it
    divisor: float = Field(10.0, gt=0)

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        check_stage(run, needs="saliency")


class Method(BaseMethod):
    """PoolNet."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.network = PoolNet(cfg.backbone)
        self.patch_size = 16

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.network.backbone.weights_note

    def param_groups(self) -> list[dict]:
        """One group: everything that is trained."""
        return [{"name": "all", "params": [p for p in self.parameters() if p.requires_grad], "lr_mult": 1.0}]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Binary cross-entropy against the saliency in [0, 1], summed over the pixels of an image / divisor."""
        logits = self.saliency(batch.images)[:, 0].float()
        loss = F.binary_cross_entropy_with_logits(logits, batch.maps["saliency"], reduction="none")
        return {"loss": loss.sum((1, 2)).mean() / self.cfg.divisor}

    def foreground(self, images: Tensor) -> Tensor:
        """Saliency [B, 1, H, W] in [0, 1] of images [B, 3, H, W]."""
        return self.saliency(images).float().sigmoid()

    def saliency(self, images: Tensor) -> Tensor:
        """Logits [B, 1, H, W] of images [B, 3, H, W], normalised with the ImageNet mean and standard deviation."""
        return self.network(caffe_input(denormalise(images.float()) / 255) if self.network.is_caffe else images)
