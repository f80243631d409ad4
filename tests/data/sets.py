"""Tiny data sets in each format, written by hand so that the expected tags and masks are plain to see."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from wsss_dist.data import DataConfig

NAMES = ["cat", "dog", "cow"]
# raw ids with gaps and out of order, as COCO has them
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}]


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def config(root: Path, form: str = "coco", **changes) -> DataConfig:
    return DataConfig(**{"format": form, "root": root, "num_workers": 0, "crop": 16, **changes})


def coco_content() -> dict:
    """Three images of 20 x 30: a polygon and a crowd; an RLE under a smaller polygon; nothing."""
    inside = np.zeros((20, 30), int)
    inside[5:15, 5:25] = 1
    flat = inside.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    rle = np.diff([0, *edges, flat.size]).tolist()
    crowd = np.zeros((20, 30), int)
    crowd[0:10, 0:12] = 1
    crowd_edges = np.flatnonzero(np.diff(crowd.reshape(-1, order="F"), prepend=0))
    crowd_rle = np.diff([0, *crowd_edges, 600]).tolist()
    if crowd[0, 0]:
        assert crowd_rle[0] == 0
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": [[2, 2, 10, 2, 10, 8, 2, 8]]},
        {
            "id": 2,
            "image_id": 7,
            "category_id": 90,
            "iscrowd": 1,
            "segmentation": {"size": [20, 30], "counts": crowd_rle},
        },
        {"id": 3, "image_id": 5, "category_id": 90, "iscrowd": 0, "segmentation": [[8, 8, 12, 8, 12, 12, 8, 12]]},
        {"id": 4, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": {"size": [20, 30], "counts": rle}},
    ]
    images = [{"id": i, "file_name": f"{i:03d}.jpg", "height": 20, "width": 30} for i in (7, 5, 9)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}


def write_coco(root: Path, content: dict | None = None, split: str = "train", official: bool = False) -> Path:
    content = coco_content() if content is None else content
    folder = root / split if official else root / "images" / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for k, image in enumerate(content["images"]):
        picture(seed=k).save(folder / image["file_name"])
    name = f"instances_{split}.json" if official else f"{split}.json"
    (root / "annotations" / name).write_text(json.dumps(content))
    return root


def rewrite(root: Path, change, split: str = "train") -> Path:
    """Apply `change` to the parsed annotations of a written COCO set."""
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def write_folder(root: Path, rows: list[str] | None = None) -> Path:
    rows = ["image,labels", "b.jpg,dog;cat", 'a.png,""', "c.jpg,cow"] if rows is None else rows
    (root / "train" / "images").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.jpg", "c.jpg")):
        picture(seed=k).save(root / "train" / "images" / name)
    (root / "train" / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def add_mask(
    root: Path, name: str, values: dict, size: tuple[int, int] = (20, 30), folder: str = "train/masks"
) -> None:
    """A palettised mask whose rows k hold values[k]."""
    mask = np.zeros(size, np.uint8)
    for row, value in values.items():
        mask[row] = value
    file = Image.fromarray(mask)
    file.putpalette([v % 256 for v in range(768)])
    (root / folder).mkdir(parents=True, exist_ok=True)
    file.save(root / folder / name)


def write_voc(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """VOCdevkit/VOC2012 with 2007_a (cat, difficult dog; official mask) and 2008_b (dog; SBD mask alone)."""
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    tags = {"2007_a": [(classes[0], 0), (classes[1], 1)], "2008_b": [(classes[1], 0)]}
    for k, (name, objects) in enumerate(tags.items()):
        picture(seed=k).save(base / "JPEGImages" / f"{name}.jpg")
        parts = "<part><name>head</name></part>"
        xml = "".join(f"<object><name>{n}</name><difficult>{d}</difficult>{parts}</object>" for n, d in objects)
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    lists = base / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("2007_a")  # some copies end without a newline
    (lists / "train_aug.txt").write_text("/JPEGImages/2008_b.jpg /SegmentationClassAug/2008_b.png\n2007_a\n")
    add_mask(base, "2007_a.png", {0: 8, 1: 255}, folder="SegmentationClass")
    add_mask(base, "2007_a.png", {0: 3}, folder="SegmentationClassAug")
    add_mask(base, "2008_b.png", {0: 12}, folder="SegmentationClassAug")
    return root


def write_maps(folder: Path, data) -> dict:
    """Maps of all images of a data set, plain to see: the `maps` of a config with one of each kind.

    labels: the first class of the image in the upper half, undecided below; saliency: the red channel; hint: the green
    channel over 255 of the last class, half of it for the others.
    """
    for name in ("labels", "saliency", "hint"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(len(data)):
        image, classes = data.image(i), np.flatnonzero(data.tags[i])
        ids = np.full(image.shape[:2], 255, np.uint8)
        ids[: len(ids) // 2] = classes[0] + 1 if len(classes) else 0
        Image.fromarray(ids).save(folder / "labels" / f"{data.id(i)}.png")
        Image.fromarray(np.ascontiguousarray(image[:, :, 0])).save(folder / "saliency" / f"{data.id(i)}.png")
        if len(classes):
            write_scores(folder / "hint" / f"{data.id(i)}.npz", classes, image[:, :, 1] / 255)
    kinds = {"labels": "labels", "saliency": "grey", "hint": "scores"}
    return {name: {"dir": folder / name, "kind": kind, "made_by": f"stage {name}"} for name, kind in kinds.items()}


def write_scores(path: Path, classes: np.ndarray, largest: np.ndarray) -> None:
    full = np.stack([largest if c == classes[-1] else largest / 2 for c in classes])
    np.savez_compressed(path, labels=classes.astype(np.int16), full=full.astype(np.float16))
