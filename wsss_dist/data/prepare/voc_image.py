"""One image of VOC 2012: its picture, its XML, and its mask from the official PNG or from SBD."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from wsss_dist.data.dataset import checked_mask
from wsss_dist.data.prepare.archives import of_macos
from wsss_dist.data.prepare.coco import encode_mask
from wsss_dist.data.prepare.manifest import (
    LEFT_OUT,
    MISSING,
    Problem,
    check_picture,
    file_record,
    picture_record,
    why_unreadable,
)
from wsss_dist.data.prepare.matfile import MatError, read_mat_field
from wsss_dist.data.prepare.work import stamp_of
from wsss_dist.errors import BadFile
from wsss_dist.files import write_whole


@dataclass(frozen=True)
class Places:
    """out: the prepared folder; base: VOC2012 in it; matlab: folder of SBD's cls files; classes: by id - 1."""

    out: Path
    base: Path
    matlab: Path
    classes: list[str]

    def names(self, folder: str, ending: str) -> set[str]:
        """Names, without the ending, of the files of a folder of VOC2012."""
        return names_in(self.base / folder, ending)

    def shown(self, path: Path) -> str:
        """Path below `out`, or for SBD's files below their folder."""
        return str(path.relative_to(self.out)) if path.is_relative_to(self.base) else f"cls/{path.name}"


def names_in(folder: Path, ending: str) -> set[str]:
    """Names, without the ending, of the files of a folder."""
    return {path.stem for path in folder.iterdir() if path.suffix == ending and not of_macos(path.name)}


def finish_image(places: Places, name: str, official: bool, listed: bool, test: bool) -> dict:
    """Check one image and make its mask in SegmentationClassAug.

    Args:
        name: of the image, without an ending.
        official: it is in a list of VOC's own, so it has to have a mask of VOC's own.
        listed: it is in any list of images with tags and masks.
        test: it is of the test set, which has neither.
    Returns:
        what `finish_items` asks for, and the classes of its tags.
    """
    image, xml = places.base / "JPEGImages" / f"{name}.jpg", places.base / "Annotations" / f"{name}.xml"
    mask, matlab = places.base / "SegmentationClass" / f"{name}.png", places.matlab / f"{name}.mat"
    stamp = stamp_of([image, xml, mask, matlab])
    record, picture, problems = check_picture(image, places.shown(image))
    files = {} if record is None else {places.shown(image): record}
    size = None if picture is None else picture.shape
    tags = [] if test and not xml.exists() else _check_xml(places, xml, size, listed, files, problems)
    made = places.base / "SegmentationClassAug" / f"{name}.png"
    content = _mask(places, mask, matlab, size, official, files, problems)
    if content is None and listed and not (official or mask.is_file() or matlab.is_file()):
        problems.append((places.shown(mask), "error", "there is no mask, nor one of SBD", LEFT_OUT))
    if content is None:
        made.unlink(missing_ok=True)
    else:
        pixels, record = content
        made.parent.mkdir(parents=True, exist_ok=True)
        write_whole(made, pixels)
        files[places.shown(made)] = record
    return {"stamp": stamp, "files": files, "problems": problems, "tags": tags}


def _mask(
    places: Places, mask: Path, matlab: Path, size: tuple | None, official: bool, files: dict, problems: list[Problem]
) -> tuple[bytes, dict] | None:
    """Bytes and record of the mask of an image of `size` (None: unknown); None where there is none to be had."""
    try:
        if mask.is_file():
            path, content = mask, mask.read_bytes()
            values = checked_mask(mask, len(places.classes))
            mode = Image.open(io.BytesIO(content)).mode
            files[places.shown(mask)] = picture_record(content, values.shape[1], values.shape[0], mode)
        elif official:
            problems.append((places.shown(mask), "error", "the official mask is missing", LEFT_OUT))
            return None
        elif matlab.is_file():
            path, values = matlab, _sbd_ids(matlab, len(places.classes))
            content, mode = encode_mask(values), "P"
        else:
            return None
    except (BadFile, MatError, OSError) as error:
        reason = error.reason if isinstance(error, BadFile) else why_unreadable(error)
        problems.append((places.shown(mask if mask.is_file() else matlab), "error", reason, LEFT_OUT))
        return None
    if size is not None and values.shape != size:
        reason = "{} x {} pixels (height, width), the image as the loader reads it {} x {}"
        problems.append((places.shown(path), "error", reason.format(*values.shape, *size), LEFT_OUT))
        return None
    return content, picture_record(content, values.shape[1], values.shape[0], mode)


def _sbd_ids(path: Path, classes: int) -> np.ndarray:
    ids = read_mat_field(path.read_bytes(), "GTcls", "Segmentation")
    if ids.size == 0:
        raise MatError("GTcls.Segmentation is empty")
    wrong = np.unique(ids[(ids < 0) | (ids > classes) | (ids != np.floor(ids))])
    if len(wrong):
        raise MatError(f"GTcls.Segmentation holds the ids {wrong[:5].tolist()}; expected 0..{classes}")
    return np.ascontiguousarray(ids.astype(np.uint8))


def _check_xml(
    places: Places, path: Path, size: tuple | None, listed: bool, files: dict, problems: list[Problem]
) -> list[int]:
    """The classes of the objects; what is wrong goes to `problems`."""
    shown = places.shown(path)
    try:
        content = path.read_bytes()
        files[shown] = file_record(content)
        # expat loads no external entity and bounds the growth of internal ones
        root = ElementTree.fromstring(content)  # noqa: S314
    except FileNotFoundError:
        kind, effect = ("error", LEFT_OUT) if listed else ("note", "without tags")
        problems.append((shown, kind, MISSING, effect))
        return []
    except OSError as error:
        problems.append((shown, "error", why_unreadable(error), LEFT_OUT))
        return []
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        problems.append((shown, "error", f"not readable XML ({error})", LEFT_OUT))
        return []
    tags = set()
    for k, thing in enumerate(root.findall("object"), 1):
        label = thing.findtext("name", "").strip()
        if label not in places.classes:
            problems.append((shown, "error", f"object {k} is of the unknown class '{label}'", LEFT_OUT))
            continue
        tags.add(places.classes.index(label))
        remark = _box_remark(thing, size)
        if remark:
            problems.append((shown, "note", f"{remark} (object {k}, {label})", "its tag counts all the same"))
    return sorted(tags)


def _box_remark(thing: ElementTree.Element, size: tuple | None) -> str | None:
    """What is odd about the box of an object in an image of `size` (height, width); pixels count from 1."""
    try:
        left, top, right, bottom = (float(thing.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        return "box without four numbers"
    if right <= left or bottom <= top:
        return "empty box"
    if size is not None and (right > size[1] or bottom > size[0] or left < 0 or top < 0):
        return "box beyond the image"
    return None
