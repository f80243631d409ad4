"""What ZeRO-3 asks of a network, and random norms; shared by the tests of the networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_ready_for_zero3(network: nn.Module, *inputs: object) -> None:
    """Every module with parameters of its own is called, once on its way, and returns what ZeRO-3 can look into."""
    called = set()

    def note(module: nn.Module, _: object, output: object) -> None:
        called.add(module)
        assert isinstance(output, Tensor | tuple | list | dict), f"{module} returned {type(output).__name__}"

    hooks = [m.register_forward_hook(note) for m in network.modules()]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    missed = [n for n, m in network.named_modules() if m not in called and list(m.parameters(recurse=False))]
    assert not missed, f"never called: {missed}"


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def shake(network: nn.Module) -> nn.Module:
    """Random scales, biases and statistics for every norm, so that none of them is neutral."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network
