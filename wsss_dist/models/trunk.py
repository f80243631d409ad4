"""One interface to the backbones of a classifier with a segmentation branch: VGG-16, ResNet and its like, plain ViT.

Letters: B batch, D channels, H W pixels, h w feature grid.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from timm.layers import Conv2dSame
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
    recompute: bool = False  # ResNets and ViTs: activations inside blocks are computed again in the backward pass


class Trunk(nn.Module):
    """Images [B, 3, H, W] -> features [B, D, h, w], h = ceil(H / stride), w = ceil(W / stride).

    dim is D, patch_size the stride. Cell i stands for pixel `offset` + i stride. The offset is 0 with symmetric
    padding, and the middle of the patch with a ViT. TensorFlow's padding is all at the far side, so that a cell looks
    at its last pixel, but what a trained one finds there lies in its middle (docs/LOG.md).

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
        elif self.is_vit:
            self._refuse(output_stride=TrunkConfig().output_stride, norm="normal")
            same = {"name": cfg.name, "weights": cfg.weights, "last_block": "attention", "recompute": cfg.recompute}
            vit = parse(BackboneConfig, {**same, "frozen_blocks": cfg.frozen_stages}, "method.backbone")
            self.body = ViT(vit, num_class_tokens=0)
            self.patch_size = self.body.patch_size
        else:
            self.body = build_pyramid(parse(ResNetConfig, cfg.model_dump(), "method.backbone"))
            self.patch_size = cfg.output_stride
        self.dim: int = self.body.dim
        tensorflow = any(isinstance(m, Conv2dSame) for m in self.body.modules())
        self._in_the_middle = self.is_vit or tensorflow
        self.offset: int = self.patch_size // 2 if self._in_the_middle else 0

    def _refuse(self, **fixed: object) -> None:
        for key, value in fixed.items():
            if getattr(self.cfg, key) != value:
                raise UserError(
                    f"config: 'method.backbone.{key}' is {getattr(self.cfg, key)!r}, which {self.cfg.name!r} does not "
                    "have; leave it out"
                )

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return weights_note(self.cfg.weights)

    def forward(self, images: Tensor) -> Tensor:
        if self._in_the_middle:
            bottom, right = (-side % self.patch_size for side in images.shape[-2:])
            images = F.pad(images, (0, right, 0, bottom))
        features = self.body(images)
        if self.is_vit:
            return features.as_map(features.patches)
        return features[-1] if isinstance(features, tuple) else features

    def to_image(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps [B, K, h, w] of the grid -> [B, K, H, W], bilinear between the cells, constant beyond the outer ones."""
        height, width = maps.shape[-2:]
        if self._in_the_middle:
            whole = (height * self.patch_size, width * self.patch_size)
            full = F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)
        else:
            inner = ((height - 1) * self.patch_size + 1, (width - 1) * self.patch_size + 1)
            full = F.interpolate(maps, size=inner, mode="bilinear", align_corners=True)
            bottom, right = (max(0, side - n) for side, n in zip(size, inner, strict=True))
            full = F.pad(full, (0, right, 0, bottom), mode="replicate")
        return full[..., : size[0], : size[1]]

    def at_cells(self, labels: Tensor, grid: tuple[int, int], missing: int) -> Tensor:
        """Labels [B, H, W] of the pixels that the cells of a grid (h, w) stand for; `missing` beyond the image."""
        picked = labels[:, self.offset :: self.patch_size, self.offset :: self.patch_size][:, : grid[0], : grid[1]]
        return F.pad(picked, (0, grid[1] - picked.shape[2], 0, grid[0] - picked.shape[1]), value=missing)
