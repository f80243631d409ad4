"""AffinityNet: the boundary branch of IRNet (CVPR 2019) on a frozen backbone.

Letters: B batch, h w the grid of stride 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32  # channels of each branch


class EdgeHead(nn.Module):
    """Five feature maps -> edge logits [B, 1, h, w], of which the sigmoid is the edge strength.

    No gradient reaches the feature maps. Initialisation is torch's own.

    Args:
        channels: of the five maps, from the backbone.
        strides: of the five maps in pixels, the first two 4.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        assert tuple(strides[:2]) == (4, 4) and len(channels) == len(strides) == 5
        self.factors = [stride // 4 for stride in strides]
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, WIDTH, 1, bias=False), nn.GroupNorm(4, WIDTH)) for dim in channels
        )
        self.score = nn.Conv2d(WIDTH * len(channels), 1, 1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """`taps`: maps [B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])]; h, w are those of the second."""
        height, width = taps[1].shape[2:]
        maps = []
        for tap, branch, factor in zip(taps, self.branches, self.factors, strict=True):
            x = branch(tap.detach())
            if factor > 1:
                size = (x.shape[2] * factor, x.shape[3] * factor)
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            maps.append(F.relu(x)[:, :, :height, :width])
        return self.score(torch.cat(maps, dim=1))
