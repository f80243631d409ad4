"""The corpus of damaged pictures and masks: makes it, reads it as the project does, and counts what was noticed.

    python -m tests.data.damaged OUT [--images 5000] [--masks 2000] [--pictures FOLDER] [--seed 0]

OUT/set is a data set of the folder format, whose pictures (train) and masks (val) are damaged after `prepare_data.py
folder` has written its manifest. `--pictures` takes the JPEGs of a folder to start from instead of drawn ones. Every
random draw depends on the seed and the number of the file. Annotations are in `damaged_lists.py`.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.damage import JPEG, MASK, PNG, Damage
from tests.data.preparing import run
from wsss_dist.data.dataset import checked_mask
from wsss_dist.data.decode import DamagedImage, read_image
from wsss_dist.data.palette import palette_picture
from wsss_dist.data.prepare.inputs import Console
from wsss_dist.data.prepare.verify import verify
from wsss_dist.data.problems import read_problems
from wsss_dist.errors import BadFile, UserError

CLASSES = 11
# bytes of address space: a reader that asks for more is stopped, and not the machine
MAX_MEMORY = 6 * 2**30
# a decoder that needs longer for one picture hangs; process time, which other jobs on the machine do not stretch
HANG_S = 1.0
_POOL = 48


def photo(rng: np.random.Generator) -> np.ndarray:
    """A picture of smooth colours, edges and grain, uint8 [H, W, 3], which compresses about as a photograph does."""
    height, width = (int(x) for x in rng.integers(90, 260, 2))
    out = np.zeros((height, width, 3))
    for cells, weight in ((3, 90), (9, 40), (40, 12)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        out += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
    ys, xs = np.mgrid[:height, :width]
    for _ in range(6):
        y, x, radius = rng.integers(height), rng.integers(width), rng.integers(5, 60)
        out[(ys - y) ** 2 + (xs - x) ** 2 < radius**2] += rng.integers(-60, 60, 3)
    return np.clip(out + rng.normal(0, 4, out.shape) + 50, 0, 255).astype(np.uint8)


def pictures(count: int, folder: Path | None, seed: int) -> list[tuple[str, bytes]]:
    """(ending, content) of whole pictures of many kinds, four JPEGs to a PNG."""
    files = sorted(folder.glob("*.jpg"))[:count] if folder else []
    found = []
    for k in range(count):
        rng = np.random.default_rng((seed, 0, k))
        if k < len(files) and k % 5 < 2:
            found.append((".jpg", files[k].read_bytes()))
            continue
        pixels = np.array(Image.open(files[k]).convert("RGB")) if k < len(files) else photo(rng)
        found.append(_png(rng, pixels, k) if k % 5 == 4 else _jpeg(rng, pixels, k))
    return found


def _jpeg(rng: np.random.Generator, pixels: np.ndarray, k: int) -> tuple[str, bytes]:
    options = {"quality": int(rng.integers(55, 96)), "progressive": k % 3 == 0, "optimize": k % 4 == 0}
    mode = {7: "L", 11: "CMYK"}.get(k % 13, "RGB")
    if mode == "RGB":
        options["subsampling"] = int(rng.integers(3))
    if k % 6 == 1:
        options["restart_marker_rows"] = 1
    if k % 8 == 2:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = int(rng.integers(1, 9))
    return ".jpg", _saved(Image.fromarray(pixels).convert(mode), "JPEG", options)


def _png(rng: np.random.Generator, pixels: np.ndarray, k: int) -> tuple[str, bytes]:
    mode = ("RGB", "L", "P", "RGBA", "I;16", "1")[k // 5 % 6]
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    return ".png", _saved(picture if mode == "I;16" else picture.convert(mode), "PNG", {})


def _saved(picture: Image.Image, form: str, options: dict) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def mask_of(rng: np.random.Generator, k: int) -> bytes:
    """A whole mask of 120 x 160 pixels."""
    ids = np.zeros((120, 160), np.uint8)
    for _ in range(4):
        y, x = rng.integers(100), rng.integers(140)
        ids[y : y + 40, x : x + 50] = rng.choice([*range(1, CLASSES + 1), 255])
    return _saved(palette_picture(ids) if k % 3 else Image.fromarray(ids), "PNG", {})


def write_set(root: Path, images: int, masks: int, folder: Path | None, seed: int) -> list[Path]:
    """A whole data set; returns the files to damage."""
    every: list[Path] = []
    (root / "train/images").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    pool = pictures(min(images, _POOL), folder, seed)
    for k in range(images):
        ending, content = pool[k % len(pool)]
        every.append(root / "train/images" / f"{k:06d}{ending}")
        every[-1].write_bytes(content)
    _write_list(root / "train", [path.name for path in every])
    (root / "val/images").mkdir(parents=True)
    (root / "val/masks").mkdir()
    picture = _saved(Image.new("RGB", (160, 120)), "JPEG", {})
    for k in range(masks):
        (root / "val/images" / f"{k:06d}.jpg").write_bytes(picture)
        every.append(root / "val/masks" / f"{k:06d}.png")
        every[-1].write_bytes(mask_of(np.random.default_rng((seed, 1, k % _POOL)), k))
    _write_list(root / "val", [f"{k:06d}.jpg" for k in range(masks)])
    return every


def _write_list(folder: Path, names: list[str]) -> None:
    rows = (f"{name},class {k % CLASSES}\n" for k, name in enumerate(names))
    (folder / "labels.csv").write_text("image,labels\n" + "".join(rows))


def damaged(kinds: dict[str, Damage], k: int, content: bytes, seed: int, stream: int) -> tuple[str, bytes]:
    """Kind of damage and other bytes than `content`; each kind in its turn."""
    kind = list(kinds)[(k + k // _POOL) % len(kinds)]
    for attempt in range(100):
        rng = np.random.default_rng((seed, stream, k, attempt))
        other = kinds[kind](rng, content)
        if other != content:
            return kind, other
    raise AssertionError(f"{kind} leaves a file of {len(content)} bytes as it is")


@dataclass
class Count:
    """What became of the files of one sort."""

    files: int = 0
    refused: int = 0
    same_pixels: int = 0
    other_pixels: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    found_by_hash: int = 0
    slowest_s: float = 0.0
    silent: Counter = field(default_factory=Counter)  # kind of damage -> files that decode all the same
    reasons: Counter = field(default_factory=Counter)


def read_all(root: Path, files: list[Path], whole: dict[Path, bytes], kinds: dict[Path, str], count: Count) -> set[str]:
    """Read every file as the loader does; returns the paths below `root` of those that were refused."""
    before: dict[bytes, np.ndarray] = {}
    refused = set()
    for path in files:
        mask = path.parent.name == "masks"
        begin = time.process_time()
        faulthandler.dump_traceback_later(120, exit=True)  # a decoder that never ends
        try:
            pixels, reason = _read(path, mask)
        except Exception as error:  # any other than the two below is a defect of ours
            count.crashes.append(f"{path.name} ({kinds[path]}): {type(error).__name__}: {error}")
            pixels, reason = None, "a crash"
        finally:
            faulthandler.cancel_dump_traceback_later()
        took = time.process_time() - begin
        count.files += 1
        count.slowest_s = max(count.slowest_s, took)
        if took > HANG_S:
            count.hangs.append(f"{path.name} ({kinds[path]}): {took:.2f} s")
        if reason:
            count.refused += 1
            count.reasons[re.sub(r"\d.*|\[.*|:.*| \(.*", "", reason)] += 1
            refused.add(str(path.relative_to(root)))
            continue
        content = whole[path]
        if content not in before:
            path.with_name("whole.tmp").write_bytes(content)
            before[content] = _read(path.with_name("whole.tmp"), mask)[0]
            path.with_name("whole.tmp").unlink()
        same = pixels.shape == before[content].shape and bool((pixels == before[content]).all())
        count.same_pixels += same
        if not same:
            count.other_pixels += 1
            count.silent[kinds[path]] += 1
    return refused


def _read(path: Path, mask: bool) -> tuple[np.ndarray | None, str | None]:
    try:
        if not mask:
            return read_image(path), None
        ids = checked_mask(path, CLASSES)
        return (ids, None) if ids.shape == (120, 160) else (None, "another size than the image")
    except (DamagedImage, BadFile) as error:
        assert error.reason and str(path) in str(error)
        return None, error.reason


def corpus(out: Path, images: int, masks: int, folder: Path | None = None, seed: int = 0, workers: int = 0) -> dict:
    """Make the set, prepare it, damage it, and see what reading, `verify` and another preparation find.

    Returns:
        the counts of "images" and "masks", and what the summaries of the two commands lack or have too much.
    """
    root = out / "set"
    files = write_set(root, images, masks, folder, seed)
    run("folder", None, root, workers=workers)
    whole, kinds = {}, {}
    for k, path in enumerate(files):
        whole[path] = path.read_bytes()
        table = MASK if path.parent.name == "masks" else JPEG if path.suffix == ".jpg" else PNG
        kinds[path], content = damaged(table, k, whole[path], seed, 2)
        path.write_bytes(content)
    counts = {"images": Count(), "masks": Count()}
    refused = read_all(root, files[:images], whole, kinds, counts["images"])
    refused |= read_all(root, files[images:], whole, kinds, counts["masks"])

    console = Console(lambda line: None, lambda items, total: items)
    try:
        verify(root, None, workers, console)
    except UserError:
        pass
    rows = read_problems(root / "verify.csv")
    by_hash = {row[0] for row in rows if row[1] == "error" and row[2]}
    counts["images"].found_by_hash = sum(path.startswith("train/") for path in by_hash)
    counts["masks"].found_by_hash = sum(path.startswith("val/") for path in by_hash)
    (root / "manifest.json").unlink()
    run("folder", None, root, workers=workers, on_problem="continue")
    listed = {row[0] for row in read_problems(root / "problems.csv") if row[1] == "error" and row[2]}
    return {
        **counts,
        "hash_missed": sorted({str(path.relative_to(root)) for path in files} ^ by_hash),
        "preparation_differs": sorted(refused ^ listed),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def bound_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, hard))


def main() -> None:
    bound_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", "--count", type=int, default=5000)
    parser.add_argument("--masks", type=int, default=2000)
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.out.exists():
        shutil.rmtree(args.out)
    found = corpus(args.out, args.images, args.masks, args.pictures, args.seed, args.workers)
    print(json.dumps({k: vars(v) if isinstance(v, Count) else v for k, v in found.items()}, indent=1))


if __name__ == "__main__":
    main()
