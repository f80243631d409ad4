"""Regions that were mined: written and read back, erased in training exactly, refused where they do not belong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from tests.data.test_damaged import damage
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data.erased import (
    StoreManifest,
    UnfitRegions,
    load_regions,
    read_manifest,
    regions_writer,
    write_manifest,
)
from wsss_dist.data.transforms import MEAN, STD
from wsss_dist.errors import UserError

COLOUR = [101.5, 77.25, 130.125]
SIZES = {"seed": 0, "global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start_step": 0, "num_steps": 3}


def write(path, labels, regions):
    with open(path, "wb") as file:
        regions_writer(np.array(labels), regions)(file)


def own_regions(image):
    """Where an image is bright, and its left column: differs from image to image and from its mirror image."""
    found = image[..., 0] > 140
    found[:, 0] = True
    return found


class Store:
    """A data set of pictures of 40 x 40 with one region for each tag."""

    def __init__(self, folder):
        self.root = write_synthetic_dataset(folder / "set", 12, 3, 40, 3, seed=0)
        self.folder = folder / "regions/out/train"
        self.folder.mkdir(parents=True)
        data = self.data()
        for i in range(len(data)):
            tags = np.flatnonzero(data.tags[i])
            write(self.folder / f"{data.id(i)}.npz", tags, np.stack([own_regions(data.image(i))] * len(tags)))
        self.manifest = StoreManifest(data.digest(), data.class_names, COLOUR, {"rule": "quantile"}, [0.05])
        write_manifest(self.folder, self.manifest)

    def data(self, **changes):
        return build_dataset(sets.config(self.root, **changes), "train")

    def loader(self, **changes):
        maps = {"erased": {"dir": str(self.folder), "kind": "erased"}}
        cfg = sets.config(self.root, **{"augment": "squash", "crop": 40, "maps": maps, **changes})
        return build_train_loader(build_dataset(cfg, "train"), cfg, **SIZES)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (13, 31)])
def test_bits_there_and_back(tmp_path, size):
    regions = np.random.default_rng(0).random((3, *size)) < 0.4
    write(tmp_path / "a.npz", [0, 4, 5], regions)
    labels, found = load_regions(tmp_path / "a.npz", 6)
    assert labels.tolist() == [0, 4, 5] and found.dtype == bool and (found == regions).all()
    with np.load(tmp_path / "a.npz") as file:
        assert file["bits"].shape == (3, -(-size[0] * size[1] // 8)), "a bit a pixel, not a byte"


def test_an_image_without_tags_has_no_region(tmp_path):
    write(tmp_path / "a.npz", [], np.zeros((0, 5, 6), bool))
    labels, found = load_regions(tmp_path / "a.npz", 3)
    assert labels.shape == (0,) and found.shape == (0, 5, 6)


@pytest.mark.parametrize("flip", [False, True])
def test_erased_pixels_are_exactly_the_mean_and_the_others_untouched(store, flip):
    value = torch.tensor([(m / 255 - a) / s for m, a, s in zip(COLOUR, MEAN, STD, strict=True)])
    plain = store.loader(flip=flip, maps={})
    seen, mirrored = 0, 0
    for (batch,), (whole,) in zip(store.loader(flip=flip), plain, strict=True):
        data = store.data()
        assert batch.ids == whole.ids and torch.equal(batch.flipped, whole.flipped)
        for k, name in enumerate(batch.ids):
            expected = torch.from_numpy(own_regions(data.image(int(name))))
            expected = expected.flip(-1) if batch.flipped[k] else expected
            assert torch.equal(batch.maps["erased"][k].bool(), expected)
            pixels = batch.images[k].permute(1, 2, 0)
            assert (pixels[expected] == value).all()
            assert torch.equal(pixels[~expected], whole.images[k].permute(1, 2, 0)[~expected])
            seen, mirrored = seen + int(expected.sum()), mirrored + int(batch.flipped[k])
    assert seen > 1000 and (mirrored > 0) == flip


def test_colours_change_before_pixels_are_erased(store):
    """With jitter, blur and the like on, an erased pixel has the mean all the same; resized masks stay hard."""
    value = torch.tensor([(m / 255 - a) / s for m, a, s in zip(COLOUR, MEAN, STD, strict=True)])
    changes = {"augment": "crop", "crop": 48, "scale": (1.3, 1.9), "photometric": True, "jitter": (0.3, 0.3, 0.3, 0.1)}
    for (batch,) in store.loader(**changes):
        erased = batch.maps["erased"]
        assert set(erased.unique().tolist()) == {0, 1}
        assert (batch.images.permute(0, 2, 3, 1)[erased.bool()] == value).all()


def test_a_store_of_other_images_is_refused(store):
    with pytest.raises(UserError, match="store.json was made of other images or tags than .* has now .6 images."):
        store.loader(train_limit=6)
    write_manifest(store.folder, StoreManifest(**{**vars(store.manifest), "images": "0" * 64}))
    with pytest.raises(UserError, match="made of other images or tags"):
        store.loader()


def test_a_store_of_other_classes_is_refused(store):
    write_manifest(store.folder, StoreManifest(**{**vars(store.manifest), "classes": ["cat", "dog"]}))
    with pytest.raises(UserError, match="holds regions of the classes cat, dog; expected"):
        store.loader()


@pytest.mark.parametrize("content", [None, "{", '{"images": "a"}', "[]"])
def test_a_manifest_that_is_none(store, content):
    path = store.folder / "store.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match="store.json cannot be used .*expected the manifest of mined regions"):
        store.loader()


def test_the_manifest_there_and_back(tmp_path, store):
    assert read_manifest(store.folder) == store.manifest
    assert json.loads((store.folder / "store.json").read_text())["mean"] == COLOUR


def test_the_digest_knows_images_and_tags(store):
    whole, part, other = store.data(), store.data(train_limit=6), store.data()
    other.tags = other.tags.copy()
    other.tags[3, 1] ^= 1
    assert len({d.digest() for d in (whole, part, other)}) == 3
    assert whole.digest() == store.data().digest()


WRONG = [
    (lambda p: damage(p, "truncated"), "cannot be used: BadZipFile"),
    (lambda p: p.unlink(), "misses the map 'erased' of 1 of 12 images"),
    (lambda p: write(p, [7], np.ones((1, 40, 40), bool)), r"holds the classes \[7\]; expected indices 0..2"),
    (lambda p: write(p, [0], np.ones((1, 30, 40), bool)), "is 30 x 40 .height x width.; expected 40 x 40"),
    (
        lambda p: np.savez(p, labels=np.array([0]), size=np.array([40, 40]), bits=np.zeros((1, 7), np.uint8)),
        r"holds `labels` .1,. and `bits` .1, 7.; expected bits of each tag",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_file_is_one_sentence(store, change, message):
    change(store.folder / f"{store.data().id(0)}.npz")
    with pytest.raises(UserError, match=f"^data: .*{message}"):
        next(iter(store.loader()))


def test_a_missing_file_is_no_region(tmp_path):
    with pytest.raises(UnfitRegions, match="the file is missing"):
        load_regions(tmp_path / "a.npz", 3)
