"""Prepare data sets, shards and pretrained weights: `python launch/prepare_data.py --help` lists what there is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
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
        prepare_stampscenes(args.out, settings, args.cache, say=_say, track=partial(_track, "composed", "scenes"))
    if args.command in ("weights", "quickstart"):
        from wsss_dist.data.prepare.weights import prepare_weights

        prepare_weights(args.weights_out, args.cache, say=_say)
    if args.command in ("coco", "voc", "folder"):
        _prepare_official(args)
    if args.command == "verify":
        from wsss_dist.data.prepare.verify import verify

        verify(args.folder, args.report, args.workers, _console("verified", "files"))
    if args.command == "check":
        from wsss_dist.data.prepare.check import check

        check(args.source, args.split, args.classes, args.report, args.workers, _console("checked", "images"))
    return 0


def _console(done: str, things: str):
    from wsss_dist.data.prepare.inputs import Console

    return Console(_say, partial(_track, done, things))


def _prepare_official(args) -> None:
    from wsss_dist.data.prepare.inputs import Options

    console = _console("checked", "images")
    if args.command == "folder":
        from wsss_dist.data.prepare.folder import check_folder

        check_folder(Options((), args.root, args.workers, args.on_problem, verify=args.verify), console)
        return
    options = Options(
        sources=tuple(args.source),
        out=args.out,
        workers=args.workers,
        on_problem=args.on_problem,
        subset=args.subset,
        labels=args.labels,
        legacy=args.legacy,
        verify=args.verify,
    )
    if args.command == "coco":
        from wsss_dist.data.prepare.coco import prepare_coco

        prepare_coco(options, console)
    else:
        from wsss_dist.data.prepare.voc import prepare_voc

        prepare_voc(options, console)


def _parser() -> Parser:
    parser = Parser(description="Prepare data sets and pretrained weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_official(commands)
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
    _add_checks(commands)
    return parser


def _add_official(commands) -> None:
    coco = commands.add_parser("coco", help="COCO 2014 from train2014.zip, val2014.zip, annotations_trainval2014.zip")
    voc = commands.add_parser(
        "voc", help="VOC 2012 from VOCtrainval_11-May-2012.tar and SBD's benchmark.tgz, with VOC2012test.tar or without"
    )
    folder = commands.add_parser("folder", help="check a data set of the folder format and write its manifest")
    folder.add_argument("root", type=Path, help="folder with <split>/images and <split>/labels.csv")
    for command, out in ((coco, "data/coco14"), (voc, "data/VOCdevkit")):
        command.add_argument(
            "--source", type=Path, nargs="+", required=True, help="folders of the archives, or of what they unpack to"
        )
        command.add_argument("--out", type=Path, default=Path(out), help="folder to make")
        command.add_argument("--subset", action="store_true", help="take what is there, whatever its number")
        command.add_argument("--labels", type=Path, help="take the tags from this cls_labels_onehot.npy")
        command.add_argument("--legacy", action="store_true", help="write cls_labels_onehot.npy and plain lists too")
    for command in (coco, voc, folder):
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: this one alone")
        command.add_argument("--verify", action="store_true", help="read all files of a finished folder again")
        command.add_argument(
            "--on-problem",
            choices=("stop", "continue"),
            default="stop",
            help="where files cannot be used: make no lists, or leave them out (default: stop)",
        )


def _add_checks(commands) -> None:
    verify = commands.add_parser("verify", help="compare the SHA-256 of every file of a prepared folder, or of shards")
    verify.add_argument("folder", type=Path, help="folder with a manifest.json, or with shards")
    check = commands.add_parser("check", help="decode what the loader reads of a data set, with or without a manifest")
    check.add_argument(
        "--from", dest="source", required=True, metavar="FORMAT:FOLDER", help="coco:, voc:, folder: or shards:"
    )
    check.add_argument("--split", required=True, nargs="+", help="names of the splits")
    check.add_argument("--classes", type=Path, help="file with one class name per line, in the order of the ids")
    for command, table in ((verify, "verify.csv"), (check, "check.csv")):
        command.add_argument("--report", type=Path, help=f"table to write (default: {table} in the folder)")
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: this one alone")


def _say(line: str) -> None:
    coding = sys.stdout.encoding or "utf-8"
    print(line.encode(coding, "backslashreplace").decode(coding), flush=True)  # a file name need not be text


def _track(done: str, things: str, items: Iterable, total: int) -> Iterator:
    """A progress bar on a terminal, a line every tenth otherwise."""
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(items, total=total, description=f"{things} {done}")
        return
    started = time.monotonic()
    for k, item in enumerate(items, 1):
        yield item
        if k * 10 // total != (k - 1) * 10 // total:
            print(f"{done} {k} of {total} {things} ({time.monotonic() - started:.0f} s)", flush=True)


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
