"""Parameter groups of a network with a pretrained part and a new one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def pretrained_and_new(
    pretrained: Sequence[nn.Module], new: Sequence[nn.Module], prefix: str = "", new_lr_mult: float = 10.0
) -> list[dict]:
    """Pretrained weights x1, pretrained biases x2, new weights x10 and new biases x20; no weight decay on biases.

    A parameter whose name ends in "bias" is a bias, also that of a norm; every other one is a weight, so are scales of
    norms. Frozen parameters are in no group, and a group without parameters is left out. Source: Puzzle-CAM, P-NOC.

    Args:
        pretrained: modules that start from pretrained weights.
        new: modules that start from random ones.
        prefix: put before the names of the groups, for a method with several networks.
        new_lr_mult: learning rate of the new weights, as a multiple of the base rate.
    Returns:
        groups for `Method.param_groups()`: dicts with "name", "params", "lr_mult", and "weight_decay" for biases.
    """
    groups = []
    for part, modules, factor in (("pretrained", pretrained, 1.0), ("new", new, new_lr_mult)):
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        weights = [p for n, p in named if n.rpartition(".")[2] != "bias"]
        biases = [p for n, p in named if n.rpartition(".")[2] == "bias"]
        groups.append({"name": f"{prefix}{part}_weights", "params": weights, "lr_mult": factor})
        groups.append({"name": f"{prefix}{part}_biases", "params": biases, "lr_mult": 2 * factor, "weight_decay": 0.0})
    return [g for g in groups if g["params"]]
