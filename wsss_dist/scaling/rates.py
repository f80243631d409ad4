"""What the model asks of a machine and can be measured on the ranks at hand: all-reduce, store, checksum, disk.

`torchrun --nproc-per-node 8 -m wsss_dist.scaling rates --folder runs`, or with srun or deepspeed on several nodes.
"""

from __future__ import annotations

import hashlib
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsss_dist import dist

SIZES = (4, 2**10, 2**14, 2**18, 2**21, 2**23, 2**25)
_FILE = 2**28


def all_reduce_seconds(sizes: tuple[int, ...] = SIZES, repeats: int = 7) -> dict[int, float]:
    """Bytes -> median seconds of an all-reduce of fp32 of that size; of the slowest rank. Collective."""
    out = {}
    for size in sizes:
        tensor = torch.ones(size // 4, device=dist.device())
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce_sum(tensor)[0].item()
            times.append(time.perf_counter() - begin)
        out[size] = max(dist.all_gather_object(statistics.median(times[1:])))
    return out


def fitted(seconds: dict[int, float], ranks: int) -> tuple[float, float]:
    """(bytes/s that each rank sends in a ring, seconds of a hop) that fit a + b size best, relative to each time."""
    size, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / took, size / took], 1), np.ones(len(size)), rcond=None)
    share = 2 * (ranks - 1) / ranks
    return share / b, max(a, 0.0) / (2 * max(1, (ranks - 1).bit_length()))


def store_adds(seconds: float = 2.0) -> float:
    """Counts a second that the store of the first rank gives out to all ranks together. Collective."""
    if dist.world_size() == 1:
        return float("nan")
    dist.barrier()
    end, own = time.perf_counter() + seconds, 0
    with dist.shared(10**9, block=1) as mine:
        for _ in mine:
            own += 1
            if time.perf_counter() > end:
                break
    return sum(dist.all_gather_object(own)) / seconds


def file_rates(folder: Path) -> dict[str, float]:
    """Bytes a second: SHA-256 on one core, and what a file of a checkpoint is written and forced to disk at."""
    block = os.urandom(2**22)
    digest, begin = hashlib.sha256(), time.perf_counter()
    for _ in range(64):
        digest.update(block)
    sha = 64 * len(block) / (time.perf_counter() - begin)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(_FILE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        disk = _FILE / (time.perf_counter() - begin)
    return {"sha": sha, "disk": disk}


def measured(folder: Path) -> dict[str, Any]:
    """All of it; a collective call."""
    ranks, nodes = dist.world_size(), len(set(dist.all_gather_object(socket.gethostname())))
    out: dict[str, Any] = {"ranks": ranks, "nodes": nodes, **dist.on_main(lambda: file_rates(folder))}
    if ranks > 1:
        times = all_reduce_seconds()
        out["bandwidth"], out["hop"] = fitted(times, ranks)
        out["store_adds_per_s"] = store_adds()
        out["all_reduce_s"] = {str(size): value for size, value in times.items()}
    return out


def machine_keys(found: dict[str, Any]) -> dict[str, Any]:
    """What of it a machine file holds: the bandwidth inside a node, or of ranks on several that between them.

    `reached` is 1: measured is what is had. Between nodes `hop_inter` is the mean hop, those inside a node among them.
    """
    keys = {key: found[key] for key in ("sha", "disk")}
    if "bandwidth" in found:
        where = "intra" if found["nodes"] == 1 else "inter"
        keys |= {where: found["bandwidth"], f"hop_{where}": found["hop"], "reached": 1}
    return keys
