"""Normalisation layers."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import norm_act
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes with the number type of its statistics, whatever that of its input and its weights.

    DeepSpeed's bf16 mode casts the weights, and the engine keeps the statistics in fp32; torch refuses this mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(self.running_mean), self.bias.to(self.running_mean)
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )


class BatchNormAct2d(norm_act.BatchNormAct2d):
    """The same, with timm's dropout and activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(BatchNorm2d.forward(self, x)))


def take_mixed_types(model: nn.Module) -> None:
    """Make every BatchNorm of a timm model one of these, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
        elif type(module) is norm_act.BatchNormAct2d:
            module.__class__ = BatchNormAct2d
