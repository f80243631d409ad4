"""Normalisation layers, and blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from timm.layers import norm_act
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes with the number type of its statistics, whatever that of its input and its weights.

    DeepSpeed's bf16 mode casts the weights, and the engine keeps the statistics in fp32; torch refuses this mixture.
    """

    again = False  # in a second forward pass on the same input, which must not move the statistics a second time

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(self.running_mean), self.bias.to(self.running_mean)
        mean, var = self.running_mean, self.running_var
        if self.training and BatchNorm2d.again:
            mean, var = mean.clone(), var.clone()
        elif self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


def recomputed(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """block(*args), whose inner activations are not kept but computed again in the backward pass, with the same result.

    Worth it with gradient only. Random numbers, autocast and the layers' hooks (ZeRO-3) are the same the second time.
    """
    return checkpoint(block, *args, use_reentrant=False, context_fn=_twice)


def _twice() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _second_pass()


@contextmanager
def _second_pass() -> Iterator[None]:
    BatchNorm2d.again = True
    try:
        yield
    finally:
        BatchNorm2d.again = False


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
