"""Heads that turn feature maps into class maps or a saliency map with one convolution.

Letters: B batch, C foreground classes, D channels, h w feature grid. Source: P-NOC (arXiv 2305.12522); the saliency
head is that of C2AM (CVPR 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_dist.models.norms import BatchNorm2d


class CamHead(nn.Module):
    """Bias-free 1x1 convolution: features [B, D, h, w] -> raw class maps [B, C, h, w], or tag logits [B, C]."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)  # fan-in, gain sqrt(2)

    def forward(self, features: Tensor, pooled: bool = False) -> Tensor:
        """Class maps; with `pooled` their mean over the grid, computed without the maps."""
        if pooled:
            return self.conv(features.mean((2, 3), keepdim=True)).flatten(1)
        return self.conv(features)


class SaliencyHead(nn.Module):
    """Class-agnostic activation map: one bias-free 3x3 convolution, then BatchNorm over its single channel.

    The sigmoid of the map is the share of foreground of each position. Initialisation is torch's own.

    Args:
        dims: channels of layer3 and layer4.
    """

    def __init__(self, dims: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(sum(dims), 1, 3, padding=1, bias=False)
        self.norm = BatchNorm2d(1)

    def forward(self, layer3: Tensor, layer4: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D4 + D3, h, w], layer4 first, and their logits [B, 1, h, w], from two maps of one size."""
        features = torch.cat([layer4, layer3], dim=1)
        return features, self.norm(self.conv(features))
