"""ResNet and ResNeSt from timm, dilated as the segmentation literature does it, with the feature maps of five levels.

timm's dilated networks differ in details from those that the published weights and scores belong to; `arrange_resnet`
and `arrange_resnest` undo that. Source: P-NOC (arXiv 2305.12522), ResNeSt (arXiv 2004.08955).

Letters: B batch, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import timm
import torch
from pydantic import Field
from timm.layers import AvgPool2dSame, SplitAttn
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.norms import BatchNorm2d, recomputed
from wsss_dist.models.pretrained import create_backbone, weights_note
from wsss_dist.schema import StrictModel

# stride and dilation of layer1 to layer4, by output stride
STRIDES = {16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
DILATIONS = {16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class ResNetConfig(StrictModel):
    """A ResNet or ResNeSt backbone."""

    name: str = "resnest269e.in1k"  # timm model: resnest14d, 26d, 50d, 101e, 200e, 269e, resnet18, 34, 50, 101
    weights: str | None = "timm"  # "timm" hub, a file, or null for random weights
    output_stride: Literal[8, 16] = 16
    norm: Literal["normal", "fix"] = "normal"  # fix: BatchNorm uses stored statistics, its scale and bias are frozen
    # so many of the five levels, the stem first, are not trained, and their BatchNorm uses stored statistics
    frozen_stages: int = Field(0, ge=0, le=5)
    # keep no activations inside the blocks but compute them again in the backward pass: less memory, a third more time
    recompute: bool = False


class ResNet(nn.Module):
    """Images [B, 3, H, W] -> five feature maps: the stem after its max pooling, layer1, ..., layer4.

    channels and strides are those of the five maps; a map has ceil(H / stride) rows.

    Raises:
        UserError: not a ResNet or ResNeSt of the expected structure, or weights that do not fit.
    """

    def __init__(self, cfg: ResNetConfig):
        super().__init__()
        self.cfg = cfg
        model = _create(cfg)
        layers = [model.layer1, model.layer2, model.layer3, model.layer4]
        self.is_resnest = isinstance(layers[0][0], ResNestBottleneck)
        arrange = arrange_resnest if self.is_resnest else arrange_resnet
        try:
            arrange(layers, cfg.output_stride)
        except _OtherStructureError as error:
            raise _refusal(cfg.name, str(error)) from None
        self.stem = nn.Sequential(model.conv1, model.bn1, model.act1)
        self.pool = model.maxpool
        self.layers = nn.ModuleList(layers)
        self.channels: tuple[int, ...] = tuple(level["num_chs"] for level in model.feature_info)
        strides = [4]
        for stride in STRIDES[cfg.output_stride]:
            strides.append(strides[-1] * stride)
        self.strides = tuple(strides)
        self._freeze()

    @property
    def dim(self) -> int:
        """Channels of the last map."""
        return self.channels[-1]

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return weights_note(self.cfg.weights)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        moves = self.training and self.cfg.norm == "normal" and self.cfg.frozen_stages < len(self.channels)
        if moves and self.is_resnest and len(images) == 1:
            raise UserError(
                f"config: 'train.micro_batch' is 1, but {self.cfg.name!r} has norms over one number per image and "
                "channel; set it to 2 or more, or set method.backbone.norm: fix"
            )
        x = self.pool(self.stem(images))
        taps = [x]
        for layer in self.layers:
            x = self._level(layer, x)
            taps.append(x)
        return tuple(taps)

    def _level(self, layer: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.cfg.recompute and torch.is_grad_enabled()):
            return layer(x)
        for block in layer:
            x = recomputed(block, x)
        return x

    def train(self, mode: bool = True) -> ResNet:
        """Training mode for what is trained; BatchNorm with stored statistics stays in evaluation mode."""
        super().train(mode)
        for module in [*self._frozen(), *self._fixed_norms()]:
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        levels = [self.stem, *self.layers]
        return list(self.children()) if self.cfg.frozen_stages == len(levels) else levels[: self.cfg.frozen_stages]

    def _fixed_norms(self) -> list[nn.Module]:
        fix = self.cfg.norm == "fix"
        return [m for m in self.modules() if isinstance(m, BatchNorm2d)] if fix else []

    def _freeze(self) -> None:
        for module in [*self._frozen(), *self._fixed_norms()]:
            module.requires_grad_(False)
        self.train(self.training)


def arrange_resnest(layers: list[nn.Sequential], output_stride: int) -> None:
    """Give the stages of a dilated timm ResNeSt the details of the original.

    - The first block of a stage with stride 1 has the 3x3 average pooling after its split-attention convolution, as
      that of a stage with stride 2 has; timm leaves it out. The first block of layer1 has none in either.
    - The shortcut of a dilated stage has no pooling; timm averages 2x2 pixels there.

    Raises:
        _OtherStructureError: timm built something else than that.
    """
    for i, (layer, stride, dilation) in enumerate(_stages(layers, output_stride)):
        previous = DILATIONS[output_stride][i - 1] if i else 1
        for k, block in enumerate(layer):
            where = f"layer{i + 1}.{k}"
            _expect(type(block) is ResNestBottleneck, f"{where} is a {type(block).__name__}")
            _expect(type(block.conv2) is SplitAttn and block.conv2.radix == 2, f"{where} has no split attention of 2")
            _expect(block.conv2.conv.groups == 2, f"{where} has a cardinality above 1")
            _expect_conv(block.conv2.conv, 1, dilation if k else previous, f"{where}.conv2")
            _expect(block.avd_first is None, f"{where} pools before its 3x3 convolution")
            _expect_pool(block.avd_last, (3, 2, 1, False) if stride == 2 and not k else None, f"{where}.avd_last")
            _expect((block.downsample is None) == bool(k), f"{where} has another shortcut")
        first = layer[0]
        pool = first.downsample[0]
        if dilation > 1:
            _expect(type(pool) is AvgPool2dSame, f"layer{i + 1}.0 has a {type(pool).__name__} in its shortcut")
            first.downsample[0] = nn.Identity()
        else:
            _expect_pool(pool, (2, 2, 0, True) if stride == 2 else None, f"layer{i + 1}.0.downsample")
        if i and stride == 1:
            first.avd_last = nn.AvgPool2d(3, stride=1, padding=1)


def arrange_resnet(layers: list[nn.Sequential], output_stride: int) -> None:
    """Give every first block of a dilated timm ResNet the dilation 1.

    timm gives it that of the stage before, and the second convolution of an 18- or 34-layer network that of its stage.

    Raises:
        _OtherStructureError: timm built something else than that.
    """
    kind = type(layers[0][0])
    _expect(kind in (BasicBlock, Bottleneck), f"layer1.0 is a {kind.__name__}")
    for i, (layer, stride, dilation) in enumerate(_stages(layers, output_stride)):
        previous = DILATIONS[output_stride][i - 1] if i else 1
        for k, block in enumerate(layer):
            where = f"layer{i + 1}.{k}"
            _expect(type(block) is kind, f"{where} is a {type(block).__name__}")
            _expect(block.se is None and type(block.aa) is nn.Identity, f"{where} has attention or blurring")
            own, first = (stride, previous) if not k else (1, dilation)
            if kind is BasicBlock:
                _expect_conv(block.conv1, own, first, f"{where}.conv1")
                _expect_conv(block.conv2, 1, dilation, f"{where}.conv2")
            else:
                _expect_conv(block.conv1, 1, 1, f"{where}.conv1")
                _expect_conv(block.conv2, own, first, f"{where}.conv2")
            plain = block.downsample is None or type(block.downsample[0]) is nn.Conv2d
            _expect(plain and (block.downsample is None or not k), f"{where} has another shortcut")
        set_dilation(layer[0], 1)


def set_dilation(block: BasicBlock | Bottleneck, dilation: int) -> None:
    """Dilation of the 3x3 convolutions of a ResNet block; sizes stay."""
    for conv in (block.conv1, block.conv2):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)


class _OtherStructureError(Exception):
    """timm's network is not built as the patches of this file expect."""


