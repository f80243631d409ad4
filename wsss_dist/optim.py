"""The optimiser and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from wsss_dist.schema import StrictModel


class OptimConfig(StrictModel):
    """`optim:` section. The defaults are those of PCRE; a method can set the weight decay of a group itself."""

    # adam adds the weight decay to the gradient, adamw takes it off the weights
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)  # of adam and adamw, as eps
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # of sgd, as nesterov
    nesterov: bool = False
    schedule: Literal["poly", "cosine", "constant", "step"] = "poly"
    milestones: tuple[float, ...] = (0.4, 0.8)  # of step: fractions of the run at which the rate is divided by ten
    warmup_steps: int = Field(1500, ge=0)
    warmup_ratio: float = Field(1e-6, ge=0, le=1)
    power: float = Field(0.9, gt=0)

    @field_validator("milestones")
    @classmethod
    def _milestones_are_fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < m < 1 for m in value):
            raise ValueError("must be fractions of the run, above 0 and below 1, as [0.4, 0.8]")
        return value

    @model_validator(mode="after")
    def _keys_belong_to_the_optimiser(self) -> OptimConfig:
        of_another = ("betas", "eps") if self.name == "sgd" else ("momentum", "nesterov")
        if given := [key for key in of_another if getattr(self, key) != type(self).model_fields[key].default]:
            raise ValueError(f"'{given[0]}' is no setting of name: {self.name}; remove it")
        if self.schedule != "step" and self.milestones != type(self).model_fields["milestones"].default:
            raise ValueError(f"'milestones' is no setting of schedule: {self.schedule}; remove it")
        if self.nesterov and self.momentum == 0:
            raise ValueError("'nesterov' needs a 'momentum' above 0")
        return self


def lr_factor(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """What the base learning rate is multiplied with.

    With W = warmup_steps, r = warmup_ratio, M = total_steps: 1 - (1 - t/W)(1 - r) for t < W; afterwards
    step: 0.1^n, n the milestones m with t >= m M;
    poly: (1 - t/M)^power, which jumps down at t = W as in the released PCRE and ToCo code (t counts from the start of
    the run, not from the end of the warm-up); cosine: (1 + cos(pi (t - W)/(M - W)))/2; constant: 1.

    Args:
        step: 0-based training step t, 0 <= t < total_steps.
        cfg: the schedule.
        total_steps: M, the length of the run in steps.
    """
    if step < cfg.warmup_steps:
        return 1 - (1 - step / cfg.warmup_steps) * (1 - cfg.warmup_ratio)
    if cfg.schedule == "poly":
        return (1 - step / total_steps) ** cfg.power
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup_steps) / (total_steps - cfg.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))
    if cfg.schedule == "step":
        return 0.1 ** sum(step >= milestone * total_steps for milestone in cfg.milestones)
    return 1.0


def set_lr(groups: Iterable[dict], step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Write the learning rate of `step` into optimiser groups that carry "lr_mult"; returns the one of lr_mult 1."""
    lr = cfg.lr * lr_factor(step, cfg, total_steps)
    for group in groups:
        group["lr"] = lr * group["lr_mult"]
    return lr


def build_optimizer(method: nn.Module, groups: list[dict], cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over the groups of a method, as one fused kernel.

    Args:
        method: the module that owns the parameters; frozen ones (requires_grad False) must not be in a group.
        groups: dicts with "name", "params" (list) and "lr_mult", of `Method.param_groups()`; empty ones are dropped.
            "weight_decay" in a group takes the place of that of `cfg`.
        cfg: which one, and its settings.
    Raises:
        ValueError: a trainable parameter is in no group or in two, or a frozen one is in a group.
    """
    names = {id(p): name for name, p in method.named_parameters()}
    trainable = {id(p) for p in method.parameters() if p.requires_grad}
    seen: set[int] = set()
    for group in groups:
        for p in group["params"]:
            name = names.get(id(p), "a tensor outside the method")
            if id(p) in seen:
                raise ValueError(f"optim: parameter '{name}' is in two groups, again in '{group['name']}'")
            if id(p) not in trainable:
                raise ValueError(f"optim: frozen or foreign parameter '{name}' in group '{group['name']}'")
            seen.add(id(p))
    if missing := [names[i] for i in trainable - seen]:
        raise ValueError(f"optim: trainable parameters in no group of param_groups(): {', '.join(sorted(missing))}")
    kept = [{"lr_mult": 1.0, **g, "params": list(g["params"])} for g in groups if len(g["params"])]
    common = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "fused": True}
    if cfg.name == "sgd":
        optimizer = torch.optim.SGD(kept, momentum=cfg.momentum, nesterov=cfg.nesterov, **common)
    else:
        kind = torch.optim.AdamW if cfg.name == "adamw" else torch.optim.Adam
        optimizer = kind(kept, betas=cfg.betas, eps=cfg.eps, **common)
    optimizer.register_load_state_dict_post_hook(_lay_out_as_the_weights)
    return optimizer


@torch.no_grad()
def _lay_out_as_the_weights(optimizer: torch.optim.Optimizer) -> None:
    """A loaded state may be of a run with another layout of its weights; a fused kernel goes through all in step."""
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
