"""Masks as they are stored, ids of every depth, and as they are drawn, objects that overlap."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data import sets
from wsss_dist.data import build_dataset
from wsss_dist.data.coco_masks import draw_mask
from wsss_dist.data.dataset import checked_mask
from wsss_dist.data.decode import read_channel
from wsss_dist.errors import BadFile, UserError

GREY, PALETTE = 0, 3


def png(ids: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG of ids [H, W], written from its standard alone, not by the library that reads it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    # the bits of each number, highest first; rows begin at a byte and have the filter 0
    bits = np.unpackbits(ids[:, :, None], axis=2)[:, :, 8 - depth :].reshape(len(ids), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, colour, 0, 0, 0))]
    if colour == PALETTE:
        # colours that are no ids, and two ids of one colour
        colours = np.random.default_rng(0).integers(0, 256, (2**depth, 3), np.uint8)
        colours[1] = colours[0]
        parts.append(chunk(b"PLTE", colours.tobytes()))
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("colour", [GREY, PALETTE])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_ids_are_those_that_are_stored_whatever_the_depth(depth, colour, tmp_path):
    # 13 columns end in the middle of a byte
    ids = np.random.default_rng(depth).integers(0, 2**depth, (7, 13), np.uint8)
    ids[0, : min(13, 2**depth)] = np.arange(min(13, 2**depth))
    path = tmp_path / "mask.png"
    path.write_bytes(png(ids, depth, colour))
    assert (checked_mask(path, 254) == ids).all()
    assert (read_channel(path, ("L", "P", "1")) == ids).all()


def test_brightness_of_few_bits_reaches_white(tmp_path):
    path = tmp_path / "saliency.png"
    path.write_bytes(png(np.array([[0, 5, 15]], np.uint8), 4, GREY))
    assert read_channel(path, ("L",)).tolist() == [[0, 85, 255]]


def pgm(kind: bytes, data: bytes, most: bytes) -> bytes:
    return kind + b" 2 2 " + most + b"\n" + data


def tiff(white: int) -> bytes:
    """A grey TIFF with the ids 0 to 3 whose `white` is 0 (the greatest number) or 1 (zero)."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).save(buffer, "TIFF", tiffinfo={262: 1 - white})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [pgm(b"P5", bytes(range(4)), b"15"), pgm(b"P2", b"0 1 2 3", b"15"), b"P4 2 2\n\x80\x40", tiff(white=1)],
    ids=["PGM", "plain PGM", "PBM", "TIFF"],
)
def test_a_file_whose_numbers_come_out_changed_is_refused(content, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    with pytest.raises(BadFile, match="mask.png cannot be read .*not ids; expected a PNG.*write it again"):
        checked_mask(path, 20)


@pytest.mark.parametrize("content", [pgm(b"P5", bytes(range(4)), b"255"), tiff(white=0)], ids=["PGM", "TIFF"])
def test_a_file_without_loss_whose_numbers_are_ids_is_read(content, tmp_path):
    Path(tmp_path / "mask.png").write_bytes(content)
    assert checked_mask(tmp_path / "mask.png", 20).tolist() == [[0, 1], [2, 3]]


# ------------------------------------------------------------------------------------------------------------ drawn


def drawn(annotations: list[dict], height: int, width: int) -> np.ndarray:
    return draw_mask(annotations, height, width, {k: k - 1 for k in range(1, 9)}, where=Path("x.json"), name="a")


def reference(annotations: list[dict], height: int, width: int) -> np.ndarray:
    """What a mask is: every region whole, painted from the largest to the smallest, of equal ones the later on top."""
    regions = []
    for annotation in annotations:
        shape, region = annotation["segmentation"], np.zeros((height, width), bool)
        if isinstance(shape, dict):
            flat = np.repeat(np.arange(len(shape["counts"])) % 2, shape["counts"])
            region = flat.reshape(width, height).T.astype(bool)
        else:
            for polygon in shape:
                region |= coco_mask.decode(coco_mask.frPyObjects([polygon], height, width))[:, :, 0].astype(bool)
        regions.append((annotation["iscrowd"], int(region.sum()), annotation["category_id"], region))
    mask = np.zeros((height, width), np.uint8)
    for crowd, _, category, region in sorted(regions, key=lambda r: (r[0], -r[1])):
        mask[region & (mask == 0) if crowd else region] = 255 if crowd else category
    return mask


def shapes(rng: np.random.Generator, height: int, width: int, count: int) -> list[dict]:
    """Annotations that overlap: polygons of one or two parts, also over the edge, RLEs, squares of one size, crowds."""
    found = []
    for k in range(count):
        kind = rng.integers(0, 3)
        if kind == 0:
            parts = rng.uniform(-5, max(height, width) + 5, (rng.integers(1, 3), 2 * rng.integers(3, 7))).round(1)
            shape = parts.tolist()
        elif kind == 1:
            x, y = (int(v) for v in rng.integers(0, (width - 8, height - 8)))
            shape = [[x, y, x + 8, y, x + 8, y + 8, x, y + 8]]
        else:
            edges = np.sort(rng.integers(0, height * width + 1, 6)).tolist()
            shape = {"size": [height, width], "counts": np.diff([0, *edges, height * width]).tolist()}
        crowd = int(rng.random() < 0.2)
        found.append({"category_id": 1 + k % 8, "iscrowd": crowd, "segmentation": shape})
    return found


@pytest.mark.parametrize("seed", range(30))
def test_objects_that_overlap_are_painted_as_the_reference_says(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(20, 60, 2))
    annotations = shapes(rng, height, width, 12)
    assert (drawn(annotations, height, width) == reference(annotations, height, width)).all()


def test_the_memory_of_a_mask_does_not_grow_with_its_objects():
    side = 500
    tracemalloc.start()
    try:
        drawn(shapes(np.random.default_rng(0), side, side, 60), side, side)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # the mask, a region as numbers and as bool, and what indexing with it takes; 60 of them when all were held
    assert peak < 8 * side * side


@pytest.mark.parametrize("found", ["0", None, 2, 0.0, [1]])
def test_a_crowd_is_0_or_1(found, tmp_path):
    root = sets.rewrite(sets.write_coco(tmp_path), lambda c: c["annotations"][0].update(iscrowd=found))
    message = "train.json: the 'iscrowd' of an annotation of 007 is .*; expected 0 or 1: correct the entry"
    with pytest.raises(UserError, match=message):
        build_dataset(sets.config(root), "train").mask(0)
