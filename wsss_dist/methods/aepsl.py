"""AE-PSL (CVPR 2017, arXiv 1703.08448): the classifiers of adversarial erasing, and prohibitive segmentation learning.

`variant` "erasing" is the classifier M_t of one erasing step; it is trained on images whose regions of the steps before
are erased (a map of kind "erased"), and the stage `regions` mines what it finds. "segmentation" is the network with two
branches that learns from the assembled masks and, with `psl`, from its own prediction weighted by its classifier.

Letters: B batch, C foreground classes, K = C + 1 with background, H W pixels, h w the grid of the backbone, y tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

import kernels
from wsss_dist import cam as cams
from wsss_dist.data.batch import Batch
from wsss_dist.losses import squared_sigmoid_loss, squared_softmax_loss, tag_loss
from wsss_dist.methods.base import BaseMethod, Prediction, Views, check_stage
from wsss_dist.models.cam_heads import CamHead
from wsss_dist.models.groups import pretrained_and_new
from wsss_dist.models.pretrained import load_part
from wsss_dist.models.trunk import Trunk, TrunkConfig
from wsss_dist.schema import ConfigPath, StrictModel

IGNORE = 255
NEVER = -1e4  # logarithm of the weight of a prohibited class
_TAG_LOSSES = {"squared": squared_softmax_loss, "squared_sigmoid": squared_sigmoid_loss, "bce": tag_loss}


class Config(StrictModel):
    """AE-PSL; the defaults are those of the paper, where it names them."""

    variant: Literal["erasing", "segmentation"]
    backbone: TrunkConfig = TrunkConfig()
    # a finished run with this backbone to go on from, such as the classifier of the step before; null: the backbone's
    # own weights, as published
    start: ConfigPath | None = None
    # squared: HCP's squared distance of the softmax to the tags' shares; squared_sigmoid: of each sigmoid to its tag;
    # bce: multi-label soft margin of the logits
    tag_loss: Literal["squared", "squared_sigmoid", "bce"] = "squared"
    # ---- of variant segmentation
    psl: Literal["scores", "tags", "ones", "off"] = "scores"  # weights of the classes in the online mask
    psl_warmup: float = Field(0.0, ge=0, le=1)  # share of the run without the term of the online mask
    # pixels of the loss: those that the cells of the grid stand for, or all, with the logits resized to them
    loss_size: Literal["grid", "full"] = "grid"
    scale_scores: bool = False  # divide the scores of an image by their maximum before they weight the classes
    # at test time, classes with a score below this are prohibited ...
    prohibition: float = Field(0.1, ge=0, le=1)
    # ... by their scores, by the image's tags (the bound "+GT"), or not at all
    prohibit_by: Literal["scores", "tags", "nothing"] = "scores"

    @model_validator(mode="after")
    def _keys_belong_to_the_variant(self) -> Config:
        of_segmentation = ("psl", "psl_warmup", "loss_size", "scale_scores", "prohibition", "prohibit_by")
        changed = [key for key in of_segmentation if getattr(self, key) != type(self).model_fields[key].default]
        if changed and self.variant == "erasing":
            raise ValueError(f"'{changed[0]}' is no setting of variant: erasing; remove it")
        return self

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        if self.variant == "segmentation":
            check_stage(run, needs="labels", scored=True)


class Method(BaseMethod):
    """Backbone, a classifier on the mean of its features, in "segmentation" also one of each position."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg, self.train_steps = cfg, train_steps
        self.backbone = Trunk(cfg.backbone)
        self.patch_size = self.backbone.patch_size
        self.head = CamHead(self.backbone.dim, num_classes)
        nn.init.normal_(self.head.conv.weight, std=0.01)
        if cfg.start is not None:
            load_part(self.backbone, cfg.start, "backbone.", "method.start")
            load_part(self.head, cfg.start, "head.", "method.start")
        self.segmenter = None
        if cfg.variant == "segmentation":
            self.segmenter = nn.Conv2d(self.backbone.dim, num_classes + 1, 1)
            nn.init.normal_(self.segmenter.weight, std=0.01)
            nn.init.zeros_(self.segmenter.bias)

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def trained_weights(self) -> list[Path]:
        """The start of backbone and classifier."""
        return [] if self.cfg.start is None else [self.cfg.start]

    def param_groups(self) -> list[dict]:
        """Weights of the backbone x1, its biases x2; the last layers, and they alone, x10 and x20."""
        return pretrained_and_new(
            [self.backbone], [self.head] if self.segmenter is None else [self.head, self.segmenter]
        )

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """L_cls, and in "segmentation" J(f, S) + J(f, S^) + L_cls, means over the images."""
        features = self.backbone(batch.images)
        scores = self.head(features, True).float()
        loss_cls = self._tag_loss(scores, batch.labels)
        if self.segmenter is None:
            return {"loss": loss_cls, "loss_cls": loss_cls.detach()}
        logits, labels = self.segmenter(features), batch.maps["labels"]
        if self.cfg.loss_size == "full":
            logits = self.backbone.to_image(logits.float(), labels.shape[-2:])
        else:
            labels = self.backbone.at_cells(labels, logits.shape[-2:], IGNORE)
        terms = kernels.psl_loss(logits, self._weights(scores, batch.labels), labels, batch.labels)
        out = {
            "loss_cls": loss_cls.detach(),
            "loss_mask": terms.labelled.mean().detach(),
            "unlabelled_images": (terms.labelled_pixels == 0).float().mean(),
        }
        loss = loss_cls + terms.labelled.mean()
        if self.cfg.psl != "off":
            out["loss_online"] = terms.online.mean().detach()
            out["prohibited"] = 1 - terms.online_pixels.float().mean() / terms.mask[0].numel()
            if step >= self.cfg.psl_warmup * self.train_steps:
                loss = loss + terms.online.mean()
        return {"loss": loss, **out}

    @torch.no_grad()
    def predict(self, batch: Batch, views: Views) -> Prediction:
        """CAM of "erasing"; of "segmentation" the log of w f, with w the weights that prohibit classes."""
        if self.segmenter is None:
            return Prediction(cam=cams.multi_scale(self.class_maps, batch.images, batch.labels, views.cam_scales))
        per_scale, scores, single = [], [], None
        size = batch.images.shape[-2:]
        for scale in views.seg_scales:
            x = cams.rescaled(batch.images, scale)
            features = self.backbone(torch.cat([x, x.flip(-1)]))
            maps = self.backbone.to_image(self.segmenter(features).float(), x.shape[-2:])
            plain, mirrored = maps.chunk(2)
            per_scale.append(cams.upsample((plain + mirrored.flip(-1)) / 2, size))
            v = self._confidences(self.head(features, True).float())
            scores.append(v.view(2, *batch.labels.shape).mean(0))
            if scale == 1.0:
                single = self.weighted(plain, batch.labels if self.knows_tags else v[: len(x)])
        fused = cams.fuse_logits(per_scale, list(views.seg_scales), views.fuse)
        v = batch.labels if self.knows_tags else torch.stack(scores).mean(0)
        return Prediction(logits=self.weighted(fused, v), single=single)

    @property
    def knows_tags(self) -> bool:
        """The bound "+GT"."""
        return self.cfg.prohibit_by == "tags"

    def class_maps(self, images: Tensor, pairs: Tensor, mirror: bool = True) -> Tensor:
        """Rectified maps [P, H, W] of P pairs of images [B, 3, H, W], plus those of the mirror images where asked."""
        maps = self.head(self.backbone(torch.cat([images, images.flip(-1)]) if mirror else images)).float().relu()
        planes = [
            self.backbone.to_image(part[pairs[:, 0], pairs[:, 1]][:, None], images.shape[-2:])[:, 0]
            for part in maps.split(len(images))
        ]
        return planes[0] + planes[1].flip(-1) if mirror else planes[0]

    def _tag_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return _TAG_LOSSES[self.cfg.tag_loss](scores, labels)

    def _confidences(self, scores: Tensor) -> Tensor:
        """v [B, C] in [0, 1], of the classifier's logits."""
        v = scores.softmax(1) if self.cfg.tag_loss == "squared" else scores.sigmoid()
        return v / v.amax(1, keepdim=True).clamp_min(1e-8) if self.cfg.scale_scores else v

    def _weights(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Weights [B, C] of the classes in the online mask."""
        if self.cfg.psl == "scores":
            return self._confidences(scores.detach())
        return labels if self.cfg.psl == "tags" else torch.ones_like(labels)

    def weighted(self, logits: Tensor, v: Tensor) -> Tensor:
        """Logits [B, K, h, w] plus ln w', w' = [1, v'] and v' = v [B, C] where v >= p, else 0: a class that cannot win.

        With `prohibit_by` "tags" v are the tags, with "nothing" the logits stay as they are.
        """
        if self.cfg.prohibit_by == "nothing":
            return logits
        if self.cfg.prohibit_by == "scores":
            v = torch.where(v >= self.cfg.prohibition, v, 0.0)
        return logits + F.pad(v.float().log().clamp_min(NEVER), (1, 0))[:, :, None, None]
