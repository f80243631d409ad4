"""Step time as a sum of parts. A model: what goes in is assumed or measured elsewhere, docs/scaling.md says which.

    step = max(A (flops B / rate) + optimiser + collectives, A B / (workers images_per_worker))

A micro batches of B images a rank. Nothing overlaps with the computation: the plain engine and DeepSpeed up to stage 2
reduce after the last backward pass (overlap_comm is off by default). The loader runs beside all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wsss_dist.benchmark.flops import arithmetic
from wsss_dist.scaling.machine import Machine
from wsss_dist.scaling.traffic import ALL_GATHER, ALL_REDUCE, EXCHANGE, REDUCE_SCATTER, Call, sent, step_traffic

# bytes that AdamW reads and writes of an element: weight, gradient and both moments, without the gradient back
_ADAM_BYTES = 28


@dataclass(frozen=True)
class Work:
    """What a step has to do, whatever it runs on.

    flops         of an image, forward and backward.
    groups        elements of the parameters with a gradient, by group of the optimiser.
    gathered      bytes that the method itself gathers of each image of the global batch, each step.
    reduced       bytes that the method itself all-reduces, each step.
    global_batch, micro_batch  in images.
    convolutions  is the most of it convolutions?
    """

    flops: float
    groups: tuple[tuple[int, ...], ...]
    global_batch: int
    micro_batch: int
    gathered: int = 0
    reduced: int = 0
    scalars: int = 12
    engine: str = "deepspeed"
    zero_stage: int = 1
    precision: str = "fp32"
    convolutions: bool = False

    @property
    def arithmetic(self) -> str:
        """What it is computed in, as the benchmark says too."""
        return arithmetic(self.precision, self.convolutions)

    @property
    def trained(self) -> int:
        """Elements with a gradient."""
        return sum(sum(group) for group in self.groups)

    def micro_batches(self, ranks: int) -> int:
        """A, of one rank and step; 0 where the batch cannot be split over so many."""
        chunks, rest = divmod(self.global_batch, self.micro_batch)
        return 0 if rest or chunks % ranks else chunks // ranks

    def on(self, ranks: int) -> Work:
        """Weak scaling: one micro batch a rank."""
        return replace(self, global_batch=ranks * self.micro_batch)

    def split(self, ranks: int) -> Work:
        """Strong scaling: smaller micro batches, down to one image, where the ranks are more than there are now."""
        if self.global_batch // self.micro_batch < ranks <= self.global_batch and self.global_batch % ranks == 0:
            return replace(self, micro_batch=self.global_batch // ranks)
        return self


def call_seconds(call: Call, ranks: int, machine: Machine) -> float:
    """Time of one collective: the bytes of a ring, and the hops of a tree (all-reduce, broadcast) or of a ring."""
    if ranks == 1:
        return 0.0
    own = min(ranks, machine.gpus)
    nodes = math.ceil(ranks / machine.gpus)
    speed = machine.reached * (machine.intra if nodes == 1 else min(machine.intra, machine.inter))
    if call.kind in (ALL_GATHER, REDUCE_SCATTER):
        wait = (ranks - 1) * (machine.hop_intra if nodes == 1 else machine.hop_inter)
    else:
        hops = math.ceil(math.log2(own)) * machine.hop_intra + math.ceil(math.log2(nodes)) * machine.hop_inter
        wait = (2 if call.kind == ALL_REDUCE else 1) * hops
    return sent(call, ranks) / speed + wait


def calls_of(work: Work, ranks: int) -> list[Call]:
    """All collectives of a step of the trainer."""
    settings = {"engine": work.engine, "zero_stage": work.zero_stage, "precision": work.precision}
    calls = step_traffic(work.groups, ranks, **settings, scalars=work.scalars)
    if ranks > 1:
        calls.append(Call(ALL_REDUCE, EXCHANGE))
        if work.gathered:
            calls.append(Call(ALL_GATHER, work.gathered * work.global_batch))
        if work.reduced:
            calls.append(Call(ALL_REDUCE, work.reduced))
    return calls


def step_parts(work: Work, machine: Machine, ranks: int) -> dict[str, float]:
    """Seconds of a step by part, "step" among them; "loader" is the wait for it.

    Raises:
        ValueError: the global batch cannot be split over so many ranks.
    """
    micro = work.micro_batches(ranks)
    if not micro:
        raise ValueError(f"a global batch of {work.global_batch} in {work.micro_batch}s cannot be split over {ranks}")
    images = micro * work.micro_batch
    shards = ranks if work.engine == "deepspeed" and work.zero_stage else 1
    parts = {
        "compute": images * work.flops / machine.flops_per_s(work.arithmetic, work.convolutions),
        "optimiser": _ADAM_BYTES * work.trained / shards / machine.memory,
        "collectives": sum(call_seconds(call, ranks, machine) for call in calls_of(work, ranks)),
    }
    busy = sum(parts.values())
    # without workers the samples are made between the steps
    load = images / machine.images_per_worker / max(1, machine.workers)
    parts["loader"] = max(0.0, load - busy) if machine.workers else load
    return {**parts, "step": busy + parts["loader"]}


def table(work: Work, machine: Machine, numbers: Sequence[int], weak: bool) -> list[dict[str, float | int | None]]:
    """A row for each number of ranks; without times where the batch cannot be split."""
    rows = []
    for ranks in numbers:
        now = work.on(ranks) if weak else work.split(ranks)
        row = {"ranks": ranks, "global batch": now.global_batch, "micro batch": now.micro_batch}
        if now.micro_batches(ranks):
            parts = step_parts(now, machine, ranks)
            row |= {**parts, "images/s": now.global_batch / parts["step"]}
            base = step_parts(work.on(1), machine, 1)["step"] / work.micro_batch
            row["efficiency"] = base * row["images/s"] / ranks
        rows.append(row)
    return rows
