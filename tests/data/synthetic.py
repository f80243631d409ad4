"""A tiny COCO-format data set of coloured shapes, written in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from wsss_dist.data.rle import rle_annotation

_COLOURS = ((220, 40, 40), (40, 190, 60), (50, 80, 230), (230, 200, 30), (190, 60, 210), (40, 200, 210))
_SHAPES = ("disc", "square", "triangle")


def write_synthetic_dataset(root: Path, num_train: int, num_val: int, size: int, num_classes: int, seed: int) -> Path:
    """Write splits "train" and "val" of noisy pictures with one or two coloured shapes; a class is a colour and a form.

    The layout is that of `wsss_dist/data/coco.py` with `labels`, masks as PNG and as RLE. Same arguments, same bytes.

    Args:
        root: folder to create.
        num_train, num_val: images of the two splits.
        size: side of the square images in pixels, >= 16.
        num_classes: C, 1 to 18.
        seed: of everything random.
    Returns:
        root, for `data.root` with `data.format: coco`.
    """
    names = [f"{_SHAPES[c % 3]}-{c // 3}" for c in range(num_classes)]
    assert size >= 16 and 1 <= num_classes <= len(_COLOURS) * len(_SHAPES)
    for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for k in range(count):
            rng = np.random.default_rng((seed, number, k))
            image, mask = _scene(rng, size, num_classes, k)
            stem = f"{k:05d}"
            Image.fromarray(image).save(root / "images" / split / f"{stem}.jpg", quality=92)
            Image.fromarray(mask).save(root / "masks" / split / f"{stem}.png")
            present = [int(c) for c in np.unique(mask) if c]
            entry = {"id": k + 1, "file_name": f"{stem}.jpg", "height": size, "width": size}
            images.append({**entry, "labels": [names[c - 1] for c in present]})
            for c in present:
                annotations.append(rle_annotation(len(annotations) + 1, k + 1, c, mask == c))
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": c + 1, "name": name} for c, name in enumerate(names)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def _scene(rng: np.random.Generator, size: int, num_classes: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [size, size, 3] and mask uint8 [size, size]; image k surely holds class k % num_classes, on top."""
    image = np.full((size, size, 3), rng.integers(70, 170), np.uint8)
    mask = np.zeros((size, size), np.uint8)
    others = rng.integers(0, num_classes, rng.integers(0, 2)).tolist()
    for c in [*others, k % num_classes]:
        radius = int(rng.integers(size // 6, size // 4 + 1))
        x, y = (int(v) for v in rng.integers(radius, size - radius, 2))
        shape = np.zeros((size, size), np.uint8)
        if _SHAPES[c % 3] == "disc":
            cv2.circle(shape, (x, y), radius, 1, -1)
        elif _SHAPES[c % 3] == "square":
            cv2.rectangle(shape, (x - radius, y - radius), (x + radius, y + radius), 1, -1)
        else:
            corners = np.array([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)])
            cv2.fillPoly(shape, [corners], 1)
        image[shape == 1] = _COLOURS[c // 3]
        mask[shape == 1] = c + 1
    noisy = image.astype(np.int16) + rng.integers(-25, 26, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), mask
