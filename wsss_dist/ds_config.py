"""DeepSpeed's configuration, derived from ours, so that batch size, precision and clipping exist once."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from wsss_dist.errors import UserError

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig

# DeepSpeed key -> the key of ours that decides it
_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch, train.micro_batch and the number of ranks",
    "gradient_clipping": "train.grad_clip",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_optimization.elastic_checkpoint": "the trainer, which deals a state to any number of ranks",
    "checkpoint": "the trainer, which writes its own checkpoints",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "elasticity": "train.global_batch",
}


def check_deepspeed_section(extra: dict[str, Any]) -> None:
    """The `deepspeed:` section may add only what no key of ours decides.

    Raises:
        UserError: it holds an owned key, with the key to set instead, or a misspelt one, which DeepSpeed would ignore.
    """
    names = ["zero_optimization", *(key for key in _OWNED if "." not in key)]
    for key in extra:
        if key not in names and (near := difflib.get_close_matches(key, names, n=1, cutoff=0.85)):
            raise UserError(f"config: unknown key 'deepspeed.{key}'; did you mean '{near[0]}'?")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"config: 'deepspeed.zero_optimization' must be a mapping, found {zero!r}")
    for key in [*extra, *(f"zero_optimization.{k}" for k in zero)]:
        if key in _OWNED:
            raise UserError(f"config: 'deepspeed.{key}' is decided by {_OWNED[key]}; remove it from 'deepspeed'")


def ds_config(cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: a pure function of the config and the number of ranks."""
    train = cfg.train
    check_deepspeed_section(cfg.deepspeed)
    return {
        "steps_per_print": 10**9,
        **cfg.deepspeed,
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * world_size),
        "gradient_clipping": train.grad_clip or 0.0,
        "zero_optimization": {**cfg.deepspeed.get("zero_optimization", {}), "stage": train.zero_stage},
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
