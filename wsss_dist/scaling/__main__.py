"""The commands of the package; `python -m wsss_dist.scaling --help`."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from wsss_dist.command import Parser, run_command
from wsss_dist.config import RunConfig, parse_config, read_config
from wsss_dist.errors import UserError
from wsss_dist.scaling import __doc__ as about
from wsss_dist.scaling.machine import MACHINES, Machine, load_machine

RANKS = (1, 8, 64, 512)
_PARTS = ("compute", "optimiser", "collectives", "loader", "step")


class _Parser(Parser):
    """One of a module, which is not started as a script of launch/."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; `{self.prog} --help` lists what is expected")


def main() -> int:
    parser = _Parser(
        prog="python -m wsss_dist.scaling", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    make = {name: commands.add_parser(name, help=text) for name, text in _COMMANDS.items()}
    for name in ("table", "hours", "count", "flops"):
        make[name].add_argument("--config", required=True, help="a YAML file, looked up as given and in configs/")
        make[name].add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        make[name].add_argument("--stage", metavar="NAME", help="a training stage, of a config with `stages:`")
    for name in ("table", "hours", "loaders"):
        make[name].add_argument("--machine", default="A100", help=f"{', '.join(MACHINES)} (default A100)")
        make[name].add_argument("--machine-file", type=Path, metavar="FILE.json", help="keys of machine.py")
        make[name].add_argument("--mfu", type=float, help="share of the peak; default: by kind of network")
        make[name].add_argument("--workers", type=int, help="loader workers of a rank")
        make[name].add_argument("--images-per-worker", type=float, help="samples a second of a worker")
    make["table"].add_argument("--ranks", type=int, nargs="+", default=RANKS)
    make["hours"].add_argument("--ranks", type=int, default=1)
    make["hours"].add_argument("--until", metavar="NAME", help="as of launch/train.py")
    make["count"].add_argument("--ranks", type=int, default=1000)
    make["flops"].add_argument("--points", type=int, default=10, help="moments of the schedule that are averaged")
    make["flops"].add_argument("--json", type=Path, help="file to write to; default docs/scaling.json")
    make["loaders"].add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 1000])
    make["loaders"].add_argument("--compute-ms", type=float, required=True, help="a step without the loader")
    make["loaders"].add_argument("--spread", type=float, default=0.02, help="of that, relative standard deviation")
    make["loaders"].add_argument("--micro-batch", type=int, default=2)
    make["loaders"].add_argument("--steps", type=int, default=300)
    make["order"].add_argument("--images", type=float, nargs="+", default=[1e6, 1e7])
    make["samples"].add_argument("--images", type=Path, default=Path("data/stampscenes/images"), help="pictures")
    make["samples"].add_argument("--count", type=int, default=200)
    make["samples"].add_argument("--rounds", type=int, default=5)
    make["samples"].add_argument("--json", type=Path, help="file to write to; default docs/scaling.json")
    make["rates"].add_argument("--folder", type=Path, default=Path("."), help="where checkpoints would lie")
    make["rates"].add_argument("--json", type=Path, help="a machine file; its other keys stay")
    for command in make.values():
        command.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args = parser.parse_args()
    return globals()[f"_{args.command}"](args)


_COMMANDS = {
    "table": "step time by part",
    "hours": "a config's whole schedule",
    "count": "collectives of one step, for one rank of many",
    "loaders": "simulated step times with measured loaders",
    "order": "time and memory of the order of the images",
    "flops": "count the operations of a training",
    "samples": "time single training samples",
    "rates": "measure the machine",
}


def _config(args: argparse.Namespace) -> tuple[str, RunConfig]:
    """Name in docs/scaling.json and config of a training."""
    from wsss_dist.pipeline import Pipeline
    from wsss_dist.scaling.schedule import key_of

    values = read_config(args.config, args.set)
    if "stages" not in values:
        return key_of(args.config, args.set), parse_config(values)
    entries = {n: e for n, e in Pipeline(values).entries.items() if e.kind == "train"}
    if args.stage not in entries:
        raise UserError(f"command line: --stage {args.stage}; expected one of {', '.join(entries)}")
    return f"{Path(args.config).stem}/{args.stage}", entries[args.stage].config


def _machine(args: argparse.Namespace) -> Machine:
    given = {k: getattr(args, k) for k in ("mfu", "workers", "images_per_worker")}
    return load_machine(args.machine, args.machine_file, **given)


def _table(args: argparse.Namespace) -> int:
    from wsss_dist.scaling.model import table
    from wsss_dist.scaling.schedule import work_of

    name, cfg = _config(args)
    machine = _machine(args)
    print(f"{name} on {machine.name}, {machine.assumed}: a model, nothing here is measured; ms a step")
    for zero in range(4):
        for precision in ("fp32", "bf16"):
            for weak in (False, True):
                work = work_of(name, cfg, zero_stage=zero, precision=precision)
                kind = "weak" if weak else "strong"
                print(f"\nZeRO {zero}, {precision}, {kind} scaling")
                print(_lines(table(work, machine, args.ranks, weak)))
    return 0


