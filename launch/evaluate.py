"""Evaluate a trained run again: `python launch/evaluate.py --run runs/quickstart [--split val] [--set eval.beta=0.4]`.

Reads config.yaml and the newest checkpoint of the run folder; writes result.json, samples/ and the report there.
deepspeed and torchrun start it on several ranks. Exit status: 0 done, 2 a mistake in the input, 75 stopped by a signal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig

try:
    from wsss_dist.command import Parser, run_command
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")


def main() -> int:
    return run_command(_evaluate)


def _evaluate() -> int:
    parser = Parser(description="Evaluate a trained run.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--split", action="append", help="split with masks, may be repeated; default data.eval_splits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as eval.beta=0.4")
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args = parser.parse_args()
    from wsss_dist.data.problems import noted
    from wsss_dist.signals import interruptible

    with interruptible(), noted(args.run):
        evaluate(args.run, args.split, args.set)
    return 0


def evaluate(run_dir: Path, splits: list[str] | None, overrides: list[str]) -> None:
    from wsss_dist import dist
    from wsss_dist.config import load_config
    from wsss_dist.errors import UserError
    from wsss_dist.evaluate import evaluate_splits, open_splits
    from wsss_dist.precision import autocast
    from wsss_dist.report import build_report, load_result, results_text
    from wsss_dist.trained import load_newest
    from wsss_dist.trainer import configure_kernels

    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"command line: --run is '{run_dir}', which holds no config.yaml; name a trained run's folder")
    cfg = load_config(run_dir / "config.yaml", overrides)
    splits = splits or cfg.data.eval_splits
    if not splits:
        raise UserError("command line: no split to evaluate on; give --split NAME, or set data.eval_splits")
    dist.init(cfg.train.timeout_s)
    configure_kernels(cfg.kernels)
    class_names = next(iter(open_splits(cfg, splits).values())).class_names
    method, checkpoint = load_newest(cfg, run_dir, class_names)
    note = _weights_note(cfg, run_dir)
    with autocast(cfg.train.precision == "bf16"):
        evaluate_splits(method, cfg, splits, run_dir, checkpoint["step"], weights_note=note)
    report = dist.on_main(lambda: build_report(run_dir))
    if dist.is_main():
        print(results_text(load_result(run_dir)))
        print(f"report: {report}")
    dist.shutdown()


def _weights_note(cfg: RunConfig, run_dir: Path) -> str | None:
    """What the weights file that the run started from says of itself, or, where it is gone, said at the training."""
    from wsss_dist.models.pretrained import weights_note
    from wsss_dist.report import load_result

    weights = getattr(getattr(cfg.method, "backbone", None), "weights", None)
    if weights is None or weights == "timm" or Path(weights).expanduser().is_file():
        return weights_note(weights)
    return load_result(run_dir)["weights_note"] if (run_dir / "result.json").is_file() else None


if __name__ == "__main__":
    sys.exit(main())
