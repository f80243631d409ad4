"""What a trained run says of every image, as files: `python launch/pseudo_labels.py --run runs/coco_vit [--kind seg]`.

Reads config.yaml and the newest checkpoint of the run folder; writes one file per image, and goes on where it was
killed. deepspeed, torchrun and srun start it on any number of ranks, which share the images. Exit status: 0 done, 2 a
mistake in the input, 75 stopped by a signal between two images (start the same command again).
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from wsss_dist.command import Parser, run_command
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")

KINDS = "cam cam_crf seg seg_crf seg_tags seg_tags_crf pseudo maps maps_irn".split()


def main() -> int:
    return run_command(_make)


def _make() -> int:
    parser = Parser(description="Make label maps or CAMs of every image with a trained run.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--kind", default="seg_tags_crf", choices=KINDS, help="what to make; default seg_tags_crf")
    parser.add_argument("--split", action="append", help="may be repeated; default data.train_split")
    parser.add_argument("--out", type=Path, help="folder to make; default RUN/pseudo_labels/KIND")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as eval.beta=0.4")
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; LOCAL_RANK is used instead")
    args = parser.parse_args()

    from wsss_dist import dist
    from wsss_dist.config import load_config
    from wsss_dist.data.problems import noted
    from wsss_dist.errors import UserError
    from wsss_dist.pseudo_labels import make_pseudo_labels
    from wsss_dist.signals import interruptible
    from wsss_dist.trainer import configure_kernels

    if not (args.run / "config.yaml").is_file():
        raise UserError(
            f"command line: --run is '{args.run}', which holds no config.yaml; name a trained run's folder, or that of "
            "a training stage"
        )
    cfg = load_config(args.run / "config.yaml", args.set)
    dist.init(cfg.train.timeout_s)
    configure_kernels(cfg.kernels)
    out = args.out or args.run / "pseudo_labels" / args.kind
    say = print if dist.is_main() else lambda line: None
    with interruptible(), noted(args.run):
        made = make_pseudo_labels(cfg, args.run, out, args.kind, args.split or [cfg.data.train_split], say)
    for split, scores in made.scores.items():
        say(f"{split}: {args.kind} mIoU {100 * scores['miou']:.1f} % of {made.images[split]} images")
    say(
        f"{out}: {sum(made.images.values())} images; {made.files} files made now, on {dist.world_size()} ranks, in "
        f"{made.seconds:.1f} s, {made.files / made.seconds:.2f} images/s"
    )
    dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
