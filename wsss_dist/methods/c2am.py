"""C2AM (CVPR 2022) and C2AM-H (P-NOC, arXiv 2305.12522): a saliency network learnt by contrast, without masks.

The foreground vectors of all images are pulled together, so are the background vectors, and the two are pushed apart.
With hints, places where a class activation map is sure are foreground; without them, which side is the foreground is
not decided by the loss.

Letters: B batch (over all ranks), D channels, H W pixels, h w feature grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import kernels
from wsss_dist import dist
from wsss_dist.data.batch import Batch
from wsss_dist.methods.base import BaseMethod, check_stage
from wsss_dist.models.cam_heads import SaliencyHead
from wsss_dist.models.groups import pretrained_and_new
from wsss_dist.models.pyramid import build_pyramid
from wsss_dist.models.resnet import ResNetConfig
from wsss_dist.schema import StrictModel


class HintConfig(StrictModel):
    """Hints from class activation maps: `data.maps.hint`, the maximum over an image's classes, peak 1."""

    weight: float = Field(1.0, ge=0)  # lambda_h
    threshold: float = Field(0.4, gt=0, le=1)  # delta_fg: foreground where the hint is at least this
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # target 1 - eps / 2


class Config(StrictModel):
    """C2AM-H as published for VOC; `hint: null` is C2AM."""

    backbone: ResNetConfig = ResNetConfig()
    hint: HintConfig | None = HintConfig()
    alpha: float = Field(0.25, ge=0)  # the k-th most similar image weighs exp(-alpha k)
    # the loss is multiplied with it; 2 repeats runs that added up the gradients of two batches
    loss_scale: float = Field(1.0, gt=0)

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        check_stage(run, needs=None if self.hint is None else "hint")


class Method(BaseMethod):
    """Backbone and saliency head on layer3 and layer4, which must have one size."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.backbone = build_pyramid(cfg.backbone)
        self.patch_size = cfg.backbone.output_stride
        self.head = SaliencyHead(self.backbone.channels[3:])

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def param_groups(self) -> list[dict]:
        """Pretrained weights x1, biases x2, new weights x10, new biases x20."""
        return pretrained_and_new([self.backbone], [self.head])

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """L = L_pos(foreground) + L_pos(background) + L_neg + lambda_h L_h, over the batch of all ranks."""
        features, logits = self.head(*self.backbone(batch.images)[3:])
        pooled = kernels.c2am_pool(features, logits)
        foreground, background, push = kernels.c2am_contrast(
            *(dist.gather_batch(v) for v in pooled), alpha=self.cfg.alpha
        )
        out = {"loss_foreground": foreground, "loss_background": background, "loss_push": push}
        loss = foreground + background + push
        if self.cfg.hint is not None:
            out["loss_hint"] = hint_loss(logits, batch.maps["hint"], self.cfg.hint)
            loss = loss + self.cfg.hint.weight * out["loss_hint"]
        return {"loss": self.cfg.loss_scale * loss, **{k: v.detach() for k, v in out.items()}}

    def foreground(self, images: Tensor) -> Tensor:
        """Rectified saliency logits [B, 1, h, w] of images [B, 3, H, W]."""
        return self.head(*self.backbone(images)[3:])[1].float().relu()


def hint_loss(logits: Tensor, hint: Tensor, cfg: HintConfig) -> Tensor:
    """Binary cross-entropy of the positions with a hint, their mean over the batch of all ranks; 0 where there is none.

    Each rank returns its share times the number of ranks, so that the mean over the ranks is the loss.

    Args:
        logits: [B, 1, h, w].
        hint: [B, H, W] in [0, 1], reduced to the grid by bicubic interpolation.
    """
    hint = F.interpolate(hint[:, None].float(), logits.shape[-2:], mode="bicubic", align_corners=False)
    sure = (hint >= cfg.threshold).float()
    target = torch.full_like(logits, 1 - cfg.label_smoothing / 2, dtype=torch.float32)
    loss = (F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none") * sure).sum()
    count = dist.all_reduce_sum(sure.sum())
    return loss * dist.world_size() / count.clamp_min(1)
