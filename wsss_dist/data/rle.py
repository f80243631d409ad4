"""Regions to COCO annotations, without pycocotools."""

from __future__ import annotations

import numpy as np


def rle_annotation(annotation_id: int, image_id: int, category_id: int, region: np.ndarray) -> dict:
    """A COCO annotation with uncompressed RLE, box and area of the non-empty bool region [H, W]."""
    flat = region.reshape(-1, order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    ys, xs = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": 0,
        "area": int(region.sum()),
        "bbox": [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)],
        "segmentation": {"size": list(region.shape), "counts": counts},
    }
