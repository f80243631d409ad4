"""Index masks from COCO annotations: the reader draws them when asked, `prepare_data.py coco` draws each once.

Where objects overlap the smaller one, by its pixels, is on top: of two objects the smaller mostly lies in front of the
other or inside it (a cup on a table). Of equal ones the later is on top. A crowd region (iscrowd = 1) is 255 (ignore)
where no single object is: its outline encloses what lies between the objects too, so neither its class nor background
would be right there. Objects annotated one by one keep their class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wsss_dist.errors import BadFile, UserError


def draw_mask(
    annotations: list[dict], height: int, width: int, class_of: dict[int, int], *, where: Path, name: str
) -> np.ndarray:
    """The mask of one image, uint8 [height, width]: 0 background, 1..C classes, 255 ignore.

    Args:
        annotations: those of the image, in the order of the file.
        class_of: category id -> class 0..C-1.
        where, name: file of the annotations and name of the image, for messages.
    Raises:
        BadFile: a segmentation that is no polygon and no RLE, or of another size; `iscrowd` that is not 0 or 1.
    """
    coco_mask = _pycocotools()
    regions = []
    for annotation in annotations:
        crowd, runs = _is_crowd(annotation, where, name), _runs_of(annotation, height, width, where, name)
        if runs is not None:
            regions.append((crowd, int(coco_mask.area(runs)), annotation, runs))
    mask = np.zeros((height, width), np.uint8)
    # large objects first, so that small ones lie on top of them; crowds only where no single object is
    for crowd, _, annotation, runs in sorted(regions, key=lambda r: (r[0], -r[1])):
        region = coco_mask.decode(runs).astype(bool)  # one at a time: a large picture has hundreds
        if crowd:
            mask[region & (mask == 0)] = 255
        else:
            mask[region] = class_of[annotation["category_id"]] + 1
    return mask


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("data: drawing masks from annotations needs pycocotools: pip install pycocotools") from None
    return mask


def _is_crowd(annotation: dict, where: Path, name: str) -> bool:
    found = annotation.get("iscrowd", 0)
    if not isinstance(found, int) or found not in (0, 1):
        what = f"the 'iscrowd' of an annotation of {name} is {found!r:.80}"
        raise BadFile(where, what, f"data: {where}: {what}; expected 0 or 1: correct the entry")
    return bool(found)


def _runs_of(annotation: dict, height: int, width: int, where: Path, name: str) -> dict | None:
    """One annotation as an RLE of pycocotools, from polygons, compressed and uncompressed RLE; None: it is empty."""
    coco_mask = _pycocotools()
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            # fewer than three corners enclose nothing
            corners = [_corners(p, height, width) for p in shape if len(p) >= 6]
            polygons = [coco_mask.frPyObjects([p], height, width)[0] for p in corners]
            return coco_mask.merge(polygons) if polygons else None
        if list(shape["size"]) != [height, width]:
            what = f"a mask of {name} is {shape['size']} (height, width), the image {[height, width]}"
            raise BadFile(where, what, f"data: {where}: {what}; expected the same size: write the annotation again")
        counts = shape["counts"] if isinstance(shape["counts"], list) else _runs(shape["counts"])
        if sum(counts) != height * width or min(counts) < 0 or not all(type(n) is int for n in counts):
            raise ValueError(f"its counts add up to {sum(counts)}, not to {height} x {width}")
        rle = {"size": [height, width], "counts": counts}
        return coco_mask.frPyObjects(rle, height, width)
    except BadFile:
        raise
    except Exception as error:  # pycocotools raises many kinds on a malformed outline
        what = f"the 'segmentation' of an annotation of {name} is no polygon and no RLE ({error})"
        raise BadFile(where, what, f"data: {where}: {what}; write the annotation again") from None


# pycocotools does not check polygons: one with a corner far off ends the process, or takes all the memory there is


def _corners(polygon: list, height: int, width: int) -> list[float]:
    """The coordinates of a polygon. Raises ValueError where they are no numbers, or far from the image."""
    most = 4 * max(height, width)
    if not all(isinstance(x, int | float) and abs(x) <= most for x in polygon):
        raise ValueError(f"a corner lies further off than {most} pixels, or is no number")
    return polygon


def _runs(text: str | bytes) -> list[int]:
    """The run lengths of a compressed RLE: groups of five bits, lowest first, from the third run on as differences."""
    counts: list[int] = []
    value = bits = 0
    for letter in text.encode("latin-1") if isinstance(text, str) else text:
        group = letter - 48
        if not 0 <= group < 64 or bits > 30:
            raise ValueError(f"its counts hold the byte {letter}")
        value |= (group & 31) << bits
        bits += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << bits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("its counts end in the middle")
    return counts
