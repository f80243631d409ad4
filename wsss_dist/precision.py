"""bf16 where a run asks for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsss_dist import dist

if TYPE_CHECKING:
    from wsss_dist.data.batch import Batch


class Autocast(nn.Module):
    """Runs a method, in bf16 where that is asked for.

    Casts are not cached: a cast made under no_grad has no graph, and a later call with gradient would reuse it.
    """

    def __init__(self, method: nn.Module, enabled: bool):
        super().__init__()
        self.method, self.enabled = method, enabled

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        with autocast(self.enabled):
            return self.method(batch, step)


def autocast(enabled: bool) -> Any:
    """bf16 autocast on this rank's device, or nothing."""
    device = dist.device().type
    return torch.autocast(device, torch.bfloat16, cache_enabled=False) if enabled else nullcontext()
