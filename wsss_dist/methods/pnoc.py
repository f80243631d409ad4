"""P-NOC: a class activation map network trained against a second classifier, and what it is built from.

`variant` names the recipe: "plain" (a classifier), "puzzle" (Puzzle-CAM, CVPR 2021), "oc_cse" (ICCV 2021: what the map
of a class erases must hide that class from an ordinary classifier), "p_oc" (both) and "p_noc" (arXiv 2305.12522: both,
and the second classifier learns on what the maps leave over).

Letters: B batch, C foreground classes, H W pixels, h w feature grid. A raw class maps, z = mean(A) logits, y tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import kernels
from wsss_dist import cam as cams
from wsss_dist import dist
from wsss_dist.data.batch import Batch
from wsss_dist.errors import UserError
from wsss_dist.losses import tag_loss
from wsss_dist.methods.base import BaseMethod, Prediction, Views
from wsss_dist.models.cam_heads import CamHead
from wsss_dist.models.groups import pretrained_and_new
from wsss_dist.models.pretrained import load_part
from wsss_dist.models.pyramid import build_pyramid
from wsss_dist.models.resnet import ResNetConfig
from wsss_dist.schema import ConfigPath, StrictModel

PUZZLE = ("puzzle", "p_oc", "p_noc")
ERASING = ("oc_cse", "p_oc", "p_noc")
TILES = 2  # a side


class RampConfig(StrictModel):
    """A weight that grows in a straight line from `start` to `end` over the first `share` of the run."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    share: float = Field(1.0, ge=0, le=1)

    def at(self, progress: float) -> float:
        """The weight once `progress` of the run, in [0, 1), is done."""
        return self.end if progress >= self.share else self.start + (self.end - self.start) * progress / self.share


class SecondConfig(StrictModel):
    """The second classifier, N: frozen in "oc_cse" and "p_oc" (OC), trained in "p_noc" (NOC). BatchNorm is fixed."""

    backbone: ResNetConfig = ResNetConfig(norm="fix")
    # a finished run of variant "plain" with this backbone: its model.safetensors
    weights: ConfigPath

    @model_validator(mode="after")
    def _norm_is_fixed(self) -> SecondConfig:
        if self.backbone.norm != "fix":
            raise ValueError("'backbone.norm' must be fix: its BatchNorm would otherwise see erased images")
        return self


class Config(StrictModel):
    """P-NOC and its parts; the defaults are those of the published VOC runs."""

    variant: Literal["plain", "puzzle", "oc_cse", "p_oc", "p_noc"] = "p_noc"
    backbone: ResNetConfig = ResNetConfig()
    # a finished run with this backbone that the generator goes on from; null: the backbone's own weights, as published
    start: ConfigPath | None = None
    second: SecondConfig | None = None
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # eps: targets (1 - eps) y + eps / 2
    puzzle: RampConfig = RampConfig(start=0.0, end=4.0, share=0.5)  # alpha, weight of |A - A'|
    erase: RampConfig = RampConfig(start=0.3, end=1.0)  # lambda, weight of the tags that N sees on x_soft
    noc: RampConfig = RampConfig(start=0.0, end=1.0)  # omega, weight of N's own loss on x_hard
    threshold: float = Field(0.2, ge=0, le=1)  # delta: above this share of its peak a map erases hard
    # let the gradient of the generator's loss into N too, as in the code of the published numbers
    noc_leak: bool = False
    # the loss is multiplied with it; 2 repeats runs that added up the gradients of two batches, which SGD notices
    loss_scale: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _second_where_it_is_used(self) -> Config:
        if (self.second is None) == (self.variant in ERASING):
            needs = "needs" if self.second is None else "has no use for"
            raise ValueError(f"variant {self.variant!r} {needs} 'second', the second classifier")
        return self

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        step = TILES * self.backbone.output_stride
        if self.variant in PUZZLE and run.data.crop % step:
            raise UserError(
                f"config: 'data.crop' is {run.data.crop}, but variant {self.variant!r} cuts images into {TILES} x "
                f"{TILES} tiles on the grid of the backbone; set it to a multiple of {step}"
            )
        if self.variant == "p_noc" and run.train.grad_clip is not None:
            raise UserError(
                "config: 'train.grad_clip' would tie the two networks of variant 'p_noc' together by their common "
                "norm; set it to null"
            )


class CamNetwork(nn.Module):
    """Backbone and CAM head: images [B, 3, H, W] -> raw class maps [B, C, h, w], or logits [B, C] with `pooled`."""

    def __init__(self, cfg: ResNetConfig, num_classes: int):
        super().__init__()
        self.backbone = build_pyramid(cfg)
        self.head = CamHead(self.backbone.dim, num_classes)

    def forward(self, images: Tensor, pooled: bool = False) -> Tensor:
        return self.head(self.backbone(images)[-1], pooled)

    def param_groups(self, prefix: str) -> list[dict]:
        """Pretrained weights x1, biases x2, new weights x10, new biases x20."""
        return pretrained_and_new([self.backbone], [self.head], prefix)


