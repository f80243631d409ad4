"""Damaged lists and annotations of every format: each is read as it was, read otherwise, or refused in one sentence.

python -m tests.data.damaged_lists OUT [--count 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data import official, sets
from tests.data.damage import ANY, Damage, Rng
from tests.data.damaged import HANG_S, bound_memory
from tests.data.shards_made import write as write_shards
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset
from wsss_dist.data.coco_masks import draw_mask
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.erased import UnfitRegions, load_regions, regions_writer
from wsss_dist.data.maps import UnfitMap, load_scores
from wsss_dist.data.prepare.coco_index import AnnotationIndex
from wsss_dist.data.prepare.inputs import Console
from wsss_dist.data.prepare.legacy import read_onehot, write_onehot
from wsss_dist.data.prepare.manifest import file_record, write_manifest
from wsss_dist.data.prepare.matfile import MatError, read_mat_field
from wsss_dist.data.prepare.verify import verify
from wsss_dist.data.problems import LeftOut, read_problems, write_problems
from wsss_dist.errors import UserError

REFUSED = (UserError, MatError, UnfitMap, UnfitRegions)
# values that stand where others are expected
_ODD = (
    *("null", "true", "[]", "{}", '""', "-1", "0", "1e400", "NaN", "1.5", str(10**30), '"\\ud800"', '"../../x"'),
    *('"\\u0000"', "[" * 3000, '"' + "9" * 5000 + '"', "\x00", "\ufeff", "é", '"/etc/passwd"', "2147483648", "-9e18"),
)  # fmt: skip
_TOKEN = re.compile(r'-?\d+(?:\.\d+)?|"[^"]*"|<[^>]*>|[^\s,;<>]+')


@dataclass(frozen=True)
class Reader:
    """A file of one kind: `write` makes a whole set and returns the file, `read` what is read of it, to be compared."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    text: bool = True


def token(rng: Rng, data: bytes) -> bytes:
    """Another value in place of one."""
    text = data.decode("utf-8", "surrogateescape")
    found = list(_TOKEN.finditer(text))
    begin, end = found[rng.integers(len(found))].span()
    return (text[:begin] + _ODD[rng.integers(len(_ODD))] + text[end:]).encode("utf-8", "surrogatepass")


def no_token(rng: Rng, data: bytes) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    begin, end = list(_TOKEN.finditer(text))[rng.integers(len(_TOKEN.findall(text)))].span()
    return (text[:begin] + text[end:]).encode("utf-8", "surrogatepass")


def utf_16(rng: Rng, data: bytes) -> bytes:
    return data.decode().encode("utf-16")


TEXT: dict[str, Damage] = {**ANY, "token": token, "token ": token, "token  ": token, "no token": no_token} | {
    "utf-16": utf_16
}


def _all_of(dataset: Dataset) -> tuple:
    masks = [dataset.mask(i).tobytes() for i in range(len(dataset))] if dataset.has_masks else []
    shapes = [dataset.image(i).shape for i in range(len(dataset))]
    return dataset.class_names, [dataset.id(i) for i in range(len(dataset))], dataset.tags.tobytes(), masks, shapes


def _split(form: str, split: str, above: int) -> Callable[[Path], tuple]:
    """Reads the split of a set whose root is so many folders above the file."""
    return lambda path: _all_of(build_dataset(sets.config(path.parents[above], form), split))


def _indexed(path: Path) -> tuple:
    index = AnnotationIndex(path)
    if index.defects:
        raise UserError(f"{path}: {index.defects[0][2]}")  # a row of problems.csv
    masks = []
    for row, image in enumerate(index.images):
        found = index.annotations(row)
        masks.append(draw_mask(found, image.height, image.width, index.class_of, where=path, name=image.file_name))
    return index.images, index.categories, index.tags.tobytes(), [mask.tobytes() for mask in masks]