def _lines(rows: list[dict[str, Any]]) -> str:
    head = ["GPUs", "batch", "micro", *_PARTS, "images/s", "efficiency"]
    out = [" ".join(f"{word:>11}" for word in head)]
    for row in rows:
        cells = [row["ranks"], row["global batch"], row["micro batch"]]
        if "step" in row:
            cells += [f"{1e3 * row[part]:.1f}" for part in _PARTS]
            cells += [f"{row['images/s']:.0f}", f"{100 * row['efficiency']:.1f} %"]
        else:
            cells.append("the batch cannot be split over so many")
        out.append(" ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(out)


def _hours(args: argparse.Namespace) -> int:
    from wsss_dist.scaling.schedule import schedule

    machine = _machine(args)
    parts = schedule(args.config, args.set, machine, args.ranks, until=args.until)
    print(f"{args.config} on {args.ranks} x {machine.name}, {machine.assumed}: a model, nothing here is measured")
    for part in parts:
        print(f"{part.name:32} {part.kind:16} {part.count:>8} {part.seconds / 3600:8.2f} h")
    crf = sum(p.seconds for p in parts if p.kind == "CRF") / 3600
    print(f"CRF, on one core a rank: {crf:.2f} h; {args.ranks * crf:.1f} core-hours")
    print(f"in all {sum(p.seconds for p in parts) / 3600:.2f} h")
    return 0


def _count(args: argparse.Namespace) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from wsss_dist.scaling import counted
    from wsss_dist.scaling.traffic import sent, totals

    name, cfg = _config(args)
    calls = counted.count_step(counted.engine_of_one(cfg, args.ranks))
    print(f"{name}, {cfg.train.engine}, ZeRO {cfg.train.zero_stage}, {cfg.train.precision}, rank 0 of {args.ranks}")
    for kind, (number, size) in totals(calls).items():
        own = sum(sent(call, args.ranks) for call in calls if call.kind == kind)
        print(f"{kind:16} {number:5} calls {size:>14} bytes, {own / 1e6:10.2f} MB sent by each rank in a ring")
    return 0


def _loaders(args: argparse.Namespace) -> int:
    from wsss_dist.scaling.loaders import around, of_quantiles, simulate, workers_needed
    from wsss_dist.scaling.schedule import read_measured

    sample = of_quantiles(read_measured()["sample_s"]["quantiles"])
    compute = around(args.compute_ms / 1e3, args.spread)
    print("simulated; times of samples drawn from docs/scaling.json")
    for ranks in args.ranks:
        settings = {"ranks": ranks, "micro_batch": args.micro_batch, "steps": args.steps}
        need = workers_needed(sample, compute, **settings)
        for workers in (0, *([need - 1] if need and need > 1 else []), *([need] if need else [])):
            steps = simulate(sample, compute, workers=workers, **settings)
            at = np.quantile(steps.seconds, (0.5, 0.99, 1)) * 1e3
            print(
                f"{ranks:5} ranks, {workers:2} workers: step {1e3 * steps.seconds.mean():7.1f} ms (median {at[0]:.1f}, "
                f"99 % {at[1]:.1f}, longest {at[2]:.1f}), stalled {100 * steps.stall:.2f} %"
            )
    return 0


def _order(args: argparse.Namespace) -> int:
    from wsss_dist.data import order

    for n in map(int, args.images):
        for kind, made in (("array", None), ("keyed", order.KeyedOrder)):
            before, begin = _peak(), time.process_time()
            if made is None:
                permutation = np.random.default_rng(np.random.SeedSequence((0, 0, 0))).permutation(n)
            else:
                permutation = made(n, 0, 0)
            first = time.process_time() - begin
            begin = time.process_time()
            for k in range(1000):
                permutation[k * 2 : k * 2 + 2].tolist()
            each = (time.process_time() - begin) / 1000
            print(
                f"{n:>12} images, {kind}: {first:8.3f} s an epoch, {1e6 * each:6.1f} us a micro batch of 2, "
                f"memory of the process grows by {_peak() - before:8.1f} MB"
            )
            del permutation
    return 0


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _flops(args: argparse.Namespace) -> int:
    from wsss_dist.scaling.schedule import MEASURED, count_training

    name, cfg = _config(args)
    path = args.json or MEASURED
    known = json.loads(path.read_text())["trainings"].get(name, {}) if path.exists() else {}
    by_hand = {key: known[key] for key in ("view", "gathered", "reduced", "predict") if key in known}
    _note(path, "trainings", {name: {**count_training(cfg, args.points), **by_hand}})
    return 0


def _samples(args: argparse.Namespace) -> int:
    from wsss_dist.scaling.loaders import measured_samples
    from wsss_dist.scaling.schedule import MEASURED

    torch.set_num_threads(1)
    seconds = measured_samples(args.images, args.count, args.rounds, crop=448)
    found = {
        "crop": 448,
        "count": seconds.size,
        "mean": round(float(seconds.mean()), 6),
        "quantiles": [round(float(q), 6) for q in np.quantile(seconds, np.linspace(0, 1, 101))],
    }
    print({k: v for k, v in found.items() if k != "quantiles"})
    _note(args.json or MEASURED, "sample_s", found)
    return 0


def _rates(args: argparse.Namespace) -> int:
    from wsss_dist import dist
    from wsss_dist.scaling.rates import machine_keys, measured

    dist.init()
    found = measured(args.folder)
    if dist.is_main():
        print(json.dumps(found, indent=1))
        if args.json:
            old = json.loads(args.json.read_text()) if args.json.exists() else {}
            args.json.write_text(json.dumps({**old, **machine_keys(found)}, indent=1) + "\n")
    return 0


def _note(path: Path, section: str, found: dict[str, Any]) -> None:
    """Write into one section of a JSON file; the others stay."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = {**content.get(section, {}), **found}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
