"""Index masks from COCO annotations: the reader draws them when asked, `prepare_data.py coco` draws each once.

Where objects overlap the smaller one, by its pixels, is on top: of two objects the smaller mostly lies in front of the
other or inside it (a cup on a table). Of equal ones the later is on top. A crowd region (iscrowd = 1) is 255 (ignore)
where no single object is: its outline encloses what lies between the objects too, so neither its class nor background
would be right there. Objects annotated one by one keep their class.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsss_dist.errors import UserError


def draw_mask(
    annotations: list[dict], height: int, width: int, class_of: dict[int, int], *, where: Path, name: str
) -> np.ndarray:
    """The mask of one image, uint8 [height, width]: 0 background, 1..C classes, 255 ignore.

    Args:
        annotations: those of the image, in the order of the file.
        class_of: category id -> class 0..C-1.
        where, name: file of the annotations and name of the image, for messages.
    Raises:
        UserError: a segmentation that is no polygon and no RLE, or of another size.
    """
    regions = []
    for annotation in annotations:
        region = _region(annotation, height, width, where, name)
        regions.append((bool(annotation.get("iscrowd", 0)), int(np.count_nonzero(region)), annotation, region))
    mask = np.zeros((height, width), np.uint8)
    # large objects first, so that small ones lie on top of them; crowds only where no single object is
    for crowd, _, annotation, region in sorted(regions, key=lambda r: (r[0], -r[1])):
        if crowd:
            mask[region & (mask == 0)] = 255
        else:
            mask[region] = class_of[annotation["category_id"]] + 1
    return mask


def _region(annotation: dict, height: int, width: int, where: Path, name: str) -> np.ndarray:
    """One annotation as bool [height, width]; polygon lists, compressed and uncompressed RLE."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError:
        raise UserError("data: drawing masks from annotations needs pycocotools: pip install pycocotools") from None
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            # fewer than three corners enclose nothing
            polygons = [coco_mask.frPyObjects([p], height, width)[0] for p in shape if len(p) >= 6]
            if not polygons:
                return np.zeros((height, width), bool)
            return coco_mask.decode(coco_mask.merge(polygons)).astype(bool)
        if list(shape["size"]) != [height, width]:
            raise UserError(
                f"data: {where}: a mask of {name} is {shape['size']} (height, width), the image {[height, width]}; "
                "expected the same size: write the annotation again"
            )
        if not isinstance(shape["counts"], list):
            return coco_mask.decode(shape).astype(bool)
        if sum(shape["counts"]) != height * width or min(shape["counts"]) < 0:
            raise ValueError(f"its counts add up to {sum(shape['counts'])}, not to {height} x {width}")
        return coco_mask.decode(coco_mask.frPyObjects(shape, height, width)).astype(bool)
    except UserError:
        raise
    except Exception as error:  # pycocotools raises many kinds on a malformed outline
        raise UserError(
            f"data: {where}: the 'segmentation' of an annotation of {name} is no polygon and no RLE ({error}); "
            "write the annotation again"
        ) from None
