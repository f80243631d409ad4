"""How a method is run: in bf16, on images in channels_last, with compiled blocks, where a run asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.speed import as_written, compiler_errors, images_of, prepare

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig, TrainConfig
    from wsss_dist.data.batch import Batch


class Autocast(nn.Module):
    """Runs a method in training as `train.precision`, `train.channels_last` and `train.compile` say.

    Casts are not cached: a cast made under no_grad has no graph, and a later call with gradient would reuse it.
    """

    def __init__(self, method: nn.Module, cfg: RunConfig):
        super().__init__()
        self.method, self.cfg = method, cfg
        prepare(method, cfg)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        train = self.cfg.train
        batch = replace(batch, images=images_of(batch.images, train.channels_last))
        with autocast(train.precision == "bf16"), compiler_errors(train.compile):
            return self.method(batch, step)


def autocast(enabled: bool) -> Any:
    """bf16 autocast on this rank's device, or nothing."""
    device = dist.device().type
    return torch.autocast(device, torch.bfloat16, cache_enabled=False) if enabled else nullcontext()


@contextmanager
def inference(train: TrainConfig) -> Iterator[None]:
    """Without gradient, in the precision of the training, and nothing compiled."""
    with torch.no_grad(), autocast(train.precision == "bf16"), as_written(train.compile):
        yield
