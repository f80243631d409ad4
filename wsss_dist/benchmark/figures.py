"""What a contest has measured, as plain numbers that JSON can hold."""

from __future__ import annotations

import resource
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernels.measure import machine
from wsss_dist import dist
from wsss_dist.benchmark import flops

if TYPE_CHECKING:
    from wsss_dist.benchmark.contest import Contest, Contestant

OURS, PEER = "ours", "peer"


def figures(contest: Contest, agreement: dict[str, float] | None) -> dict[str, Any]:
    """The figures of a contest that has run; a collective call.

    agreement: how far the peer was off; None without one.
    """
    cfg, train = contest.cfg, contest.cfg.train
    peak = flops.peak(contest.device, train.precision, contest.convolutions)
    rows = {name: _row(player, train.global_batch, contest.num_micro) for name, player in contest.contestants.items()}
    for row in rows.values():  # of the work that the step needs, which our implementation of it shows
        row["mfu"] = rows[OURS]["flops_per_step"] / row["step_median_s"] / peak["flops_per_s"]
    out = {
        "config": cfg.run.name,
        "method": cfg.method_name,
        "device": contest.device.type,
        "machine": machine(contest.device),
        "clock": contest.options.clock,
        "shape": {
            "crop": cfg.data.crop,
            "classes": contest.classes,
            "micro_batch": train.micro_batch,
            "micro_batches": contest.num_micro,
            "ranks": dist.world_size(),
            "precision": train.precision,
            "engine": train.engine,
            "zero_stage": train.zero_stage,
            "as_written": not (train.compile or train.channels_last),
        },
        "data": "own" if contest.options.data else "synthetic",
        "step": contest.index,
        "steps_of_run": train.steps,
        "peak": peak,
        "rows": rows,
    }
    if agreement is None:  # with two contestants it would be that of the larger
        out["peak_mib"] = _peak(contest.device, contest.start) / 2**20
    else:
        ours, peer = rows[OURS], rows[PEER]
        out["peer_off_by"] = agreement
        out["ratio"] = {
            "median": peer["step_median_s"] / ours["step_median_s"],
            "min": peer["step_min_s"] / ours["step_min_s"],
            "memory": peer["memory_mib"] / ours["memory_mib"] if ours["memory_mib"] else None,
        }
    return out


def _row(player: Contestant, images: int, num_micro: int) -> dict[str, Any]:
    """Figures of one contestant. A step takes as long as on its slowest rank; all else is rank 0's.

    Phases are those of the watched step in the middle.
    """
    steps = [max(times) for times in zip(*dist.all_gather_object(player.plain), strict=True)]
    order = sorted(range(len(player.watched)), key=player.watched.__getitem__)
    middle = order[(len(order) - 1) // 2]
    parts = {name: s for name, s in player.phases[middle].items() if s > 0}
    work = {name: num_micro * n for name, n in player.flops.items() if n > 0}
    median = statistics.median(steps)
    return {
        "images_per_s": images / median,
        "step_median_s": median,
        "step_min_s": min(steps),
        "runs": len(steps),
        "flops_per_step": sum(work.values()),
        "flops": work,
        "phases_s": parts,
        "phases_over_step": sum(parts.values()) / player.watched[middle],
        "watched_over_plain": statistics.median(player.watched) / statistics.median(player.plain),
        "memory_mib": None if player.memory is None else player.memory / 2**20,
    }


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(device: torch.device, start: int) -> int:
    """Most bytes that were held: by torch's allocator on a GPU, else by the process, above what it held at `start`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
