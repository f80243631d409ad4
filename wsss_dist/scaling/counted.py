"""The collectives of the real engine, for one rank of a group whose other members do not exist.

torch's "fake" backend answers every collective at once and moves nothing, so one process runs the step of rank 0 of
1,000: what it computes is worthless, which tensors it hands to which collective is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wsss_dist import dist
from wsss_dist.benchmark import synthetic
from wsss_dist.benchmark.contest import random_weights
from wsss_dist.config import RunConfig
from wsss_dist.engine import Engine, build_engine
from wsss_dist.methods import load_method
from wsss_dist.scaling.traffic import ALL_GATHER, ALL_REDUCE, BROADCAST, REDUCE_SCATTER, Call

_KINDS = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "allgather_coalesced_": ALL_GATHER,
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced_": REDUCE_SCATTER,
    "broadcast_": BROADCAST,
}


class Counted(TorchDispatchMode):
    """Notes every collective that is made inside, in `calls`; with any backend."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            if name not in ("barrier", "monitored_barrier_"):
                # the whole tensor is the larger of input and output
                self.calls.append(Call(_KINDS[name], max(_bytes(arg) for arg in args)))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(inner) for inner in value) if isinstance(value, list | tuple) else 0


def engine_of_one(cfg: RunConfig, ranks: int) -> Engine:
    """The engine of rank 0 of `ranks` that do not exist, with random weights; one in a process.

    A global batch that is no multiple of ranks x micro batch is set to that.
    """
    train = cfg.train
    if train.global_batch % (ranks * train.micro_batch):
        train = train.model_copy(update={"global_batch": ranks * train.micro_batch})
    # sums over ranks that do not exist are no losses
    cfg = cfg.model_copy(update={"train": train.model_copy(update={"nonfinite": "skip", "max_skips": 10**9})})
    dist.init_fake(0, ranks)
    torch.manual_seed(cfg.run.seed)
    method = load_method(cfg.method_name).Method(random_weights(cfg.method), synthetic.num_classes(cfg.data), 100)
    return build_engine(method, cfg)


def count_step(engine: Engine, at: float = 0.9, steps: int = 3) -> list[Call]:
    """The collectives of the last of a few steps: ZeRO 3 learns in the first ones what it needs when.

    Args:
        at: fraction of the run that they stand at.
    """
    cfg, index = engine.cfg, int(at * engine.cfg.train.steps)
    num_micro = cfg.train.global_batch // (cfg.train.micro_batch * dist.world_size())
    sizes = cfg.data, synthetic.num_classes(cfg.data), cfg.train.micro_batch
    batches = [synthetic.make_batch(*sizes, m) for m in range(num_micro)]
    for _ in range(steps):
        with Counted() as counted:
            engine.train_step(batches, index)
    return counted.calls
