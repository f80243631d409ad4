"""DeepLabV3+ decoder (ECCV 2018) with GroupNorm, as P-NOC (arXiv 2305.12522) trains it.

Letters: B batch, K classes with background, h w the grid of stride 4, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 256  # channels of the pyramid and of the decoder
LOW = 48  # channels of the reduced low-level map
RATES = (6, 12, 18)
GROUPS = 4


class DeepLabDecoder(nn.Module):
    """Maps layer1 [B, D1, h, w] and layer4 [B, D4, ., .] -> logits [B, K, h, w], or [B, K, H, W].

    Args:
        low_dim: D1.
        high_dim: D4.
        num_outputs: K.
        width: channels of the pyramid and of the decoder, a multiple of 4.
        dropout: with the three dropouts of the paper's code.
    """

    def __init__(self, low_dim: int, high_dim: int, num_outputs: int, width: int = WIDTH, dropout: bool = True):
        super().__init__()
        drop = (0.5, 0.5, 0.1) if dropout else (0.0, 0.0, 0.0)
        self.aspp = Aspp(high_dim, width, drop[0])
        self.reduce = _unit(low_dim, LOW, 1)
        self.fuse = nn.Sequential(
            _unit(width + LOW, width, 3), nn.Dropout(drop[1]), _unit(width, width, 3), nn.Dropout(drop[2])
        )
        self.score = nn.Conv2d(width, num_outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, layer1: Tensor, layer4: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits on the grid of layer1, or resized to `size` (H, W) with align_corners."""
        low, high = self.reduce(layer1), self.aspp(layer4)
        logits = self.score(self.fuse(torch.cat([_resize(high, low.shape[2:]), low], dim=1)))
        return logits if size is None else _resize(logits, size)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: [B, D, h, w] -> [B, width, h, w]."""

    def __init__(self, dim: int, width: int = WIDTH, dropout: float = 0.5):
        super().__init__()
        self.branches = nn.ModuleList([_unit(dim, width, 1), *(_unit(dim, width, 3, rate) for rate in RATES)])
        self.image = _unit(dim, width, 1)
        self.project = nn.Sequential(_unit(width * (len(RATES) + 2), width, 1), nn.Dropout(dropout))

    def forward(self, features: Tensor) -> Tensor:
        maps = [branch(features) for branch in self.branches]
        image = self.image(features.mean((2, 3), keepdim=True))
        return self.project(torch.cat([*maps, image.expand_as(maps[0])], dim=1))


def _unit(dim: int, width: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(dim, width, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, width), nn.ReLU())


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
