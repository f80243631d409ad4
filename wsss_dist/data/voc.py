"""Data sets in the Pascal VOC layout. `data.root` is the folder that holds JPEGImages, or VOCdevkit, or its parent.

    JPEGImages/<name>.jpg
    ImageSets/Segmentation/<split>.txt or ImageSets/Main/<split>.txt    train, train_aug, val, ...
    Annotations/<name>.xml                                              tags: the classes of all objects
    labels.csv                                                          header `image,labels`; read instead of the XML
    SegmentationClass/<name>.png, SegmentationClassAug/<name>.png       masks, for evaluation

Objects marked difficult count as tags, as in the label files that the literature uses. An image with an official mask
is evaluated with that one, others with the mask of SegmentationClassAug (SBD), so `train` never mixes the two. What is
in the images of `test` VOC keeps to itself: where none of them has an XML, nor a row in labels.csv, they are without
tags and masks, for predictions alone; in any other list an image without is an error.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from wsss_dist.data.dataset import Dataset, check_distinct, check_images, checked_mask, existing_root
from wsss_dist.data.folder import read_labels_csv
from wsss_dist.data.problems import LeftOut
from wsss_dist.errors import BadFile, UserError

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


class VocDataset(Dataset):
    """One split of a VOC folder."""

    def __init__(self, root: Path, split: str, classes: list[str] | None, left_out: LeftOut | None = None) -> None:
        self._base = _base(existing_root(root))
        classes = list(VOC_CLASSES) if classes is None else classes
        listed = _split_file(self._base, split)
        names = read_list(listed)
        check_distinct(names, "images", listed)
        check_images(self._base / "JPEGImages", [f"{name}.jpg" for name in names], listed, left_out)
        named = len(names)
        if left_out:
            names = [name for name in names if not self._is_left_out(name, left_out)]
        self._secret = split == "test" and not any(path.exists() for path in map(self._xml, names))
        if (self._base / "labels.csv").is_file():
            tags = _tags_from_csv(self._base / "labels.csv", names, classes, self._secret)
        elif self._secret:
            tags = np.zeros((len(names), len(classes)), np.uint8)
        else:
            tags = _tags_from_xml(self._base / "Annotations", names, classes)
        files = [f"{name}.jpg" for name in names]
        super().__init__(f"{self._base.name}/{split}", classes, self._base / "JPEGImages", files, tags)
        self.unusable = named - len(names)

    def _is_left_out(self, name: str, left_out: LeftOut) -> bool:
        """Is its picture left out, or its XML, without which it has no tags?"""
        return self._base / "JPEGImages" / f"{name}.jpg" in left_out or self._xml(name) in left_out

    def _xml(self, name: str) -> Path:
        return self._base / "Annotations" / f"{name}.xml"

    @property
    def has_masks(self) -> bool:
        return not self._secret and any(folder.is_dir() for folder in self.mask_folders)

    @property
    def mask_folders(self) -> list[Path]:
        return [self._base / name for name in ("SegmentationClass", "SegmentationClassAug")]

    def mask_file(self, i: int) -> Path | None:
        official, augmented = (folder / f"{self.id(i)}.png" for folder in self.mask_folders)
        if not self.has_masks:
            return None
        return augmented if augmented.is_file() and not official.is_file() else official

    def mask(self, i: int) -> np.ndarray:
        path = self.mask_file(i)
        return super().mask(i) if path is None else checked_mask(path, len(self.class_names))


def _base(root: Path) -> Path:
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (base / "JPEGImages").is_dir():
            return base
    raise UserError(
        f"data.root is '{root}', which has no folder JPEGImages, nor VOC2012/JPEGImages, nor "
        "VOCdevkit/VOC2012/JPEGImages; give the folder that the VOC archive was unpacked to"
    )


def read_list(listed: Path) -> list[str]:
    """Names of the images of a list, one a line; a folder before and .jpg behind are dropped, and further columns.

    Raises:
        BadFile: missing, unreadable, or a list of the images of a class, which has -1, 0 or 1 behind every name.
    """
    rows = list_rows(listed)
    judged = next((row for row in rows if len(row) > 1 and row[1] in ("-1", "0", "1")), None)
    if judged is not None:
        what = f"says of each image whether it shows one class ('{' '.join(judged)}'), and is no list of a split"
        raise BadFile(listed, what, f"data: {listed} {what}; expected a name a line: choose another split, as 'train'")
    # SBD's lists name /JPEGImages/<name>.jpg; what else a name has with a dot is its own
    return [row[0].rpartition("/")[2].removesuffix(".jpg") for row in rows]


def list_rows(listed: Path) -> list[list[str]]:
    """The columns of every line of a list of images. Raises BadFile."""
    try:
        text = listed.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        message = f"data: {listed} is missing; unpack the official archive again"
        raise BadFile(listed, "the file is missing", message) from None
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is no text ({error})"
        raise BadFile(listed, what, f"data: {listed} {what}; unpack the archive again") from None
    return [line.split() for line in text.splitlines() if line.strip()]


def _split_file(base: Path, split: str) -> Path:
    for kind in ("Segmentation", "Main"):
        path = base / "ImageSets" / kind / f"{split}.txt"
        if path.is_file():
            return path
    known = sorted(p.stem for p in (base / "ImageSets" / "Segmentation").glob("*.txt"))
    raise UserError(
        f"data: split '{split}' has no list {base}/ImageSets/Segmentation/{split}.txt, nor one under Main; "
        f"splits found: {', '.join(known) or 'none'}. Correct data.train_split or data.eval_splits"
    )


def _tags_from_csv(path: Path, names: list[str], classes: list[str], secret: bool) -> np.ndarray:
    """The rows of a table; those of images that are `secret` may all be missing."""
    listed, tags = read_labels_csv(path, classes)
    row_of = {name.removesuffix(".jpg"): k for k, name in enumerate(listed)}
    missing = [name for name in names if name not in row_of]
    if secret and len(missing) == len(names):
        return np.zeros((len(names), len(classes)), np.uint8)
    if missing:
        what = f"has no row for {len(missing)} images of the split"
        message = (
            f"data: {path} {what} (first: {', '.join(missing[:3])}); add them, with an empty cell where an image has "
            "no label"
        )
        raise BadFile(path, what, message, [(str(path), f"it has no row for {name}") for name in missing])
    return tags[[row_of[name] for name in names]]


def _tags_from_xml(folder: Path, names: list[str], classes: list[str]) -> np.ndarray:
    index = {name: c for c, name in enumerate(classes)}
    tags = np.zeros((len(names), len(classes)), np.uint8)
    wrong: list[BadFile] = []
    for row, name in zip(tags, names, strict=True):
        try:
            row[_classes_of(folder / f"{name}.xml", name, index)] = 1
        except BadFile as error:
            wrong.append(error)
    if wrong:
        raise BadFile(wrong[0].path, wrong[0].reason, str(wrong[0]), [(e.path, e.reason) for e in wrong])
    return tags


def _classes_of(path: Path, name: str, index: dict[str, int]) -> list[int]:
    """The classes of the objects of an XML file. Raises BadFile."""
    try:
        # expat loads no external entity and bounds the growth of internal ones
        objects = ElementTree.parse(path).getroot().findall("object")  # noqa: S314
    except FileNotFoundError:
        message = f"data: {path} is missing, so the tags of {name} are unknown; restore it, or give a labels.csv"
        raise BadFile(path, "the file is missing", message) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise BadFile(path, what, f"data: {path} {what}; unpack the archive again") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of its encoding
        what = f"is not readable XML ({error})"
        raise BadFile(path, what, f"data: {path} {what}; unpack the archive again") from None
    labels = [thing.findtext("name", "").strip() for thing in objects]
    unknown = [label for label in labels if label not in index]
    if unknown:
        what = f"has an object of the unknown class name '{unknown[0]}'"
        fix = f"expected one of {', '.join(index)}: list the names of your data in data.classes"
        raise BadFile(path, what, f"data: {path} {what}; {fix}")
    return [index[label] for label in labels]
