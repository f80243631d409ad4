"""Time the training of a config: `python launch/benchmark.py --config coco_vit.yaml [--peer] [--plot FILE.png]`.

Images per second, share of the device's peak (MFU), time by phase and memory, on synthetic batches of the config's
shapes with random weights; --data reads the config's own data. deepspeed and torchrun start it on several ranks. Of a
config with `stages:`, --stage NAME says which. `wsss_dist/benchmark/phases.py` says what is counted as what.

--peer times the method's peer too, the same step written as research code has it, turn by turn on the same weights.

--memory predicts the memory of a step on a GPU instead, without one: --gib of what size, --ranks how many of them.

Exit status: 0 done, 2 a mistake in the input, 1 anything else.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig

try:
    from wsss_dist.command import Parser, run_command
    from wsss_dist.errors import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")

DEVICES = ("cpu", "cuda")


def main() -> int:
    return run_command(_benchmark)


def _benchmark() -> int:
    parser = Parser(description="Time the training of a config.")
    parser.add_argument("--config", required=True, help="a YAML file, looked up as given and in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.global_batch=2")
    parser.add_argument("--stage", metavar="NAME", help="the stage to time, of a config with `stages:`")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, as many again with phases (default 5)")
    parser.add_argument("--warmup", type=int, help="steps before (default 2; with --data what is loaded ahead)")
    parser.add_argument("--at", type=float, default=0.9, help="fraction of the run that they stand at (default 0.9)")
    parser.add_argument("--peer", action="store_true", help="time the same step as research code has it too")
    parser.add_argument("--data", action="store_true", help="the config's own data and loader")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--clock", default="wall", help="wall, or cpu: CPU time, on a CPU that other jobs use too")
    parser.add_argument("--memory", action="store_true", help="predict the memory of a step on a GPU; times nothing")
    parser.add_argument("--gib", type=float, metavar="N", help="with --memory: GiB of that GPU (default 80)")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --memory: GPUs that train together (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the phases into this file")
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args = parser.parse_args()
    _check(args)
    if args.memory:
        return _memory(args)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not torch.cuda.is_available():
        if args.device == "cuda":
            raise UserError("command line: --device cuda: there is no CUDA device; leave it out, or say cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif args.clock == "cpu":
        raise UserError("command line: --clock cpu counts nothing of what a GPU does; remove it, or add --device cpu")
    from wsss_dist import dist
    from wsss_dist.benchmark import contest, show
    from wsss_dist.trainer import commit, configure_kernels

    cfg = _config(args.config, args.set, args.stage)
    dist.init(cfg.train.timeout_s)
    configure_kernels(cfg.kernels)
    options = contest.Options(args.steps, args.warmup, args.at, args.peer, args.data, args.clock)
    result: dict[str, Any] = {"commit": commit(), **contest.Contest(cfg, options).run()}
    if dist.is_main():
        print(*show.lines(result), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        if args.plot:
            show.plot(result, args.plot)
    dist.shutdown()
    return 0


def _memory(args: Any) -> int:
    """Predict instead of measuring: no engine, no ranks, no device."""
    from wsss_dist.benchmark import memory, show
    from wsss_dist.trainer import commit

    cfg = _config(args.config, args.set, args.stage)
    options = memory.Options(80.0 if args.gib is None else args.gib, args.ranks or 1, args.at)
    result = {"commit": commit(), **memory.Prediction(cfg, options).run()}
    print(*show.memory_lines(result), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _check(args: Any) -> None:
    """What the parser lets through."""
    for option, fits, expected in (
        ("steps", args.steps >= 1, "1 or more"),
        ("warmup", args.warmup is None or args.warmup >= 0, "0 or more"),
        ("at", 0 <= args.at <= 1, "a fraction of the run, 0 to 1"),
        ("device", args.device in (None, *DEVICES), "cpu or cuda"),
        ("clock", args.clock in ("wall", "cpu"), "wall or cpu"),
        ("gib", args.gib is None or 0 < args.gib < math.inf, "more than 0"),
        ("ranks", args.ranks is None or args.ranks >= 1, "1 or more"),
        ("plot", args.plot is None or args.plot.suffix == ".png", "a file that ends in .png"),
    ):
        if not fits:
            raise UserError(f"command line: --{option} is {getattr(args, option)}; expected {expected}")
    measured = [name for name in ("peer", "data", "plot", "device") if getattr(args, name)]
    if args.memory and measured:
        raise UserError(f"command line: --memory measures nothing, so --{measured[0]} has no place there; remove one")
    predicted = [name for name in ("gib", "ranks") if getattr(args, name) is not None]
    if predicted and not args.memory:
        raise UserError(f"command line: --{predicted[0]} belongs to --memory; add that, or remove it")


def _config(path: str, overrides: list[str], stage: str | None) -> RunConfig:
    """The config of a run, or of the training stage asked for."""
    from wsss_dist.config import parse_config, read_config
    from wsss_dist.pipeline import Pipeline

    values = read_config(path, overrides)
    if "stages" not in values:
        if stage is not None:
            raise UserError(f"command line: --stage {stage}: {path} has no 'stages'; leave --stage out")
        if "method" not in values:
            raise UserError(f"config: {path} has neither 'method' nor 'stages', so it trains nothing; add a method")
        return parse_config(values)
    entries = Pipeline(values).entries
    trained = [name for name, entry in entries.items() if entry.kind == "train"]
    if stage not in trained:
        found = "is missing" if stage is None else f"is {stage}"
        raise UserError(
            f"command line: --stage {found}; {path} trains in the stages {', '.join(trained)}: give --stage with one"
        )
    return entries[stage].config


if __name__ == "__main__":
    sys.exit(main())
