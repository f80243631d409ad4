"""Prepare data sets, shards and pretrained weights: `python launch/prepare_data.py --help` lists what there is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    from wsss_dist.command import Parser, run_command
    from wsss_dist.data.prepare.fetch import default_cache
    from wsss_dist.data.prepare.stampscenes import Settings, prepare_stampscenes
except ModuleNotFoundError as error:
    sys.exit(f"error: '{error.name}' is not installed in {sys.executable}; run `make setup`, or `pip install -e .`")


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: _prepare(arguments))


def _prepare(arguments: list[str] | None) -> int:
    args = _parser().parse_args(arguments)
    if args.command in ("shards", "index"):
        return _prepare_shards(args)
    if args.command in ("stampscenes", "quickstart"):
        settings = Settings(args.train, args.val, args.val_seen, args.size, args.seed, args.source)
        prepare_stampscenes(args.out, settings, args.cache, say=_say, track=_track)
    if args.command in ("weights", "quickstart"):
        from wsss_dist.data.prepare.weights import prepare_weights

        prepare_weights(args.weights_out, args.cache, say=_say)
    return 0


def _parser() -> Parser:
    parser = Parser(description="Prepare data and pretrained weights for the quickstart.")
    commands = parser.add_subparsers(dest="command", required=True)
    scenes = commands.add_parser("stampscenes", help="compose the quickstart data set")
    weights = commands.add_parser("weights", help="fetch and convert the pretrained weights")
    both = commands.add_parser("quickstart", help="both of them")
    for command in (scenes, both):
        command.add_argument("--out", type=Path, default=Path("data/stampscenes"), help="folder to make")
        command.add_argument(
            "--source", default="auto", help="tuxpaint, emoji, auto, or a folder with <class>/*.png and backgrounds/"
        )
        command.add_argument("--train", type=int, default=1200, help="images of the training split")
        command.add_argument("--val", type=int, default=300, help="images with objects that training never saw")
        command.add_argument("--val-seen", type=int, default=300, help="new images with objects of the training split")
        command.add_argument("--size", type=int, default=224, help="side of the square images in pixels")
        command.add_argument("--seed", type=int, default=0)
    weights.add_argument("--out", type=Path, default=Path("data/weights"), dest="weights_out", help="folder to make")
    both.add_argument("--weights-out", type=Path, default=Path("data/weights"), help="folder for the weights")
    for command in (scenes, weights, both):
        command.add_argument("--cache", type=Path, default=default_cache(), help="folder of the downloads")
    _add_shards(commands)
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


def _track(items: Iterable, total: int) -> Iterator:
    """A progress bar on a terminal, a line every tenth otherwise."""
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(items, total=total, description="composing")
        return
    started = time.monotonic()
    for k, item in enumerate(items, 1):
        yield item
        if k * 10 // total != (k - 1) * 10 // total:
            print(f"composed {k} of {total} scenes ({time.monotonic() - started:.0f} s)", flush=True)


def _prepare_shards(args) -> int:
    classes = None
    if args.classes is not None:
        from wsss_dist.data.folder import read_classes

        classes = read_classes(args.classes)
    if args.command == "shards":
        from wsss_dist.data.prepare.shards import parse_size, prepare_shards

        size = parse_size(args.size)
        prepare_shards(args.source, args.split, args.out, size=size, masks=args.masks, classes=classes, say=_say)
    else:
        from wsss_dist.data.prepare.index_shards import index_shards

        index_shards(args.folder, args.split, args.out, classes, _say)
    return 0


def _add_shards(commands) -> None:
    shards = commands.add_parser("shards", help="write a split of a data set as WebDataset shards")
    shards.add_argument("--from", dest="source", required=True, metavar="FORMAT:FOLDER", help="coco:, voc: or folder:")
    shards.add_argument("--split", required=True, help="name of the split")
    shards.add_argument("--out", type=Path, required=True, help="folder to make; the split goes into a folder in it")
    shards.add_argument("--size", default="256MB", help="most bytes of pictures in a shard (default: 256MB)")
    shards.add_argument("--masks", action="store_true", help="store the masks too, for an evaluation")
    index = commands.add_parser("index", help="make, or check, the index of WebDataset shards")
    index.add_argument("folder", help="folder or address of the .tar files")
    index.add_argument("--split", help="name of the split (default: that of the folder)")
    index.add_argument("--out", type=Path, help="folder for the index (default: beside the shards)")
    for command in (shards, index):
        command.add_argument("--classes", type=Path, help="file with one class name per line, in the order of the ids")


if __name__ == "__main__":
    sys.exit(main())
