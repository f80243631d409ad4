"""Train a method: `deepspeed launch/train.py --config coco_vit.yaml`; torchrun and plain python work the same way.

A config with `stages:` is run stage by stage; what is done and unchanged is skipped. --stage NAME runs one alone,
--until NAME that one and what it depends on.

Exit status: 0 done, 2 a mistake in the input, 74 a checkpoint could not be written, 75 stopped by a signal with a
checkpoint, or between two images of a stage (start the same command again), 1 anything else.
"""

from __future__ import annotations

import os
import sys

try:
    from wsss_dist.command import Parser, run_command
    from wsss_dist.errors import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")


def main() -> int:
    return run_command(_train)


def _train() -> int:
    parser = Parser(description="Train a method.")
    parser.add_argument("--config", required=True, help="a YAML file, looked up as given and in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as optim.lr=1e-4")
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, of a config with `stages:`")
    parser.add_argument(
        "--until", metavar="NAME", help="run this stage and what it depends on, of a config with `stages:`"
    )
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(
            f"command line: {' '.join(unknown)} is not known; options are --config FILE, --set KEY=VALUE, "
            "--stage NAME and --until NAME. What DeepSpeed reads is in the config: sections train, optim and deepspeed"
        )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from wsss_dist.config import parse_config, read_config

    values = read_config(args.config, args.set)
    if "stages" in values:
        from wsss_dist.pipeline import Pipeline

        return Pipeline(values).start(args.stage, args.until)
    for option, name in (("--stage", args.stage), ("--until", args.until)):
        if name is not None:
            raise UserError(f"command line: {option} {name}: {args.config} has no 'stages'; leave {option} out")
    from wsss_dist.trainer import Trainer

    return Trainer(parse_config(values)).train()


if __name__ == "__main__":
    sys.exit(main())
