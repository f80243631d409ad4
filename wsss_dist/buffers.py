"""Buffers that each rank gathers on its own samples, such as the running statistics of BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_dist import dist


def shared_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating buffers of the state dict, as their mean over the ranks; empty with one rank. A collective call.

    The model that is saved and evaluated has these, while each rank goes on with its own, so that saving more often
    changes nothing. The mean is rank 0's value plus the mean difference to it: to the bit that value where they agree.
    """
    if dist.world_size() == 1:
        return {}
    kept, out = module.state_dict(keep_vars=True), {}
    for name, buffer in module.named_buffers():
        if name in kept and buffer.is_floating_point():
            first = buffer.detach().clone()
            dist.broadcast(first)
            difference = torch.where(buffer == first, 0.0, buffer - first)  # infinity less itself would be NaN
            out[name] = first + dist.all_reduce_mean(difference)
    return out


def fill_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values over the buffers of the same names; names that are none are left out."""
    for name, buffer in module.named_buffers():
        if name in values:
            buffer.data.copy_(values[name])
