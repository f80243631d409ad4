"""Time the operators: `python -m kernels.bench [op ...] [--device cuda]`.

Each `kernels/<op>/bench.py` names the function, its CASES (name -> arguments, at shapes the trainer uses) and the
largest difference from the reference that is allowed. Every backend is checked against the reference first; a wrong one
is not timed, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import kernels


def benchmarked_ops() -> list[str]:
    """Names of the operators that have a bench.py."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/bench.py"))


def time_ms(functions: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call; the functions take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def bench_op(op: str, module: ModuleType, device: torch.device, repeats: int) -> bool:
    """Check, time and print every case of one operator; False where a backend differs from the reference."""
    right = True
    for case, arguments in module.CASES.items():
        torch.manual_seed(0)
        values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments().items()}
        expected = module.FUNCTION(**values, backend="reference")
        functions: dict[str, Callable[[], Tensor]] = {}
        for backend in kernels.available_backends(op, device):
            function = lambda backend=backend: module.FUNCTION(**values, backend=backend)  # noqa: E731, B023
            difference = (function() - expected).abs().max().item()
            if not difference <= module.TOLERANCE:  # a NaN is wrong too
                print(f"{op:<22} {case:<22} {backend:<10} WRONG: differs from the reference by {difference:.3g}")
                right = False
                continue
            functions[backend] = function
        times = time_ms(functions, device, repeats)
        base = statistics.median(times["reference"])
        for backend, ms in times.items():
            median = statistics.median(ms)
            print(f"{op:<22} {case:<22} {backend:<10} {min(ms):>10.2f} {median:>10.2f} {base / median:>8.1f}x")
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the operators.", allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"one of {', '.join(benchmarked_ops())}; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.ops) - set(benchmarked_ops()))
    if unknown:
        parser.error(f"no benchmark for {', '.join(unknown)}; there are: {', '.join(benchmarked_ops())}")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.repeats} repeats")
    print(f"{'op':<22} {'case':<22} {'backend':<10} {'min ms':>10} {'median ms':>10} {'faster':>9}")
    modules = {op: importlib.import_module(f"kernels.{op}.bench") for op in args.ops or benchmarked_ops()}
    right = [bench_op(op, module, device, args.repeats) for op, module in modules.items()]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
