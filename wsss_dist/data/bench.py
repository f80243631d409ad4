"""How many images a second one loader worker makes, from files, from shards and from shards at an address.

    python -m wsss_dist.data.bench [--images FOLDER] [--rate IMAGES_PER_SECOND ...] [--json FILE]

Pictures of a folder are scaled to about 500 x 375 pixels and saved as JPEGs; each reader then makes the same training
samples of them: read, decode, resize by 0.5 to 2, mirror, crop, normalise. One thread, CPU time, so that other jobs do
not count, nor does waiting for a disk or a network: the files lie in the memory of the system. The readers take turns
batch by batch; medians over the rounds.

A trainer that takes R images a second needs R / r workers of r images a second each, and a machine with as many cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from wsss_dist.data.config import DataConfig
from wsss_dist.data.loader import TrainLoader, build_train_loader
from wsss_dist.data.prepare.shards import prepare_shards
from wsss_dist.data.readers import build_dataset
from wsss_dist.errors import UserError

READERS = ("folder", "shards", "shards in a cache", "shards at file://")
_BATCH = 8


def make_images(source: Path, root: Path, count: int, long_side: int = 500, quality: int = 90) -> int:
    """Write `count` JPEGs of a data set of the folder format, made of the pictures of `source`; their bytes in all.

    Every third is upright; all are enlarged or reduced to long_side x 3/4 long_side pixels.
    """
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise UserError(
            f"bench: --images is '{source}', where no picture is; name a folder of some (`python "
            "launch/prepare_data.py stampscenes` makes data/stampscenes)"
        )
    folder = root / "train" / "images"
    folder.mkdir(parents=True)
    for k in range(count):
        size = (long_side, long_side * 3 // 4)
        picture = Image.open(found[k % len(found)]).convert("RGB")
        picture.resize(size if k % 3 else size[::-1], Image.Resampling.BICUBIC).save(
            folder / f"{k:05d}.jpg", quality=quality
        )
    (root / "classes.txt").write_text("thing\n")
    rows = "".join(f"{k:05d}.jpg,thing\n" for k in range(count))
    (root / "train" / "labels.csv").write_text(f"image,labels\n{rows}")
    return sum(path.stat().st_size for path in folder.iterdir())


def configs(root: Path, crop: int) -> dict[str, DataConfig]:
    """The data section of each reader: PCRE's augmentation of COCO."""
    shards = root / "shards"
    common = {"crop": crop, "scale": (0.5, 2.0), "num_workers": 0}
    return {
        "folder": DataConfig(format="folder", root=root / "files", **common),
        "shards": DataConfig(format="shards", root=shards, **common),
        "shards in a cache": DataConfig(
            format="shards", root=f"file://{shards}", cache={"dir": root / "cache", "gb": 100}, **common
        ),
        "shards at file://": DataConfig(format="shards", root=f"file://{shards}", **common),
    }


def measure(configs: dict[str, DataConfig], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each reader in each round for one epoch of the images; a round before the first is not counted.

    The readers take turns batch by batch, so that what else the machine does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [0.0] * (rounds + 1) for name in configs}
    names = list(configs)
    loaders = {name: _loader(configs[name], rounds + 1) for name in names}
    steps = len(loaders[names[0]]) // (rounds + 1)
    batches = {name: iter(loader) for name, loader in loaders.items()}
    for step in range(steps * (rounds + 1)):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.process_time()
            next(batches[name])
            seconds[name][step // steps] += time.process_time() - begin
    return {name: values[1:] for name, values in seconds.items()}


def _loader(cfg: DataConfig, epochs: int) -> TrainLoader:
    dataset = build_dataset(cfg, "train")
    return build_train_loader(
        dataset,
        cfg,
        seed=0,
        global_batch=_BATCH,
        micro_batch=_BATCH,
        rank=0,
        world_size=1,
        start_step=0,
        num_steps=len(dataset) // _BATCH * epochs,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wsss_dist.data.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("data/stampscenes/images"), help="folder of pictures")
    parser.add_argument("--count", type=int, default=200, help="JPEGs to make")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crop", type=int, default=448)
    parser.add_argument("--rate", type=float, nargs="+", default=[100.0], help="images a second that a trainer takes")
    parser.add_argument("--json", type=Path, help="file for every figure")
    args = parser.parse_args(arguments)
    if args.count < _BATCH or args.rounds < 1 or min(args.rate) <= 0:
        raise UserError(f"bench: expected --count of {_BATCH} or more, --rounds of 1 or more and --rate above 0")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="wsss-bench-") as folder:
        root = Path(folder)
        size = make_images(args.images, root / "files", args.count)
        prepare_shards(
            f"folder:{root / 'files'}",
            "train",
            root / "shards",
            size=2**22,
            masks=False,
            classes=None,
            say=lambda _: None,
        )
        seconds = measure(configs(root, args.crop), args.rounds)
    images = args.count // _BATCH * _BATCH
    print(f"{args.count} JPEGs of {size / args.count / 1000:.0f} kB, crop {args.crop}, one thread, CPU time")
    result = {}
    for name, values in seconds.items():
        speed = images / statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(seconds["folder"], values, strict=True))
        needed = {rate: math.ceil(rate / speed) for rate in args.rate}
        result[name] = {"images_per_second": speed, "ratio": ratio, "workers": needed, "seconds": values}
        workers = ", ".join(f"{count} for {rate:g} images/s" for rate, count in needed.items())
        print(f"{name:18} {speed:6.1f} images/s a worker, {ratio:.3f} of folder; workers: {workers}")
    if args.json:
        args.json.write_text(json.dumps({"crop": args.crop, "bytes": size, "readers": result}, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
