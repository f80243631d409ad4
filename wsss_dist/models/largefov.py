"""VGG-16 as DeepLab-LargeFOV has it: stride 8, and fc6 and fc7 as convolutions with a wide view.

Letters: B batch, H W pixels, h = ceil(H / 8), w = ceil(W / 8). Source: DeepLab (ICLR 2015), LargeFOV of 1024 channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.pretrained import create_backbone

WIDTH = 1024  # of fc6 and fc7
STRIDE = 8
CONVS = (2, 2, 3, 3, 3)  # convolutions of the five levels of VGG-16


class LargeFov(nn.Module):
    """Images [B, 3, H, W] -> features [B, 1024, h, w].

    The five levels are those of a timm VGG-16 without BatchNorm; its pools become 3x3 with padding 1, of stride 2
    behind levels 1 to 3 and of stride 1 behind levels 4 and 5, level 5 is dilated by 2, and a 3x3 average follows it.
    fc6 (3x3, dilation 12) and fc7 (1x1) are new, N(0, 0.01), each with ReLU and dropout 0.5.

    Args:
        name: timm model.
        weights: as in `create_backbone`.
    Raises:
        UserError: another network, or weights that do not fit.
    """

    dim = WIDTH

    def __init__(self, name: str, weights: str | None):
        super().__init__()
        body = create_backbone(name, weights).features
        convs = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
        if len(convs) != sum(CONVS) or any(isinstance(m, nn.BatchNorm2d) for m in body.modules()):
            raise UserError(f"config: backbone {name!r} is no VGG-16 without BatchNorm; choose vgg16")
        parts: list[nn.Module] = []
        for level, count in enumerate(CONVS, start=1):
            for conv in convs[:count]:
                if level == 5:
                    conv.dilation = conv.padding = (2, 2)
                parts += [conv, nn.ReLU(inplace=True)]
            convs = convs[count:]
            parts.append(nn.MaxPool2d(3, 2 if level <= 3 else 1, padding=1))
        self.body = nn.Sequential(*parts)
        fc6 = nn.Conv2d(512, WIDTH, 3, padding=12, dilation=12)
        fc7 = nn.Conv2d(WIDTH, WIDTH, 1)
        for conv in (fc6, fc7):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        act = nn.ReLU(inplace=True)
        self.view = nn.Sequential(fc6, act, nn.Dropout(0.5), fc7, act, nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(self.body(images), 3, stride=1, padding=1)
        return self.view(x)
