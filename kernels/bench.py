"""`python -m kernels.bench [op ...] [--device cpu|cuda] [--json FILE]`: check against the reference, then time.

Each backend that can run is first compared with the fp64 reference; one that is off is reported and not timed, and the
exit status is 1. Backends are timed in turn (A B B A ...), so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from kernels.backend import available_backends

ROUNDS = 5
OPS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/bench.py"))


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def seconds(function, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bench_case(op: str, case: str, device: torch.device) -> dict:
    """Errors and median times in milliseconds of every backend; `red` names those that are wrong."""
    cases = importlib.import_module(f"kernels.{op}.bench")
    backends = available_backends(op, device)
    errors = {b: cases.check(case, device, b) for b in backends}
    red = [b for b in backends if not errors[b] <= cases.TOLERANCE]
    runs = {b: cases.run(case, device, b) for b in backends if b not in red}
    times = {b: [] for b in runs}
    for turn in range(ROUNDS):
        for b in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            times[b].append(seconds(runs[b], device))
    medians = {b: 1e3 * statistics.median(t) for b, t in times.items()}
    return {"op": op, "case": case, "errors": errors, "red": red, "median_ms": medians}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help=f"any of: {', '.join(OPS)}; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    device = torch.device(options.device)
    result = {"machine": machine(device), "rows": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    for op in options.op or OPS:
        for case in importlib.import_module(f"kernels.{op}.bench").SHAPES:
            row = bench_case(op, case, device)
            result["rows"].append(row)
            base = row["median_ms"].get("reference")
            for backend, error in row["errors"].items():
                if backend in row["red"]:
                    print(f"{op} {case} {backend}: WRONG by {error:.1e}, not timed")
                else:
                    ms = row["median_ms"][backend]
                    ratio = f", {base / ms:.1f}x the reference" if base else ""
                    print(f"{op} {case} {backend}: {ms:.2f} ms{ratio}, error {error:.1e}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["red"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
