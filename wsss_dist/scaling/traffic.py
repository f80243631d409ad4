"""Which collectives a step makes and how many bytes they carry, as formulas; `counted.py` counts them instead.

T elements with a gradient, n ranks, e bytes an element: 4 in fp32, 2 in bf16 (the engines reduce in the precision that
they train in). The payload of a collective is the whole tensor: what is reduced, or what an all-gather gives.

    plain     all-reduce e T, with e = 4
    ZeRO 0    all-reduce e T
    ZeRO 1, 2 all-reduce e T, then all-gather of the new weights, e T padded: DeepSpeed reduces each bucket on every
              rank and keeps its part (counted with 0.19.8 at its defaults, on a CPU)
    ZeRO 3    all-gather e P before the forward pass (P: all elements, frozen ones too), reduce-scatter e T; as long as
              P is below stage3_max_live_parameters (1e9), else once more for the backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST = "all_reduce", "all_gather", "reduce_scatter", "broadcast"
BYTES = {"fp32": 4, "bf16": 2}
# Trainer._exchange: a signal, number of damaged images
EXCHANGE = 2 * 8
# DeepSpeed's stage3_param_persistence_threshold: smaller parameters are on every rank
PERSISTENT = 100_000


@dataclass(frozen=True)
class Call:
    """One collective: its kind, and the bytes of the whole tensor."""

    kind: str
    bytes: int


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def step_traffic(
    groups: Sequence[Sequence[int]],
    ranks: int,
    *,
    engine: str = "deepspeed",
    zero_stage: int = 0,
    precision: str = "fp32",
    scalars: int = 1,
    clip: bool = False,
    frozen: Sequence[int] = (),
    persistent: int = PERSISTENT,
) -> list[Call]:
    """The collectives of one optimiser step of an engine, those of the method apart.

    Args:
        groups: elements of each parameter that has a gradient, by group of the optimiser.
        ranks: n; with 1 there are none.
        scalars: how many the method logs, "loss" among them.
        clip: are gradients clipped?
        frozen: elements of the parameters without gradient (ZeRO 3 gathers them too).
        persistent: under ZeRO 3 smaller parameters are gathered apart, after the update.
    """
    if ranks == 1:
        return []
    size = 4 if engine == "plain" else BYTES[precision]
    sizes = [numel for group in groups for numel in group]
    metrics, gradients = Call(ALL_REDUCE, 8 * (scalars + 1)), Call(ALL_REDUCE, size * sum(sizes))
    if engine == "plain":
        return [metrics, gradients]
    if zero_stage == 0:
        return [metrics, gradients, *([Call(ALL_REDUCE, 4)] if clip and precision == "fp32" else [])]
    if zero_stage < 3:
        overflow = [Call(ALL_REDUCE, 1)] if precision == "bf16" else []
        norms = [Call(ALL_REDUCE, 4) for _ in groups]
        weights = [Call(ALL_GATHER, size * padded(sum(group), 2 * ranks)) for group in groups]
        return [metrics, gradients, *overflow, *norms, *weights]
    parts = [[p for p in (*sizes, *frozen) if (p < persistent) == small] for small in (False, True)]
    gathered = [Call(ALL_GATHER, size * sum(padded(p, ranks) for p in part)) for part in parts if part]
    scattered = Call(REDUCE_SCATTER, size * sum(padded(p, ranks) for p in sizes))
    return [*gathered, metrics, scattered, *(Call(ALL_REDUCE, 8) for _ in groups)]


def totals(calls: Sequence[Call]) -> dict[str, tuple[int, int]]:
    """Kind -> (number of calls, bytes)."""
    kinds = dict.fromkeys(call.kind for call in calls)
    return {k: (sum(c.kind == k for c in calls), sum(c.bytes for c in calls if c.kind == k)) for k in kinds}


def sent(call: Call, ranks: int) -> float:
    """Bytes that each rank sends in a ring."""
    share = (ranks - 1) / ranks
    return call.bytes * {ALL_REDUCE: 2 * share, ALL_GATHER: share, REDUCE_SCATTER: share, BROADCAST: 1.0}[call.kind]
