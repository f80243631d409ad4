"""Feature maps of five levels from any convolutional timm backbone.

A ResNet or ResNeSt gets the published details (`resnet.py`); every other network is taken as timm builds it.

Letters: B batch, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.norms import BatchNorm2d, BatchNormAct2d, take_mixed_types
from wsss_dist.models.pretrained import create_backbone, weights_note
from wsss_dist.models.resnet import ResNet, ResNetConfig

LEVELS = 5


def build_pyramid(cfg: ResNetConfig) -> ResNet | Pyramid:
    """The backbone of a config: images [B, 3, H, W] -> five maps, of strides 4, 4, 8, 16, 16 (or 4, 4, 8, 8, 8).

    Raises:
        UserError: a network without five levels, or weights that do not fit.
    """
    return ResNet(cfg) if cfg.name.startswith("res") else Pyramid(cfg)


class Pyramid(nn.Module):
    """The five levels of a timm network, with the interface of `ResNet`.

    The first level, of stride 2, is max-pooled to stride 4, as the stem of a ResNet is.
    """

    is_resnest = False

    def __init__(self, cfg: ResNetConfig):
        super().__init__()
        if cfg.recompute:
            raise UserError(f"config: 'method.backbone.recompute' is for ResNets, not for {cfg.name!r}; remove it")
        self.cfg = cfg
        try:
            self.body = create_backbone(cfg.name, cfg.weights, output_stride=cfg.output_stride, features_only=True)
        except TypeError:
            raise _refusal(cfg, "it takes no output stride") from None
        info = self.body.feature_info
        if len(info) != LEVELS or info.reduction()[:3] != [2, 4, 8]:
            raise _refusal(cfg, f"its levels have the strides {info.reduction()}")
        take_mixed_types(self.body)
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides = (4, *info.reduction()[1:])
        for module in [*self._frozen(), *self._fixed_norms()]:
            module.requires_grad_(False)
        self.train(self.training)

    @property
    def dim(self) -> int:
        """Channels of the last map."""
        return self.channels[-1]

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return weights_note(self.cfg.weights)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        taps = self.body(images.contiguous(memory_format=torch.channels_last))
        return (self.pooled(taps[0]), *taps[1:])

    def pooled(self, first: Tensor) -> Tensor:
        """The first level, as it is given out."""
        return F.max_pool2d(first, 3, 2, 1)

    def train(self, mode: bool = True) -> Pyramid:
        """Training mode for what is trained; BatchNorm with stored statistics stays in evaluation mode."""
        super().train(mode)
        for module in [*self._frozen(), *self._fixed_norms()]:
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        """The layers up to the end of the last frozen level; a network lists its layers in their order."""
        if not self.cfg.frozen_stages:
            return []
        # a norm with an activation inside is a layer too
        layers = [(n, m) for n, m in self.body.named_modules() if not any(m.children()) or m._parameters]
        end = self.body.feature_info[self.cfg.frozen_stages - 1]["module"]
        last = max(i for i, (name, _) in enumerate(layers) if f"{name}.".startswith(f"{end}."))
        return [m for _, m in layers[: last + 1]]

    def _fixed_norms(self) -> list[nn.Module]:
        fix = self.cfg.norm == "fix"
        return [m for m in self.modules() if isinstance(m, BatchNorm2d | BatchNormAct2d)] if fix else []


def _refusal(cfg: ResNetConfig, reason: str) -> UserError:
    return UserError(
        f"config: backbone {cfg.name!r} gives no five maps of strides 2, 4, 8 and {cfg.output_stride} ({reason}); "
        "choose a resnest*, resnet*, efficientnet* or tf_efficientnet_lite*"
    )
