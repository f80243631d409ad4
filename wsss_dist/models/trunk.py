"""One interface to the backbones of a classifier with a segmentation branch: VGG-16, ResNet and its like, plain ViT.

Letters: B batch, D channels, H W pixels, h w feature grid.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.largefov import STRIDE, LargeFov
from wsss_dist.models.pretrained import weights_note
from wsss_dist.models.pyramid import build_pyramid
from wsss_dist.models.resnet import ResNetConfig
from wsss_dist.models.vit import BackboneConfig, ViT
from wsss_dist.schema import StrictModel, parse


class TrunkConfig(StrictModel):
    """A backbone: "vgg16" (DeepLab-LargeFOV), a plain ViT ("vit_*", "deit*"), or a convolutional one of five levels."""

    name: str = "vgg16.tv_in1k"  # timm model
    weights: str | None = "timm"  # "timm" hub, a file, or null for random weights
    output_stride: Literal[8, 16] = 8  # of convolutional ones; VGG-16 has 8
    norm: Literal["normal", "fix"] = "normal"  # fix: BatchNorm uses stored statistics, its scale and bias are frozen
    frozen_stages: int = Field(0, ge=0)  # so many of the five levels, or blocks of a ViT, are not trained
    recompute: bool = False  # ResNets: activations inside blocks are computed again in the backward pass


class Trunk(nn.Module):
    """Images [B, 3, H, W] -> features [B, D, h, w].

    dim is D, patch_size the stride; pretrained and new are the modules that start from weights and from random numbers.

    Raises:
        UserError: a network of another structure, settings it does not have, or weights that do not fit.
    """

    def __init__(self, cfg: TrunkConfig):
        super().__init__()
        self.cfg = cfg
        self.is_vit = cfg.name.startswith(("vit_", "deit"))
        if cfg.name.startswith("vgg"):
            self._refuse(output_stride=STRIDE, norm="normal", frozen_stages=0, recompute=False)
            self.body: nn.Module = LargeFov(cfg.name, cfg.weights)
            self.patch_size = STRIDE
            self.pretrained, self.new = [self.body.body], [self.body.view]
        elif self.is_vit:
            self._refuse(norm="normal", recompute=False)
            same = {"name": cfg.name, "weights": cfg.weights, "last_block": "attention"}
            vit = parse(BackboneConfig, {**same, "frozen_blocks": cfg.frozen_stages}, "method.backbone")
            self.body = ViT(vit, num_class_tokens=0)
            self.patch_size = self.body.patch_size
            self.pretrained, self.new = [self.body], []
        else:
            self.body = build_pyramid(parse(ResNetConfig, cfg.model_dump(), "method.backbone"))
            self.patch_size = cfg.output_stride
            self.pretrained, self.new = [self.body], []
        self.dim: int = self.body.dim

    def _refuse(self, **fixed: object) -> None:
        for key, value in fixed.items():
            if getattr(self.cfg, key) != value:
                raise UserError(
                    f"config: 'method.backbone.{key}' is {getattr(self.cfg, key)!r}, which {self.cfg.name!r} does not "
                    f"have; expected {value!r}"
                )

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return weights_note(self.cfg.weights)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        if self.is_vit:
            return features.as_map(features.patches)
        return features[-1] if isinstance(features, tuple) else features
