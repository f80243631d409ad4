"""Data sets in the COCO format: one JSON of images, categories and annotations per split.

    root/annotations/<split>.json  or  root/annotations/instances_<split>.json
    root/images/<split>/*.jpg      or  root/<split>/*.jpg                         (the second is the official layout)
    root/masks/<split>/<stem>.png  optional; without it masks are drawn from the annotations

A file that says "folder": "<name>" has its images and masks in the folders of that name, which several lists can share:
so train-81k and train-82k of `prepare_data.py coco` are two lists of train2014.

Tags come from the `labels` list of each image (names or category ids) where the file has them, else from the
categories of its annotations. Raw category ids become 1..C in ascending order of id. A crowd region (iscrowd = 1)
gives its tag, for the class is in the picture. `wsss_dist/data/coco_masks.py` says how masks are drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wsss_dist.data.coco_masks import draw_mask
from wsss_dist.data.dataset import Dataset, check_distinct, check_images, checked_mask, existing_root
from wsss_dist.data.decode import MAX_PIXELS
from wsss_dist.data.problems import LeftOut
from wsss_dist.errors import BadFile, UserError


class CocoDataset(Dataset):
    """One split. Reads tags only; segmentations are read again, and kept, when a mask is first asked for."""

    def __init__(self, root: Path, split: str, classes: list[str] | None, left_out: LeftOut | None = None) -> None:
        existing_root(root)
        self._file = _annotation_file(root, split)
        content = _load(self._file)
        names = _check_categories(content["categories"], classes, self._file)
        self._class_of = {raw: c for c, raw in enumerate(sorted(names))}
        images = content["images"]
        check_distinct([image["id"] for image in images], "image ids", self._file)
        self._raw_ids = np.array([image["id"] for image in images], dtype=object)
        self._sizes = np.array([[image["height"], image["width"]] for image in images], np.int64).reshape(-1, 2)
        files = [str(image["file_name"]) for image in images]
        shared = _folder_name(content["folder"], self._file) if "folder" in content else split
        folder = _image_folder(root, shared)
        check_images(folder, files, self._file, left_out)
        tags = _tags(content, names, self._class_of, self._file)
        self._has_segments = any("segmentation" in a for a in content["annotations"])
        self._mask_folder = root / "masks" / shared
        self._segments: dict[Any, list[dict]] | None = None
        super().__init__(f"{root.name}/{split}", [names[raw] for raw in sorted(names)], folder, files, tags)

    def _select(self, rows: np.ndarray) -> None:
        super()._select(rows)
        self._raw_ids, self._sizes = self._raw_ids[rows], self._sizes[rows]

    @property
    def has_masks(self) -> bool:
        return self._mask_folder.is_dir() or self._has_segments

    @property
    def mask_folders(self) -> list[Path]:
        return [self._mask_folder.parent]

    def mask_file(self, i: int) -> Path | None:
        return self._mask_folder / f"{self.id(i)}.png" if self._mask_folder.is_dir() else None

    def open_masks(self) -> None:
        if self._segments is None and not self._mask_folder.is_dir():
            self._segments = {}
            for annotation in _load(self._file)["annotations"]:
                self._segments.setdefault(annotation["image_id"], []).append(annotation)

    def mask(self, i: int) -> np.ndarray:
        if not self.has_masks:
            return super().mask(i)
        if self._mask_folder.is_dir():
            return checked_mask(self._mask_folder / f"{self.id(i)}.png", len(self.class_names))
        self.open_masks()
        height, width = self._sizes[i].tolist()
        annotations = self._segments.get(self._raw_ids[i], [])
        return draw_mask(annotations, height, width, self._class_of, where=self._file, name=self.id(i))


_NEEDED = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "categories": {"id": (int,), "name": (str,)},
    "annotations": {"image_id": (int, str), "category_id": (int,)},
}
_KIND = {(int, str): "a number or a string", (str,): "a string", (int,): "a whole number"}


def _annotation_file(root: Path, split: str) -> Path:
    wanted = [root / "annotations" / f"{split}.json", root / "annotations" / f"instances_{split}.json"]
    for path in wanted:
        if path.is_file():
            return path
    known = sorted(p.stem.removeprefix("instances_") for p in (root / "annotations").glob("*.json"))
    raise UserError(
        f"data: split '{split}' has no annotation file: neither {wanted[0]} nor {wanted[1].name} exists; "
        f"splits found: {', '.join(known) or 'none'}. Correct data.root, data.train_split or data.eval_splits"
    )


def _image_folder(root: Path, split: str) -> Path:
    for folder in (root / "images" / split, root / split):
        if folder.is_dir():
            return folder
    raise UserError(
        f"data: no images of split '{split}': expected the folder {root}/images/{split} or {root}/{split}; "
        "copy the images there, or correct data.root"
    )


def _folder_name(name: Any, path: Path) -> str:
    if isinstance(name, str) and name not in ("", "..") and Path(name).name == name:
        return name
    raise UserError(
        f"data: 'folder' of {path} is {name!r}; expected the name of one folder of images, as train2014: correct it"
    )


def _load(path: Path) -> dict[str, Any]:
    """Parse an annotation file and hold that its three lists are there, with the keys and types every entry needs."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        what = f"is not readable JSON ({error})"
        raise BadFile(path, what, f"data: {path} {what}; download or write it again") from None
    wrong: list[tuple[str, str]] = []  # what, what was expected
    for key, fields in _NEEDED.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            what = f"has no list '{key}'"
            raise BadFile(path, what, f"data: {path} {what}; expected COCO JSON with {', '.join(_NEEDED)}: correct it")
        for k, entry in enumerate(entries):
            for name, kinds in fields.items():
                found = entry.get(name) if isinstance(entry, dict) else entry
                fits = isinstance(entry, dict) and isinstance(found, kinds)
                if not fits or (kinds == (int,) and abs(found) >= 2**63):
                    wrong.append((f"'{name}' of {key}[{k}] is {repr(found):.80}", _KIND[kinds]))
        if key == "images" and not wrong:
            for k, entry in enumerate(entries):
                # a mask is drawn in this size: no larger than a picture may be
                if min(entry["height"], entry["width"]) < 1 or entry["height"] * entry["width"] > MAX_PIXELS:
                    found = f"images[{k}] is {entry['height']:.6g} x {entry['width']:.6g} pixels"
                    wrong.append((found, f"1 to {MAX_PIXELS:,} of them"))
    if wrong:
        what, kind = wrong[0]
        rows = [(str(path), each) for each, _ in wrong]
        raise BadFile(path, what, f"data: {path}: {what}; expected {kind}: correct the entry", rows)
    return content


