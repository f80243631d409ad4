"""The samples of runs that exist: the same bits as before there were maps and the augmentation of P-NOC."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data.prepare.shards import prepare_shards

CASES = {
    "crop": {},
    "photometric": {"photometric": True, "scale": (0.6, 1.7)},
    "squash": {"augment": "squash"},
    "squash photometric": {"augment": "squash", "photometric": True},
    "no flip": {"flip": False, "crop": 56},
}
# Recorded at commit c696c99. Ids, boxes, mirror flags and tags hold everywhere; the pixels where the versions below
# decode, resize and change colours as they did there (the kernels of torch without AVX2 round in another way).
VERSIONS = ("2.14", "0.29")
PICTURES = "1578e8fe24d15d33"
PLACES = {
    "crop": "7d454f075f572c81",
    "photometric": "d5158611d33ff616",
    "squash": "38e0e6577912c27a",
    "squash photometric": "38e0e6577912c27a",
    "no flip": "11223ab505e90344",
}
PIXELS = {
    "crop": "3168f1fbd12e4b9e",
    "photometric": "3733d7e212f928dd",
    "squash": "095be20eb0e743ee",
    "squash photometric": "ed4a45f5318a2124",
    "no flip": "72b1d95b667b0019",
}


# The pictures of the set, decoded by Pillow alone: other versions of its decoder give other pixels. A change of our own
# decoder is none of theirs, and has to fail below.
def pictures(place: tuple[Path, str]) -> str:
    root = place[0] if place[1] == "coco" else place[0].parent
    files = sorted((root / "images/train").iterdir())
    return digest(*(np.asarray(Image.open(file).convert("RGB")).tobytes() for file in files))


@pytest.fixture(scope="module", params=["coco", "shards"])
def place(request, tmp_path_factory) -> tuple[Path, str]:
    """Folder and format: the recorded samples are those of the files and of shards made from them."""
    root = write_synthetic_dataset(tmp_path_factory.mktemp("same") / "set", 10, 1, 48, 3, seed=0)
    if request.param == "coco":
        return root, "coco"
    prepare_shards(f"coco:{root}", "train", root / "s", size=5000, masks=False, classes=None, say=lambda line: None)
    return root / "s", "shards"


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def batches(place: tuple[Path, str], case: str) -> list:
    cfg = sets.config(*place, **{"crop": 32, **CASES[case]})
    loader = build_train_loader(
        build_dataset(cfg, "train"),
        cfg,
        seed=5,
        global_batch=4,
        micro_batch=4,
        rank=0,
        world_size=1,
        start_step=0,
        num_steps=6,
    )
    return [batch for (batch,) in loader]


@pytest.mark.parametrize("case", CASES)
def test_places(place, case):
    seen = [[b.ids, b.boxes.tolist(), b.flipped.tolist(), b.labels.int().tolist()] for b in batches(place, case)]
    assert digest(repr(seen).encode()) == PLACES[case]


@pytest.mark.parametrize("case", CASES)
def test_pixels(place, case):
    versions = tuple(".".join(module.__version__.split(".")[:2]) for module in (torch, torchvision))
    known = versions == VERSIONS and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not known or pictures(place) != PICTURES:
        pytest.skip("recorded with other versions of torch, torchvision or Pillow, or on another kind of CPU")
    assert digest(*(batch.images.numpy().tobytes() for batch in batches(place, case))) == PIXELS[case]
