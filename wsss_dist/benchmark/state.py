"""What an engine keeps on a device beside the tensors of forward and backward, from the numbers of weights.

Read off DeepSpeed 0.19 and held against what the engines keep (tests/train/test_memory.py). Numbers are those of the
weights: P trained, F frozen, n ranks, m moments a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from wsss_dist.config import RunConfig

# DeepSpeed's defaults, in weights
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
FP64, FP32, BF16 = 8, 4, 2


@dataclass(frozen=True)
class EngineState:
    """Bytes of one rank.

    weights    of the module, buffers included; under ZeRO-3 its own part and what is gathered at most.
    gradients  at the end of backward.
    share      of the gradients that backward makes, how much stays at once; the rest is in `gradients` or handed over.
    optimiser  fp32 master weights and moments.
    buckets    for collectives, from the first gradient to the update.
    update     made at most by the reduction of the gradients and the update, on top of weights, gradients and
               optimiser, once the activations are gone.
    """

    weights: int
    gradients: int
    share: float
    optimiser: int
    buckets: int
    update: int


def engine_state(method: nn.Module, cfg: RunConfig, ranks: int) -> EngineState:
    """The state of the engine of a config; `method` as it stands in it, in bf16 where DeepSpeed has cast it."""
    train, zero = cfg.train, cfg.deepspeed.get("zero_optimization", {})
    parameters = list(method.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    buffers = sum(b.numel() * b.element_size() for b in method.buffers())
    size = parameters[0].element_size()
    plain = train.engine == "plain"
    n = 1 if plain or train.zero_stage == 0 else ranks
    own = -(-trained // n)
    optimiser = moments(cfg) * FP32 * own
    if plain:  # one flat tensor of all gradients is reduced
        gradients = FP32 * trained
        return EngineState(weights + buffers, gradients, 1.0, optimiser, 0, 2 * gradients if ranks > 1 else 0)
    if train.zero_stage > 0 or size == BF16:
        optimiser += FP32 * own  # the master weights, a copy in fp32 too
    gradients = size * trained
    if train.zero_stage == 0:
        update = min(trained, REDUCE_BUCKET) * size if size == FP32 else FP32 * trained
        return EngineState(weights + buffers, gradients, 1.0, optimiser, 0, update)
    bucket = size * int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    largest = max(p.numel() for p in parameters if p.requires_grad)
    group = -(-max(sum(p.numel() for p in group["params"]) for group in method.param_groups()) // n)
    # the gradients of a group in one piece, of bf16 ones that piece in fp32 too; before that a norm in fp64
    update = max(group * (FP32 if size == FP32 else FP32 + BF16), FP64 * largest)
    if train.zero_stage == 1:
        return EngineState(weights + buffers, gradients, 1.0, optimiser, _double(zero, bucket), update)
    if train.zero_stage == 2:
        gradients = size * min(trained, own + largest)  # those whole that a partition has a part of
        return EngineState(weights + buffers, gradients, 0.0, optimiser, _double(zero, bucket), update)
    live = min(weights, size * int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
    return EngineState(weights // n + live + buffers, size * own, 0.0, optimiser, bucket, update)


def _double(zero: dict, bucket: int) -> int:
    return 2 * bucket if zero.get("overlap_comm") else bucket


def moments(cfg: RunConfig) -> int:
    """m: numbers that the optimiser keeps for each weight."""
    return (1 if cfg.optim.momentum else 0) if cfg.optim.name == "sgd" else 2
