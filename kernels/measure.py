"""Clocks, ceilings and memory for the benchmarks."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

# H200, what a copy and what fp32 units reach of the data sheet's 4.8 TB/s and 67 TFLOP/s.
GPU_BYTES_PER_S, GPU_FLOPS_PER_S = 4.3e12, 60e12
REPEATS = 5


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "clock": clock(device)}


def clock(device: torch.device) -> str:
    """What the medians and the floors count: CPU time for one thread, which other jobs on the machine do not stretch,
    else wall time."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def seconds(function: Callable, device: torch.device) -> dict[str, float]:
    """One run: {"wall": s, "cpu": s of all threads of the process}; on a GPU up to its end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes (read and written) and fp32 operations per second: on a CPU the best of a few copies and matrix products on
    the threads at hand, on a GPU the constants above."""
    if device.type == "cuda":
        return {"bytes_per_s": GPU_BYTES_PER_S, "flops_per_s": GPU_FLOPS_PER_S}
    source, square = torch.rand(1 << 24), torch.rand(1024, 1024)
    target, product = torch.empty_like(source), torch.empty_like(square)

    def best(function: Callable) -> float:
        return min(seconds(function, device)[clock(device)] for _ in range(REPEATS))

    moved, done = 2 * 4 * source.numel(), 2 * 1024**3
    return {
        "bytes_per_s": moved / best(lambda: target.copy_(source)),
        "flops_per_s": done / best(lambda: torch.mm(square, square, out=product)),
    }


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status, e.g. VmRSS."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def peak_bytes(function: Callable, device: torch.device) -> int | None:
    """Memory that one run takes at its peak, the result included; None where it cannot be told.

    On a GPU the peak of torch's allocator. On a CPU the growth of the resident memory of the process, after free memory
    has been handed back and the high-water mark reset: it sees what C++ allocates by itself, a profiler would not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)