class Method(BaseMethod):
    """Generator G, and in the erasing variants the second classifier N.

    One loss trains both networks of "p_noc", in separate phases all the same: N has no parameter gradient in the
    generator's phase (unless noc_leak), the maps are detached in the phase of N, and neither phase depends on the
    update of the other, so that one backward pass gives each network the gradient of its own phase alone.
    """

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg, self.train_steps = cfg, train_steps
        self.generator = CamNetwork(cfg.backbone, num_classes)
        self.patch_size = cfg.backbone.output_stride
        if cfg.start is not None:
            load_part(self.generator, cfg.start, "generator.", "method.start")
        self.second = None
        if cfg.second is not None:
            self.second = CamNetwork(cfg.second.backbone, num_classes)
            load_part(self.second, cfg.second.weights, "generator.", "method.second.weights")
            if cfg.variant != "p_noc":
                self.second.requires_grad_(False)

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.generator.backbone.weights_note

    def trained_weights(self) -> list[Path]:
        """The start of the generator, and the second classifier."""
        second = None if self.cfg.second is None else self.cfg.second.weights
        return [path for path in (self.cfg.start, second) if path is not None]

    def param_groups(self) -> list[dict]:
        """Those of the generator, and in "p_noc" those of the second classifier."""
        groups = self.generator.param_groups("generator_")
        return groups + self.second.param_groups("second_") if self.cfg.variant == "p_noc" else groups

    def train(self, mode: bool = True) -> Method:
        """N stays in evaluation mode: it has no dropout, and its BatchNorm is fixed."""
        super().train(mode)
        if self.second is not None:
            self.second.eval()
        return self

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Loss of the variant (pnoc: L_f + omega l(N(x_hard), y~)) with its terms."""
        cfg, progress = self.cfg, step / self.train_steps
        targets = self._smooth(batch.labels)
        if cfg.variant == "plain":
            loss = tag_loss(self.generator(batch.images, pooled=True), targets)
            return {"loss": cfg.loss_scale * loss, "loss_cls": loss.detach()}
        maps = self.generator(batch.images).float()
        out = {"loss_cls": tag_loss(maps.mean((2, 3)), targets)}
        loss = out["loss_cls"]
        if cfg.variant in PUZZLE:
            again = stitch(self.generator(tiles(batch.images)).float())
            out["loss_tiles"] = tag_loss(again.mean((2, 3)), targets)
            out["loss_puzzle"] = (batch.labels[:, :, None, None] * (maps - again).abs()).mean()
            loss = loss + out["loss_tiles"] + cfg.puzzle.at(progress) * out["loss_puzzle"]
        if cfg.variant in ERASING:
            drawn, rest = draw_class(maps, batch.labels, batch.draws)
            largest = dist.batch_max(kernels.erase_maximum(drawn, batch.images.shape[-2:]))
            soft = kernels.erase_soft(batch.images, drawn, maximum=largest)
            with nullcontext() if cfg.noc_leak else frozen(self.second):
                seen = self.second(soft, pooled=True)
            out["loss_erase"] = tag_loss(seen, self._smooth(rest))
            loss = loss + cfg.erase.at(progress) * out["loss_erase"]
            if cfg.variant == "p_noc":
                hard = kernels.erase_hard(batch.images, drawn.detach(), threshold=cfg.threshold)
                out["loss_noc"] = tag_loss(self.second(hard, pooled=True), targets)
                loss = loss + cfg.noc.at(progress) * out["loss_noc"]
        return {"loss": cfg.loss_scale * loss, **{k: v.detach() for k, v in out.items()}}

    @torch.no_grad()
    def predict(self, batch: Batch, views: Views) -> Prediction:
        """CAM: rectified maps summed over scales and mirror images, each divided by its maximum (plus 1e-5)."""
        return Prediction(cam=cams.multi_scale(self.class_maps, batch.images, batch.labels, views.cam_scales))

    def class_maps(self, images: Tensor, pairs: Tensor, mirror: bool = True) -> Tensor:
        """Rectified maps [P, h, w] of P pairs of images [B, 3, H, W], plus those of the mirror images where asked."""
        return cams.rectified_maps(self.generator, images, pairs, mirror)

    def _smooth(self, labels: Tensor) -> Tensor:
        return (1 - self.cfg.label_smoothing) * labels + self.cfg.label_smoothing / 2


def tiles(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [4B, 3, H/2, W/2]: all top left tiles, then top right, bottom left, bottom right."""
    return torch.cat([part for row in images.chunk(TILES, 2) for part in row.chunk(TILES, 3)])


def stitch(maps: Tensor) -> Tensor:
    """Maps [4B, C, h/2, w/2] of the tiles, in the order of `tiles` -> [B, C, h, w]."""
    parts = maps.chunk(TILES * TILES)
    return torch.cat([torch.cat(parts[r * TILES : (r + 1) * TILES], 3) for r in range(TILES)], 2)


def draw_class(maps: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One of its tags for each image: the map of that class [B, h, w], and the tags left over [B, C].

    An image without tags keeps none and gets a map of zeros.

    Args:
        maps: [B, C, h, w].
        labels: [B, C] in {0, 1}.
        draws: [B] uniform in [0, 1); an image with n tags takes tag floor(draw n).
    """
    tagged = labels.any(1)
    rank = (draws * labels.sum(1)).long()[:, None]
    drawn = (labels.cumsum(1) > rank).float().argmax(1, keepdim=True)
    own = maps.gather(1, drawn[:, :, None, None].expand(-1, -1, *maps.shape[2:]))[:, 0]
    return own * tagged[:, None, None], labels.scatter(1, drawn, 0.0)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, what the network computes has gradient for its input but none for its parameters."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
