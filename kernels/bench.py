"""`python -m kernels.bench [op ...] [--device cpu|cuda] [--skip PEER] [--json FILE] [--plot FILE.png]`

Each backend that can run is first compared with the fp64 reference, each peer with what its op expects; one that is off
is reported and not timed, and the exit status is 1. The others are timed in turn, A B B A with a new order each round,
so that a change of the load of the machine meets all of them. Whoever takes longer than BUDGET_S gets fewer turns.

kernels/<op>/bench.py holds
  SHAPES, TOLERANCE
  check(case, device, backend) -> float    the error of a backend, to be <= TOLERANCE
  run(case, device, backend) -> function   runs the backend once
  peers(case, device) -> {name: function}  optional: what others do. A function with an attribute `scale` runs a part of
                                           the work: its times are multiplied by that.
  peer_error(case, device, name, result)   optional: the error of a peer's result, to be <= PEER_TOLERANCE; None: it
                                           cannot be compared
  cost(case) -> (bytes, flops)             optional: what no implementation can avoid; gives the floor
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.backend import available_backends
from kernels.measure import ceilings, clock, machine, peak_bytes, seconds

ROUNDS = 5
BUDGET_S = 3.0  # per contestant and case; at least one round, or one run of what alone takes longer than ten budgets
OPS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/bench.py"))


def contestants(cases, op: str, case: str, device: torch.device, skip: list[str]) -> tuple[dict[str, Callable], dict]:
    """The functions that are right, and the errors of all: None where there is nothing to compare."""
    errors: dict[str, float | None] = {}
    functions: dict[str, Callable] = {}
    red = []
    for backend in available_backends(op, device):
        errors[backend] = cases.check(case, device, backend)
        if errors[backend] <= cases.TOLERANCE:
            functions[backend] = cases.run(case, device, backend)
        else:
            red.append(backend)
    for name, function in (cases.peers(case, device) if hasattr(cases, "peers") else {}).items():
        if any(name.startswith(s) for s in skip):
            continue
        error = cases.peer_error(case, device, name, function()) if hasattr(cases, "peer_error") else None
        errors[name] = error
        if error is None or error <= cases.PEER_TOLERANCE:
            functions[name] = function
        else:
            red.append(name)
    return functions, {"errors": errors, "red": red}


def take_turns(functions: dict[str, Callable], device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Times of each function, {"wall": s, "cpu": s} a run."""
    order = random.Random(0)  # noqa: S311 - the order of the turns is no secret
    times: dict[str, list] = {name: [] for name in functions}
    first = {name: seconds(function, device) for name, function in functions.items()}
    turns = {}
    for name, t in first.items():
        took = max(t[clock(device)], 1e-9)
        turns[name] = max(1, min(ROUNDS, int(BUDGET_S / 2 / took)))
        if took > 10 * BUDGET_S:
            times[name], turns[name] = [t], 0
    for turn in range(ROUNDS):
        names = [name for name in functions if turn < turns[name]]
        order.shuffle(names)
        for name in [*names, *reversed(names)]:
            times[name].append(seconds(functions[name], device))
    return times


def bench_case(op: str, case: str, device: torch.device, limits: dict[str, float], skip: list[str]) -> dict:
    """Errors, times in milliseconds, peak memory in MiB and the floor of one case; `red` names those that are wrong."""
    cases = importlib.import_module(f"kernels.{op}.bench")
    functions, row = contestants(cases, op, case, device, skip)
    row = {"op": op, "case": case, **row}
    scale = {name: getattr(function, "scale", 1) for name, function in functions.items()}
    times = take_turns(functions, device)
    for kind in ("wall", "cpu"):
        in_ms = {name: [1e3 * scale[name] * t[kind] for t in runs] for name, runs in times.items()}
        row[f"{kind}_min_ms"] = {name: min(runs) for name, runs in in_ms.items()}
        row[f"{kind}_median_ms"] = {name: statistics.median(runs) for name, runs in in_ms.items()}
    row["runs"] = {name: len(runs) for name, runs in times.items()}
    row["median_ms"] = row[f"{clock(device)}_median_ms"]
    peaks = {name: peak_bytes(function, device) for name, function in functions.items()}
    row["peak_mib"] = {name: None if peak is None else peak / 2**20 for name, peak in peaks.items()}
    if hasattr(cases, "cost"):
        moved, flops = cases.cost(case)
        row["bytes"], row["flops"] = moved, flops
        row["floor_ms"] = 1e3 * max(moved / limits["bytes_per_s"], flops / limits["flops_per_s"])
    return row


def lines(row: dict):
    """The row as text, a line per contestant. Ratios are to the fastest backend."""
    ours = min((ms for name, ms in row["median_ms"].items() if name in ("native", "triton")), default=None)
    for name, error in row["errors"].items():
        head = f"{row['op']} {row['case']} {name}:"
        if name in row["red"]:
            yield f"{head} WRONG by {error:.1e}, not timed"
            continue
        ms = row["median_ms"][name]
        text = f"{head} median {ms:.3g} ms, wall {row['wall_min_ms'][name]:.3g} to {row['wall_median_ms'][name]:.3g}"
        text += f" ({row['runs'][name]} runs)"
        if ours is not None and name not in ("native", "triton"):
            text += f", {ms / ours:.1f} x ours"
        if "floor_ms" in row:
            text += f", {100 * row['floor_ms'] / ms:.1f} % of the floor's speed"
        if row["peak_mib"][name] is not None:
            text += f", {row['peak_mib'][name]:.1f} MiB"
        yield text + (", not compared" if error is None else f", error {error:.1e}")


def plot(rows: list[dict], path: Path) -> None:
    """Median time against the unavoidable bytes of the case, a panel per op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = sorted({row["op"] for row in rows if "bytes" in row})
    figure, panels = pyplot.subplots(1, max(1, len(ops)), figsize=(5 * max(1, len(ops)), 4.5), squeeze=False)
    for op, panel in zip(ops, panels[0], strict=False):
        mine = sorted((row for row in rows if row["op"] == op and "bytes" in row), key=lambda row: row["bytes"])
        for name in dict.fromkeys(name for row in mine for name in row["median_ms"]):
            points = [(row["bytes"] / 2**20, row["median_ms"][name]) for row in mine if name in row["median_ms"]]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        floor = [(row["bytes"] / 2**20, row["floor_ms"]) for row in mine]
        panel.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
        panel.set(title=op, xscale="log", yscale="log", xlabel="input and output, MiB", ylabel="median, ms")
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Check the operators, then time them.")
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help=f"any of: {', '.join(OPS)}; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--skip", action="append", default=[], metavar="PEER", help="leave out peers called like this")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw time against problem size into this PNG file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    device = torch.device(options.device)
    limits = ceilings(device)
    result = {"machine": machine(device), "ceilings": limits, "rows": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(f"floor: {limits['bytes_per_s'] / 1e9:.1f} GB/s, {limits['flops_per_s'] / 1e9:.1f} GFLOP/s")
    for op in options.op or OPS:
        for case in importlib.import_module(f"kernels.{op}.bench").SHAPES:
            result["rows"].append(bench_case(op, case, device, limits, options.skip))
            print(*lines(result["rows"][-1]), sep="\n", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(result["rows"], options.plot)
    return int(any(row["red"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
