"""Data sets in the Pascal VOC layout. `data.root` is the folder that holds JPEGImages, or VOCdevkit, or its parent.

    JPEGImages/<name>.jpg
    ImageSets/Segmentation/<split>.txt or ImageSets/Main/<split>.txt    train, train_aug, val, ...
    Annotations/<name>.xml                                              tags: the classes of all objects
    labels.csv                                                          header `image,labels`; read instead of the XML
    SegmentationClass/<name>.png, SegmentationClassAug/<name>.png       masks, for evaluation

Objects marked difficult count as tags, as in the label files that the literature uses. An image with an official mask
is evaluated with that one, others with the mask of SegmentationClassAug (SBD), so `train` never mixes the two.
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
        names = _names(listed)
        check_distinct(names, "images", listed)
        check_images(self._base / "JPEGImages", [f"{name}.jpg" for name in names], listed, left_out)
        named = len(names)
        if left_out:
            names = [name for name in names if not self._is_left_out(name, left_out)]
        if (self._base / "labels.csv").is_file():
            tags = _tags_from_csv(self._base / "labels.csv", names, classes)
        else:
            tags = _tags_from_xml(self._base / "Annotations", names, classes)
        files = [f"{name}.jpg" for name in names]
        super().__init__(f"{self._base.name}/{split}", classes, self._base / "JPEGImages", files, tags)
        self.unusable = named - len(names)

    def _is_left_out(self, name: str, left_out: LeftOut) -> bool:
        """Is its picture left out, or its XML, without which it has no tags?"""
        picture, xml = self._base / "JPEGImages" / f"{name}.jpg", self._base / "Annotations" / f"{name}.xml"
        return picture in left_out or xml in left_out

    @property
    def has_masks(self) -> bool:
        return any(folder.is_dir() for folder in self.mask_folders)

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


def _names(listed: Path) -> list[str]:
    """Names of the images of a list."""
    try:
        text = listed.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"is no text ({error})"
        raise BadFile(listed, what, f"data: {listed} {what}; unpack the archive again") from None
    return [Path(line.split()[0]).stem for line in text.splitlines() if line.strip()]


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


def _tags_from_csv(path: Path, names: list[str], classes: list[str]) -> np.ndarray:
    listed, tags = read_labels_csv(path, classes)
    row_of = {name.removesuffix(".jpg"): k for k, name in enumerate(listed)}
    missing = [name for name in names if name not in row_of]
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