def _bytes(place: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        root.mkdir(parents=True)
        (root / place).write_bytes(content())
        return root / place

    return write


def _scores(root: Path) -> Path:
    root.mkdir(parents=True)
    sets.write_scores(root / "a.npz", np.array([0, 2]), np.random.default_rng(0).random((9, 7)))
    return root / "a.npz"


def _regions(root: Path) -> Path:
    root.mkdir(parents=True)
    with (root / "a.npz").open("wb") as file:
        regions_writer(np.array([0, 2]), np.random.default_rng(0).random((2, 9, 7)) < 0.5)(file)
    return root / "a.npz"


def _of_arrays(found: dict[str, np.ndarray]) -> list:
    return [(name, array.shape, array.tobytes()) for name, array in sorted(found.items())]


def _shard_file(name: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        return write_shards(write_synthetic_dataset(root / "set", 6, 1, 40, 3, seed=0), root / "out") / "train" / name

    return write


def _manifest(root: Path) -> Path:
    root.mkdir(parents=True)
    records = {}
    for name in "ab":
        (root / name).write_bytes(name.encode())
        records[name] = json.dumps(file_record(name.encode()))
    write_manifest(root, {"about": "x", "settings": {"data": "x"}}, records)
    return root / "manifest.json"


def _verified(path: Path) -> None:
    verify(path.parent, None, 0, Console(lambda line: None, lambda items, total: items))


def _table(root: Path) -> Path:
    root.mkdir(parents=True)
    write_problems(root / "problems.csv", [(f"train/{k}.jpg", "error", "the file is empty", "left out") for k in "ab"])
    return root / "problems.csv"


def _table_read(path: Path) -> list:
    assert isinstance("x" in LeftOut(path), bool)
    return read_problems(path)


ONEHOT = np.eye(4, 20, dtype=np.uint8)
READERS = {
    "COCO JSON": Reader(lambda root: sets.write_coco(root) / "annotations/train.json", _split("coco", "train", 1)),
    "COCO JSON, prepared": Reader(lambda root: sets.write_coco(root) / "annotations/train.json", _indexed),
    "VOC XML": Reader(
        lambda root: sets.write_voc(root) / "VOCdevkit/VOC2012/Annotations/2007_a.xml", _split("voc", "val", 3)
    ),
    "VOC list": Reader(
        lambda root: sets.write_voc(root) / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt",
        _split("voc", "train_aug", 4),
    ),
    "labels.csv": Reader(lambda root: sets.write_folder(root) / "train/labels.csv", _split("folder", "train", 1)),
    "classes.txt": Reader(lambda root: sets.write_folder(root) / "classes.txt", _split("folder", "train", 0)),
    "shards.json": Reader(_shard_file("shards.json"), _split("shards", "train", 1)),
    "samples.npz": Reader(_shard_file("samples.npz"), _split("shards", "train", 1), text=False),
    "manifest.json": Reader(_manifest, _verified),
    "problems.csv": Reader(_table, _table_read),
    "cls_labels_onehot.npy": Reader(
        _bytes("cls_labels_onehot.npy", lambda: write_onehot(list("abcd"), ONEHOT)),
        lambda path: [(name, row.tobytes()) for name, row in read_onehot(path, 20).items()],
        text=False,
    ),
    "SBD .mat": Reader(
        _bytes("a.mat", lambda: official.mat("GTcls", np.arange(63, dtype=np.uint8).reshape(9, 7), True)),
        lambda path: read_mat_field(path.read_bytes(), "GTcls", "Segmentation").tobytes(),
        text=False,
    ),
    "SBD .mat, not packed": Reader(
        _bytes("a.mat", lambda: official.mat("GTcls", np.arange(63, dtype=np.uint8).reshape(9, 7), False)),
        lambda path: read_mat_field(path.read_bytes(), "GTcls", "Segmentation").tobytes(),
        text=False,
    ),
    "scores .npz": Reader(_scores, lambda path: _of_arrays(load_scores(path, 3)), text=False),
    "regions .npz": Reader(
        _regions, lambda path: [array.tobytes() for array in load_regions(path, 3)], text=False
    ),
}  # fmt: skip


def run_lists(out: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Damage and read `count` files, the kinds in turn.

    Returns:
        kind -> refused, same, other; "crashes", "hangs", and "hash_missed": files that `verify` does not find.
    """
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"crashes": [], "hangs": [], "slowest_s": 0.0}
    records, copies = {}, {}
    names = list(READERS)
    files = {name: READERS[name].write(out / f"sets/{k}") for k, name in enumerate(names)}
    whole = {name: path.read_bytes() for name, path in files.items()}
    expected = {name: READERS[name].read(files[name]) for name in names}
    result["kinds"] = {name: Counter() for name in names}
    for k in range(count):
        name = names[k % len(names)]
        reader, path = READERS[name], files[name]
        kinds = TEXT if reader.text else ANY
        kind = list(kinds)[k // len(names) % len(kinds)]
        rng = np.random.default_rng((seed, k))
        content = next(c for c in iter(lambda: kinds[kind](rng, whole[name]), None) if c != whole[name])  # noqa: B023
        records[f"files/{k}"], copies[f"files/{k}"] = json.dumps(file_record(whole[name])), content
        path.write_bytes(content)
        begin = time.process_time()
        try:
            same = reader.read(path) == expected[name]
            result["kinds"][name]["same" if same else "other"] += 1
        except REFUSED as error:
            result["kinds"][name]["refused"] += 1
            if not str(error) or (isinstance(error, UserError) and str(path.parent) not in str(error)):
                result["crashes"].append(f"{k} {name} ({kind}): a message without the file: {error}")
        except Exception as error:  # a defect of ours
            result["crashes"].append(f"{k} {name} ({kind}): {type(error).__name__}: {str(error)[:200]}")
        took = time.process_time() - begin
        result["slowest_s"] = max(result["slowest_s"], took)
        if took > HANG_S:
            result["hangs"].append(f"{k} {name} ({kind}): {took:.2f} s")
        path.write_bytes(whole[name])
    (out / "files").mkdir()
    for name, content in copies.items():
        (out / name).write_bytes(content)
    write_manifest(out, {"about": "damaged lists"}, records)
    try:
        verify(out, None, 0, Console(lambda line: None, lambda items, total: items))
    except UserError:
        pass
    result["hash_missed"] = sorted(records.keys() ^ {row[0] for row in read_problems(out / "verify.csv")})
    return result


def main() -> None:
    bound_memory()
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run_lists(args.out or Path(folder) / "lists", args.count, args.seed), indent=1))


if __name__ == "__main__":
    main()
