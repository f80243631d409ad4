"""ResNeSt and ResNet written out from their description, on the state dict of the network under test.

Names are those of `wsss_dist.models.resnet.ResNet`; nothing of timm is used. Tables hold (stride, dilation of the first
block, dilation of the other blocks) of layer1 to layer4, by output stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RESNEST = {16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)], 8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]}
RESNET = {16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)], 8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 1, 4)]}
CAFFE = {16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 2)]}


class Weights:
    """Convolution and BatchNorm by name."""

    def __init__(self, state: dict[str, Tensor], training: bool = False):
        self.state, self.training = {k: v.clone() for k, v in state.items()}, training

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, scale, bias = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, bias, training=self.training)

    def unit(self, conv: str, norm: str, x: Tensor, **options: int) -> Tensor:
        return self.norm(norm, self.conv(conv, x, **options)).relu()

    def has(self, prefix: str) -> bool:
        return any(k.startswith(f"{prefix}.") for k in self.state)


def resnest_block(w: Weights, name: str, x: Tensor, stage: int, k: int, output_stride: int) -> Tensor:
    """Block k (0-based) of stage 1 to 4."""
    stride, first, rest = RESNEST[output_stride][stage - 1]
    dilation = rest if k else first
    y = w.unit(f"{name}.conv1", f"{name}.bn1", x)
    u = w.unit(f"{name}.conv2.conv", f"{name}.conv2.bn0", y, padding=dilation, dilation=dilation, groups=2)
    planes = u.shape[1] // 2
    u1, u2 = u[:, :planes], u[:, planes:]
    g = (u1 + u2).mean((2, 3), keepdim=True)
    a = w.conv(f"{name}.conv2.fc2", w.unit(f"{name}.conv2.fc1", f"{name}.conv2.bn1", g))
    assert w.state[f"{name}.conv2.fc1.weight"].shape[0] == max(planes // 2, 32)
    e1, e2 = a[:, :planes].exp(), a[:, planes:].exp()
    y = (e1 * u1 + e2 * u2) / (e1 + e2)
    if k == 0 and stage > 1:
        y = F.avg_pool2d(y, 3, stride, padding=1)
    y = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", y))
    if k == 0:
        if rest == 1:
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        x = w.norm(f"{name}.downsample.2", w.conv(f"{name}.downsample.1", x))
    return (y + x).relu()


def resnest_stem(w: Weights, x: Tensor) -> Tensor:
    x = w.unit("stem.0.0", "stem.0.1", x, stride=2, padding=1)
    x = w.unit("stem.0.3", "stem.0.4", x, padding=1)
    return w.unit("stem.0.6", "stem.1", x, padding=1)


def resnet_block(w: Weights, name: str, x: Tensor, stage: int, k: int, output_stride: int, table: dict = RESNET):
    """Block k of stage 1 to 4: bottleneck (stride on the 3x3; in `CAFFE` on the first 1x1) or basic."""
    stride, first, rest = table[output_stride][stage - 1]
    stride = 1 if k else stride
    dilation = rest if k else first
    wide = {"padding": dilation, "dilation": dilation}
    if w.has(f"{name}.conv3"):
        on_1x1, on_3x3 = (stride, 1) if table is CAFFE else (1, stride)
        y = w.unit(f"{name}.conv1", f"{name}.bn1", x, stride=on_1x1)
        y = w.unit(f"{name}.conv2", f"{name}.bn2", y, stride=on_3x3, **wide)
        y = w.norm(f"{name}.bn3", w.conv(f"{name}.conv3", y))
    else:
        y = w.unit(f"{name}.conv1", f"{name}.bn1", x, stride=stride, **wide)
        y = w.norm(f"{name}.bn2", w.conv(f"{name}.conv2", y, **wide))
    if w.has(f"{name}.downsample"):
        x = w.norm(f"{name}.downsample.1", w.conv(f"{name}.downsample.0", x, stride=stride))
    return (y + x).relu()


def resnet_stem(w: Weights, x: Tensor) -> Tensor:
    return w.unit("stem.0", "stem.1", x, stride=2, padding=3)


def taps(w: Weights, x: Tensor, blocks: list[int], output_stride: int, kind: str) -> list[Tensor]:
    """The stem before its pooling, after it, and the four stages; kind is resnest, resnet or caffe."""
    x = (resnest_stem if kind == "resnest" else resnet_stem)(w, x)
    out = [x]
    x = F.max_pool2d(x, 3, 2, padding=1, ceil_mode=kind == "caffe")
    out.append(x)
    for stage, number in enumerate(blocks, start=1):
        for k in range(number):
            name = f"layers.{stage - 1}.{k}"
            if kind == "resnest":
                x = resnest_block(w, name, x, stage, k, output_stride)
            else:
                x = resnet_block(w, name, x, stage, k, output_stride, CAFFE if kind == "caffe" else RESNET)
        out.append(x)
    return out


def resnest_parameters(blocks: list[int], stem: int) -> int:
    """Number of parameters, without a classifier."""
    total = 3 * stem * 9 + stem * stem * 9 + stem * 2 * stem * 9 + 2 * (stem + stem + 2 * stem)
    width = 2 * stem
    for planes, number in zip((64, 128, 256, 512), blocks, strict=True):
        attention = max(planes // 2, 32)
        for k in range(number):
            total += width * planes + 2 * planes
            total += 2 * planes * (planes // 2) * 9 + 4 * planes
            total += (planes + 1) * attention + 2 * attention + (attention + 1) * 2 * planes
            total += planes * 4 * planes + 8 * planes
            if k == 0:
                total += width * 4 * planes + 8 * planes
            width = 4 * planes
    return total


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