def _check_categories(categories: list[dict], classes: list[str] | None, path: Path) -> dict[int, str]:
    """Category id -> name, held to be distinct, 1 to 254, and equal to `classes` where given."""
    check_distinct([c["id"] for c in categories], "category ids", path)
    check_distinct([c["name"] for c in categories], "category names", path)
    names = {c["id"]: str(c["name"]) for c in categories}
    if not 1 <= len(names) <= 254:
        what = f"has {len(names)} categories"
        raise BadFile(path, what, f"data: {path} {what}; expected 1 to 254 (255 means ignore in a mask)")
    found = [names[raw] for raw in sorted(names)]
    if classes is not None and classes != found:
        unknown = [name for name in classes if name not in found]
        missing = [name for name in found if name not in classes]
        named = f"not in the file: {unknown}; not in the list: {missing}"
        detail = named if unknown or missing else "the order differs"
        raise UserError(
            f"data.classes does not agree with the categories of {path} ({detail}); "
            "leave data.classes out, or list the names in the order of their ids"
        )
    return names


def _tags(content: dict, names: dict[int, str], class_of: dict[int, int], path: Path) -> np.ndarray:
    """Tags [n, C] uint8, from the images' `labels` or from the annotations' categories."""
    images = content["images"]
    tags = np.zeros((len(images), len(names)), np.uint8)
    wrong: list[BadFile] = []
    if any("labels" in image for image in images):
        by_name = {names[raw]: c for raw, c in class_of.items()}
        for row, image in zip(tags, images, strict=True):
            if not isinstance(image.get("labels"), list):
                what = f"image {image['file_name']} has no list 'labels', though others have one"
                message = f"data: {path}: {what}; give every image one, empty where it has no tag"
                wrong.append(BadFile(path, what, message))
                continue
            for label in image["labels"]:
                known = by_name if isinstance(label, str) else class_of
                _set_tag(row, label, known, image["file_name"], path, wrong)
        # they give no tags here, but a mask is drawn from them
        _set_tags(np.zeros_like(tags), content, class_of, path, wrong)
    else:
        listed = {image["id"] for image in images}
        homeless = [a["image_id"] for a in content["annotations"] if a["image_id"] not in listed]
        if homeless:
            what = f"has {len(homeless)} annotations of images it does not list"
            message = (
                f"data: {path} {what} (first: image ids {homeless[:3]}); expected every 'image_id' under 'images': "
                "remove them, or use the matching file"
            )
            rows = [(str(path), f"an annotation is of image {image}, which is not listed") for image in homeless]
            raise BadFile(path, what, message, rows)
        _set_tags(tags, content, class_of, path, wrong)
    if wrong:
        raise BadFile(path, wrong[0].reason, str(wrong[0]), [(e.path, e.reason) for e in wrong])
    return tags


def _set_tags(tags: np.ndarray, content: dict, class_of: dict[int, int], path: Path, wrong: list[BadFile]) -> None:
    """Set the tags [n, C] of the annotations of listed images."""
    row_of = {image["id"]: k for k, image in enumerate(content["images"])}
    for annotation in content["annotations"]:
        k = row_of.get(annotation["image_id"])
        if k is not None:
            image = content["images"][k]["file_name"]
            _set_tag(tags[k], annotation["category_id"], class_of, image, path, wrong)


def _set_tag(row: np.ndarray, label: Any, known: dict, image: str, path: Path, wrong: list[BadFile]) -> None:
    """Set the tag `label` of an image; one that is not `known` goes to `wrong`."""
    try:
        row[known[label]] = 1
    except (KeyError, TypeError):
        kind = "class name" if isinstance(label, str) else "class id"
        what = f"image {image} has the unknown {kind} {label!r}"
        classes = f"{', '.join(str(k) for k in list(known)[:20])}{', ...' if len(known) > 20 else ''}"
        fix = "correct the entry, or add the class to 'categories'"
        wrong.append(BadFile(path, what, f"data: {path}: {what}; expected one of {classes}: {fix}"))
