"""The corpus of damaged files: no crash, no hang, every change found by its SHA-256, every refusal in the summary.

WSSS_CORPUS=5000 takes so many images, and two fifths as many masks and lists; the suite takes some hundred.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.data.damage import JPEG, MASK, PNG, jpeg_segments, png_chunks, png_of
from tests.data.damaged import corpus, mask_of, pictures
from tests.data.damaged_lists import READERS, run_lists
from tests.data.test_damaged import png_header
from wsss_dist.data.coco_masks import _runs, draw_mask
from wsss_dist.data.decode import DamagedImage, read_image
from wsss_dist.errors import UserError

COUNT = int(os.environ.get("WSSS_CORPUS", "300"))
WORKERS = (os.cpu_count() or 1) if COUNT > 1000 else 0


def test_pictures_and_masks(tmp_path):
    found = corpus(tmp_path, COUNT, COUNT * 2 // 5, workers=WORKERS)
    for name, files in (("images", COUNT), ("masks", COUNT * 2 // 5)):
        count = found[name]
        assert count.crashes == [] and count.hangs == []
        assert count.files == count.found_by_hash == files == count.refused + count.same_pixels + count.other_pixels
        # both happen, so the corpus is worth something
        assert count.refused > files // 3 and count.other_pixels > files // 50
        print(f"{name}: {count}")
    assert found["hash_missed"] == [] and found["preparation_differs"] == []


def test_lists_and_annotations(tmp_path):
    count = max(COUNT * 2 // 5, 10 * len(READERS))
    found = run_lists(tmp_path, count)
    assert found["crashes"] == [] and found["hangs"] == [] and found["hash_missed"] == []
    assert sum(sum(kinds.values()) for kinds in found["kinds"].values()) == count
    assert all(kinds["refused"] for kinds in found["kinds"].values())
    print(found)


def test_the_corpus_is_the_same_every_time():
    for one, two in zip(pictures(10, None, 3), pictures(10, None, 3), strict=True):
        assert one == two
        table = JPEG if one[0] == ".jpg" else PNG
        for kind, damage in table.items():
            first, again = (damage(np.random.default_rng(5), one[1]) for _ in range(2))
            assert first == again, kind
    mask = mask_of(np.random.default_rng(0), 1)
    assert all(d(np.random.default_rng(1), mask) == d(np.random.default_rng(1), mask) for d in MASK.values())
    assert png_of(png_chunks(mask)) == mask and jpeg_segments(pictures(1, None, 0)[0][1])[-1][0] == 0xDA


@pytest.mark.parametrize("size", [(2**31 - 1, 1000), (9000, 9000), (30000, 2000)])
def test_a_bomb_is_refused_from_its_header(size):
    content = png_header(*size)
    begin = time.process_time()
    for _ in range(5):
        with pytest.raises(DamagedImage, match="pixels"):
            read_image("x.png", content)
    # 50 ms each is what is asked for; it takes less than one, and a machine may be slow
    assert (time.process_time() - begin) / 5 < 0.05


def test_a_jpeg_that_claims_more_than_its_bytes_can_hold():
    whole = pictures(1, None, 0)[0][1]
    begin = next(s[1] for s in jpeg_segments(whole) if s[0] in (0xC0, 0xC2))
    claimed = whole[: begin + 5] + (60000).to_bytes(2, "big") + (1000).to_bytes(2, "big") + whole[begin + 9 :]
    with pytest.raises(DamagedImage, match=r"claims 1000 x 60000 pixels, which \d+ bytes of JPEG cannot hold"):
        read_image("x.jpg", claimed)


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "quality": 1})]
)
def test_the_emptiest_pictures_are_still_read(form, options, colour):
    import io

    from PIL import Image

    for mode in ("1", "L", "RGB") if form == "PNG" else ("L", "RGB"):
        out = io.BytesIO()
        Image.new(mode, (2000, 2000), colour).save(out, form, optimize=True, **options)
        assert read_image("x", out.getvalue()).shape == (2000, 2000, 3)


# ---------------------------------------------------------------------- outlines that would break pycocotools' memory


def drawn(segmentation, size=(20, 30)) -> np.ndarray:
    return draw_mask([{"category_id": 1, "segmentation": segmentation}], *size, {1: 0}, where="x.json", name="a")


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 1e30, 10, 2, 10, 8, 2, 8]],
        [[2, float("nan"), 10, 2, 10, 8]],
        [[2, -1e9, 10, 2, 10, 8]],
        [[2, "3", 10, 2, 10, 8]],
        {"size": [20, 30], "counts": "o"},
        {"size": [20, 30], "counts": "QQQQQQQQQQQQQQQQQQ"},
        {"size": [20, 30], "counts": "Pl"},
        {"size": [20, 30], "counts": ""},
        {"size": [20, 30], "counts": "é00"},
        {"size": [20, 30], "counts": [600.0]},
        {"size": [20, 30], "counts": 600},
    ],
)
def test_an_outline_that_cannot_be(segmentation):
    with pytest.raises(UserError, match="x.json: the 'segmentation' of an annotation of a is no polygon and no RLE"):
        drawn(segmentation)


def test_compressed_rle_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    for k in range(60):
        height, width = (int(x) for x in rng.integers(1, 60, 2))
        region = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        if k % 3 == 0:
            region = np.kron(region, np.ones((9, 7), np.uint8))
        counts = coco_mask.encode(np.asfortranarray(region))["counts"]
        flat = region.reshape(-1, order="F")
        edges = np.flatnonzero(np.diff(flat, prepend=0))
        assert _runs(counts) == np.diff([0, *edges, flat.size]).tolist()
        assert (drawn({"size": list(region.shape), "counts": counts.decode()}, region.shape) == region).all()
