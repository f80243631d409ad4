"""PoolNet (CVPR 2019): a salient-object network on a Caffe-style ResNet, without its edge branch.

Letters: B batch, H W pixels. Every resize is bilinear with align_corners.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.pyramid import Pyramid
from wsss_dist.models.resnet import ResNet, ResNetConfig, set_dilation
from wsss_dist.schema import StrictModel

MEAN_BGR = (104.00699, 116.66877, 122.67892)
PYRAMID = 512
GRIDS = (1, 3, 5)
POOLS = (2, 4, 8)
LATERAL = (128, 256, 256, 512, 512)  # channels of the lateral maps, from e0 to e4
# of the fusion blocks, from the top: input and output channels, resized to the next tap, fused with the next lateral
BLOCKS = ((512, 512, False, True), (512, 256, True, True), (256, 256, True, True), (256, 128, True, True))
LAST = (128, 128, False, False)


class PoolNetConfig(StrictModel):
    """The backbone of PoolNet."""

    # timm model: resnet18, 34, 50, 101, which are made Caffe's, or any with five levels, as it is
    name: str = "resnet50.tv_in1k"
    weights: str | None = "timm"  # "timm" hub, a file, or null for random weights
    width: float = Field(1.0, gt=0, le=1)  # of all layers after the backbone, as a share of the published ones


def caffe_input(rgb: Tensor) -> Tensor:
    """RGB images [B, 3, H, W] in [0, 1] -> BGR in [0, 255] less the mean colour, what Caffe's weights expect."""
    mean = torch.tensor(MEAN_BGR, dtype=rgb.dtype, device=rgb.device)[:, None, None]
    return rgb.flip(1) * 255 - mean


class CaffeResNet(ResNet):
    """Images [B, 3, H, W] -> maps e0 (stem before its pooling, stride 2) and e1 to e4 (strides 4, 8, 16, 16).

    A ResNet with stride on the first 1x1 convolution of a block (an 18- or 34-layer one has none and is left as it
    is), max pooling with ceil mode, dilation 2 in all of layer4, and BatchNorm with stored statistics, never trained.
    """

    def __init__(self, cfg: PoolNetConfig):
        super().__init__(ResNetConfig(name=cfg.name, weights=cfg.weights, output_stride=16, norm="fix"))
        if self.is_resnest:
            raise UserError(f"config: backbone {cfg.name!r} of PoolNet must be resnet18, 34, 50 or 101; choose one")
        self.pool.ceil_mode = True
        for layer in self.layers[1:3]:
            block = layer[0]
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        set_dilation(self.layers[3][0], 2)
        self.strides = (2, *self.strides[1:])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        e0 = self.stem(images)
        x, taps = self.pool(e0), [e0]
        for layer in self.layers:
            x = layer(x)
            taps.append(x)
        return tuple(taps)


class FinePyramid(Pyramid):
    """The five levels of a timm network as they are, the first of stride 2, with BatchNorm never trained."""

    def __init__(self, cfg: PoolNetConfig):
        super().__init__(ResNetConfig(name=cfg.name, weights=cfg.weights, output_stride=16, norm="fix"))
        self.strides = (2, *self.strides[1:])

    def pooled(self, first: Tensor) -> Tensor:
        return first


class PoolNet(nn.Module):
    """Images [B, 3, H, W] -> saliency logits [B, 1, H, W]. `is_caffe`: the images are those of `caffe_input`."""

    def __init__(self, cfg: PoolNetConfig):
        super().__init__()
        self.is_caffe = cfg.name.startswith("res")
        self.backbone = CaffeResNet(cfg) if self.is_caffe else FinePyramid(cfg)
        self.decoder = PoolNetDecoder(self.backbone.channels, cfg.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone(images), images.shape[2:])


class PoolNetDecoder(nn.Module):
    """Maps e0 to e4 of the given channels -> saliency logits [B, 1, H, W]; `width` scales the channels of its own."""

    def __init__(self, channels: Sequence[int], width: float = 1.0):
        super().__init__()
        own = functools.partial(_narrowed, width=width)
        self.pyramid = PyramidPooling(channels[-1], own(PYRAMID))
        self.guides = nn.ModuleList(_unit(own(PYRAMID), own(k_out), 3) for _, k_out, _, _ in BLOCKS)
        self.laterals = nn.ModuleList(_unit(dim, own(k), 1) for dim, k in zip(channels, LATERAL, strict=True))
        self.blocks = nn.ModuleList(FusionBlock(own(k), own(k_out), *how) for k, k_out, *how in (*BLOCKS, LAST))
        self.score = nn.Conv2d(own(LAST[1]), 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01 / width**0.5)  # the gain of the published width
        nn.init.zeros_(self.score.bias)

    def forward(self, taps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """`size`: (H, W) of the result."""
        guide = self.pyramid(taps[-1])
        laterals = [lateral(tap) for lateral, tap in zip(self.laterals, taps, strict=True)]
        x = laterals[4]
        for i, block in enumerate(self.blocks[:-1]):
            below = laterals[3 - i]
            x = block(x, below, self.guides[i](_resize(guide, below.shape[2:])))
        return _resize(self.score(self.blocks[-1](x)), size)


class PyramidPooling(nn.Module):
    """The global guide: [B, D, h, w] -> [B, width, h, w]."""

    def __init__(self, dim: int, width: int = PYRAMID):
        super().__init__()
        self.reduce = nn.Conv2d(dim, width, 1, bias=False)
        self.levels = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(grid), _unit(width, width, 1)) for grid in GRIDS)
        self.merge = _unit(width * (len(GRIDS) + 1), width, 3)

    def forward(self, features: Tensor) -> Tensor:
        x = self.reduce(features)
        levels = [_resize(level(x), x.shape[2:]) for level in self.levels]
        return self.merge(torch.cat([x, *levels], dim=1))


class FusionBlock(nn.Module):
    """Feature aggregation at three pooled sizes, then a step down the pyramid.

    A map smaller than a pooling window is pooled as a whole, where the original fails.
    """

    def __init__(self, k: int, k_out: int, resized: bool, fused: bool):
        super().__init__()
        self.resized = resized
        self.convs = nn.ModuleList(_conv(k, k, 3) for _ in POOLS)
        self.out = _conv(k, k_out, 3)
        self.fuse = _conv(k_out, k_out, 3) if fused else None

    def forward(self, x: Tensor, below: Tensor | None = None, guide: Tensor | None = None) -> Tensor:
        """x [B, k, ., .]; below and guide [B, k_out, h, w], where the block is fused -> [B, k_out, h, w]."""
        size = x.shape[2:]
        total = x
        for conv, window in zip(self.convs, POOLS, strict=True):
            window = (min(window, size[0]), min(window, size[1]))
            total = total + _resize(conv(F.avg_pool2d(x, window)), size)
        total = F.relu(total)
        if self.resized:
            total = _resize(total, below.shape[2:])
        total = self.out(total)
        return total if self.fuse is None else self.fuse(total + below + guide)


def _narrowed(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _conv(dim: int, width: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, width, kernel, padding=kernel // 2, bias=False)


def _unit(dim: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_conv(dim, width, kernel), nn.ReLU())


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
