"""The simplest data set to make by hand: one folder per split.

    root/classes.txt               one class name per line, in the order of the ids 1..C (or data.classes in the config)
    root/<split>/images/*.jpg
    root/<split>/labels.csv        header `image,labels`; then e.g. `cat1.jpg,cat;sofa`; no label: the cell is empty
    root/<split>/masks/<stem>.png  optional, for evaluation: 0 background, 1..C classes, 255 ignore

The pictures of a split are the rows of its labels.csv, in that order.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from wsss_dist.data.dataset import Dataset, check_distinct, check_images, checked_mask, existing_root
from wsss_dist.data.problems import LeftOut
from wsss_dist.errors import BadFile, UserError


class FolderDataset(Dataset):
    """One split of such a folder."""

    def __init__(self, root: Path, split: str, classes: list[str] | None, left_out: LeftOut | None = None) -> None:
        existing_root(root)
        if classes is None:
            classes = read_classes(root / "classes.txt")
        folder = root / split
        if not (folder / "labels.csv").is_file():
            known = sorted(p.parent.name for p in root.glob("*/labels.csv"))
            raise UserError(
                f"data: split '{split}' has no file {folder}/labels.csv; splits found: {', '.join(known) or 'none'}. "
                "Correct data.root, data.train_split or data.eval_splits"
            )
        files, tags = read_labels_csv(folder / "labels.csv", classes)
        check_images(folder / "images", files, folder / "labels.csv", left_out)
        self._mask_folder = folder / "masks"
        super().__init__(f"{root.name}/{split}", classes, folder / "images", files, tags)

    @property
    def has_masks(self) -> bool:
        return self._mask_folder.is_dir()

    @property
    def mask_folders(self) -> list[Path]:
        return [self._mask_folder]

    def mask_file(self, i: int) -> Path | None:
        return self._mask_folder / f"{self.id(i)}.png" if self.has_masks else None

    def mask(self, i: int) -> np.ndarray:
        path = self.mask_file(i)
        return super().mask(i) if path is None else checked_mask(path, len(self.class_names))


def read_labels_csv(path: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    """Read a `labels.csv`.

    Args:
        path: file with the header `image,labels`; labels are separated by semicolons.
        classes: the C known names.
    Returns:
        the image names in file order, and their tags, uint8 [n, C].
    Raises:
        BadFile: no such header, a row without an image, an unknown class name, an image named twice, text that is not
            UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        what = f"is not a CSV file in UTF-8 ({error})"
        raise BadFile(path, what, f"data: {path} {what}; save it as such") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if header != ["image", "labels"]:
        what = f"its first line is '{','.join(header)}'"
        message = f"data: the first line of {path} is '{','.join(header)}'; expected the header 'image,labels': add it"
        raise BadFile(path, what, message)
    index = {name: c for c, name in enumerate(classes)}
    tags = np.zeros((len(rows) - 1, len(classes)), np.uint8)
    wrong: list[tuple[str, str]] = []  # reason, the whole sentence
    for k, row in enumerate(rows[1:]):
        if len(row) != 2:
            what, fix = f"has {len(row)} cells", "the image and its labels separated by semicolons: correct the row"
            wrong.append((f"row {k + 2} {what}", f"data: row {k + 2} of {path} {what}; expected two, {fix}"))
            continue
        if not row[0].strip():
            what = "names no image"
            wrong.append(
                (f"row {k + 2} {what}", f"data: row {k + 2} of {path} {what}; expected one, as a.jpg: correct the row")
            )
            continue
        for label in filter(None, (part.strip() for part in row[1].split(";"))):
            if label in index:
                tags[k, index[label]] = 1
                continue
            what = f"image {row[0]} has the unknown class name '{label}'"
            known = f"{', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}"
            fix = "correct the row, or add the class to classes.txt or data.classes"
            wrong.append((what, f"data: {path}: {what}; expected one of {known}: {fix}"))
    if wrong:
        raise BadFile(path, wrong[0][0], wrong[0][1], [(str(path), what) for what, _ in wrong])
    files = [row[0].strip() for row in rows[1:]]
    check_distinct(files, "images", path)
    return files, tags


def read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"data: the class names are unknown: {path} does not exist and data.classes is not set; give one of them"
        )
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        what = f"is no text in UTF-8 ({error})"
        raise BadFile(path, what, f"data: {path} {what}; save it as such") from None
    check_distinct(names, "class names", path)
    if not 1 <= len(names) <= 254:
        what = f"has {len(names)} class names"
        raise BadFile(path, what, f"data: {path} {what}; expected 1 to 254 (255 means ignore in a mask)")
    return names
