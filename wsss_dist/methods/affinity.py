"""AffinityNet of P-NOC: the boundary branch of IRNet (CVPR 2019) on a frozen backbone, trained on pairs of pixels.

Letters: B batch, H W pixels, h w the grid of stride 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kernels
from wsss_dist import dist
from wsss_dist.data.batch import Batch
from wsss_dist.errors import UserError
from wsss_dist.methods.base import BaseMethod, check_stage
from wsss_dist.models.edge_head import EdgeHead
from wsss_dist.models.pyramid import build_pyramid
from wsss_dist.models.resnet import ResNetConfig
from wsss_dist.schema import StrictModel


class Config(StrictModel):
    """AffinityNet; the defaults are those of the published VOC and COCO runs."""

    backbone: ResNetConfig = ResNetConfig(norm="fix", frozen_stages=5)
    radius: int = Field(10, ge=2)  # R: pairs closer than this on the grid

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        if self.backbone.frozen_stages < 5:
            raise UserError("config: 'method.backbone.frozen_stages' must be 5: only the edge head is trained")
        check_stage(run, needs="labels")
        if run.data.crop // 4 < 2 * self.radius:
            raise UserError(
                f"config: 'data.crop' is {run.data.crop}, too small for pairs within method.radius {self.radius} on a "
                f"grid of stride 4; set it to {8 * self.radius} or more"
            )


class Method(BaseMethod):
    """Frozen backbone and edge head."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.backbone = build_pyramid(cfg.backbone)
        self.patch_size = cfg.backbone.output_stride
        self.head = EdgeHead(self.backbone.channels, self.backbone.strides)

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def param_groups(self) -> list[dict]:
        """One group: the edge head."""
        return [{"name": "head", "params": list(self.head.parameters()), "lr_mult": 1.0}]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Path-affinity loss with the numbers of pairs of the batch of all ranks.

        Each rank returns its share times the number of ranks, so that the mean over the ranks is the loss.
        """
        edges = self.edges(batch.images)
        labels = F.interpolate(batch.maps["labels"][:, None].float(), edges.shape[-2:], mode="nearest")[:, 0].long()
        counts = dist.all_reduce_sum(kernels.path_affinity_counts(labels, radius=self.cfg.radius))
        loss = kernels.path_affinity_loss(edges.float(), labels, radius=self.cfg.radius, counts=counts)
        return {"loss": loss * dist.world_size()}

    def edges(self, images: Tensor) -> Tensor:
        """Edge logits [B, 1, h, w] of images [B, 3, H, W]."""
        return self.head(self.backbone(images))