def _stages(layers: list[nn.Sequential], output_stride: int) -> list[tuple[nn.Sequential, int, int]]:
    return list(zip(layers, STRIDES[output_stride], DILATIONS[output_stride], strict=True))


def _expect(condition: bool, found: str) -> None:
    if not condition:
        raise _OtherStructureError(found)


def _expect_conv(conv: nn.Conv2d, stride: int, dilation: int, where: str) -> None:
    kind = f"{where} has stride {conv.stride[0]} and dilation {conv.dilation[0]}, not {stride} and {dilation}"
    _expect(conv.stride == (stride, stride) and conv.dilation == (dilation, dilation), kind)


def _expect_pool(pool: nn.Module | None, wanted: tuple[int, int, int, bool] | None, where: str) -> None:
    """`wanted`: kernel, stride, padding and ceil mode of an average pooling, None for no pooling."""
    if wanted is None:
        _expect(pool is None or type(pool) is nn.Identity, f"{where} is a {type(pool).__name__}")
        return
    _expect(type(pool) is nn.AvgPool2d, f"{where} is a {type(pool).__name__}")
    found = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    _expect(found == wanted, f"{where} has kernel, stride, padding, ceil mode {found}")
    _expect(pool.count_include_pad == (wanted[2] > 0), f"{where} has count_include_pad {pool.count_include_pad}")


def _create(cfg: ResNetConfig) -> TimmResNet:
    try:
        # a scale that starts at zero and is frozen would switch every block off for good
        options = {"zero_init_last": cfg.norm == "normal", "norm_layer": BatchNorm2d}
        model = create_backbone(cfg.name, cfg.weights, output_stride=cfg.output_stride, **options)
    except TypeError:
        raise _refusal(cfg.name, "it takes no output stride or no zero_init_last") from None
    if type(model) is not TimmResNet:
        raise _refusal(cfg.name, f"it is a {type(model).__name__}")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and type(m) is not BatchNorm2d for m in model.modules()):
        raise _refusal(cfg.name, "it has norms of its own")
    pool = model.maxpool
    if type(pool) is not nn.MaxPool2d or (pool.kernel_size, pool.stride, pool.padding) != (3, 2, 1):
        raise _refusal(cfg.name, "its stem has no 3x3 max pooling of stride 2")
    return model


def _refusal(name: str, reason: str) -> UserError:
    return UserError(
        f"config: backbone {name!r} of timm {timm.__version__} is not a ResNet or ResNeSt of the expected structure "
        f"({reason}); choose resnest14d, resnest26d, resnest50d, resnest101e, resnest200e, resnest269e, resnet18, "
        "resnet34, resnet50 or resnet101, or another version of timm"
    )
