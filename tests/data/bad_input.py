"""What the tests of bad input share: sets of every format with masks, and the rows of a summary."""

from __future__ import annotations

from pathlib import Path

from tests.data import sets
from wsss_dist.data.prepare.inputs import Console
from wsss_dist.data.problems import read_problems

QUIET = Console(lambda line: None, lambda items, total: items)


def table(path: Path) -> dict[str, list[str]]:
    """Path -> reasons of the errors."""
    found: dict[str, list[str]] = {}
    for name, kind, reason, effect in read_problems(path):
        assert reason and effect
        if kind == "error":
            found.setdefault(name, []).append(reason)
    return found


def has(rows: dict[str, list[str]], path: str, reason: str) -> bool:
    return any(reason in found for found in rows.get(path, []))


def made(form: str, root: Path) -> tuple[Path, str, Path, Path]:
    """A set of the format with masks; its root, its split, the folder of its images, that of its masks."""
    if form == "coco":
        sets.write_coco(root)
        for k in (5, 7, 9):
            sets.add_mask(root, f"{k:03d}.png", {0: 1}, folder="masks/train")
        return root, "train", root / "images/train", root / "masks/train"
    if form == "voc":
        base = sets.write_voc(root) / "VOCdevkit/VOC2012"
        return root, "train_aug", base / "JPEGImages", base / "SegmentationClass"
    sets.write_folder(root)
    for name in "abc":
        sets.add_mask(root, f"{name}.png", {0: 1})
    return root, "train", root / "train/images", root / "train/masks"
