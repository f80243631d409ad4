"""Train a method: `deepspeed launch/train.py --config coco_vit.yaml`; torchrun and plain python work the same way.

Exit status: 0 done, 2 a mistake in the input, 74 a checkpoint could not be written, 75 stopped by a signal with a
checkpoint (start the same command again), 1 anything else.
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
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(
            f"command line: {' '.join(unknown)} is not known; options are --config FILE and --set KEY=VALUE. "
            "What DeepSpeed reads is in the config: sections train, optim and deepspeed"
        )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from wsss_dist.config import load_config
    from wsss_dist.trainer import Trainer

    return Trainer(load_config(args.config, args.set)).train()


if __name__ == "__main__":
    sys.exit(main())
