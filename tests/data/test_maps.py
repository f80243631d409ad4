"""Maps of an earlier stage: read as documented, and one sentence for each wrong file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from tests.data.test_damaged import damage
from wsss_dist.data import (
    DataConfig,
    build_dataset,
    build_train_loader,
)
from wsss_dist.data.maps import check_maps, read_maps
from wsss_dist.errors import UserError
from wsss_dist.schema import parse

SIZES = {"seed": 0, "global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start_step": 0, "num_steps": 2}
AS_IT_IS = {"augment": "squash", "flip": False, "crop": 40}
NAMES = ("labels", "saliency", "hint")


class Stage:
    """A data set of pictures of 40 x 40 with the maps of an earlier stage."""

    def __init__(self, folder) -> None:
        self.root = write_synthetic_dataset(folder / "set", 12, 3, 40, 3, seed=0)
        self.earlier = folder / "earlier"
        self.maps = sets.write_maps(self.earlier / "train", self.data())

    def cfg(self, **changes) -> DataConfig:
        return sets.config(self.root, **{**AS_IT_IS, "maps": self.maps, **changes})

    def data(self, split: str = "train"):
        return build_dataset(sets.config(self.root), split)

    def loader(self, **changes):
        return build_train_loader(self.data(), self.cfg(**changes), **SIZES)

    def path(self, name: str, k: int = 0):
        return self.earlier / "train" / name / f"{k:05d}.{'npz' if name == 'hint' else 'png'}"


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_a_batch_carries_the_maps_of_its_images(stage):
    data = stage.data()
    for (batch,) in stage.loader():
        assert batch.maps.keys() == set(NAMES)
        for k, name in enumerate(batch.ids):
            i = int(name)
            labels, grey, hint = (batch.maps[key][k] for key in NAMES)
            first = int(np.flatnonzero(data.tags[i])[0])
            assert labels.dtype == torch.uint8
            assert (labels[:20] == first + 1).all() and (labels[20:] == 255).all()
            image = torch.from_numpy(data.image(i)).float() / 255
            assert grey.dtype == hint.dtype == torch.float32
            assert torch.equal(grey, image[:, :, 0])
            assert torch.equal(hint, image[:, :, 1].half().float()), "stored as float16"


def test_no_maps_no_change(stage):
    ((batch,), _) = stage.loader(maps={})
    assert batch.maps == {}


def test_batches_move_with_their_maps(stage, monkeypatch):
    ((batch,), _) = stage.loader()
    moved = batch.to("meta")
    assert all(v.device.type == "meta" for v in (moved.images, *moved.maps.values())) and moved.ids == batch.ids
    assert batch.maps["hint"].device.type == "cpu"
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = batch.pin_memory()
    for name, values in batch.maps.items():
        assert torch.equal(pinned.maps[name], values + 1)


def test_palettes_and_images_without_classes(stage):
    ids = np.tile(np.array([0, 3, 255, 1], np.uint8), (40, 10))
    file = Image.fromarray(ids)
    file.putpalette([v % 256 for v in range(768)])
    for k in range(12):
        file.save(stage.path("labels", k))
        np.savez(stage.path("hint", k), labels=np.zeros(0, np.int16), full=np.zeros((0, 40, 40), np.float16))
    for (batch,) in stage.loader():
        assert (batch.maps["labels"].numpy() == ids).all() and (batch.maps["hint"] == 0).all()


def test_an_image_without_tag_needs_no_scores(tmp_path):
    root = sets.write_folder(tmp_path / "own")
    data = build_dataset(sets.config(root, "folder"), "train")
    maps = sets.write_maps(tmp_path / "earlier", data)
    assert not (tmp_path / "earlier/hint/a.npz").exists() and not data.tags[data.files.tolist().index("a.png")].any()
    maps = sets.config(root, "folder", maps=maps).maps
    found = [read_maps(data, i, maps, data.image(i).shape[:2])["hint"].any() for i in range(3)]
    assert dict(zip(map(data.id, range(3)), found, strict=True)) == {"a": False, "b": True, "c": True}


def save(image):
    return lambda path: Image.fromarray(image).save(path)


def scores(**content):
    return lambda path: np.savez(path, **content)


def full(k=1, side=40, value=0.5):
    return np.full((k, side, side), value, np.float16)


ONE = np.array([1], np.int16)
# (map, what is done to its file, what is found, what is expected)
WRONG = [
    ("labels", save(np.full((40, 40), 4, np.uint8)), r"holds the ids \[4\]", r"0 \(background\), 1..3 .* and 255"),
    ("labels", save(np.zeros((40, 40, 3), np.uint8)), "of mode 'RGB', not 'L'", "a single-channel PNG of class ids"),
    ("labels", save(np.zeros((40, 30), np.uint8)), "is 40 x 30 .height x width.", "40 x 40, the size of .*jpg"),
    ("labels", lambda p: damage(p, "truncated"), "cannot be used: .*truncated", "a single-channel PNG"),
    ("labels", lambda p: damage(p, "large"), "claims 9000 x 9000 pixels", "a single-channel PNG"),
    ("saliency", save(np.zeros((20, 40), np.uint8)), "is 20 x 40", "40 x 40, the size of"),
    ("saliency", save(np.zeros((40, 40), np.uint16)), "of mode 'I;16', not 'L'", "an 8-bit grey PNG"),
    ("saliency", lambda p: damage(p, "empty"), "cannot be used: the file is empty", "an 8-bit grey PNG"),
    ("saliency", lambda p: damage(p, "text"), "not a picture of a known format", "an 8-bit grey PNG"),
    ("hint", lambda p: damage(p, "truncated"), "cannot be used: BadZipFile", "an .npz of `labels`"),
    ("hint", lambda p: damage(p, "empty"), "cannot be used: EOFError", "an .npz of `labels`"),
    ("hint", scores(labels=ONE), "cannot be used: KeyError: .*full", "an .npz of `labels`"),
    ("hint", scores(labels=ONE, full=np.array([{}])), "cannot be used: ValueError: Object arrays", "an .npz"),
    ("hint", scores(labels=ONE, full=full(2)), r"holds `labels` int16 \[1\] and `full` float16 \[2, 40", "an .npz"),
    ("hint", scores(labels=ONE * 1.0, full=full()), r"holds `labels` float64 \[1\]", "an .npz of .*whole"),
    ("hint", scores(labels=ONE * 3, full=full()), r"holds the classes \[3\]", r"indices 0..2"),
    ("hint", scores(labels=-ONE, full=full()), r"holds the classes \[-1\]", r"indices 0..2"),
    ("hint", scores(labels=ONE, full=full(side=10)), "is 10 x 10", "40 x 40, the size of"),
    ("hint", scores(labels=ONE, full=full(value=np.nan)), "scores that are not finite", "numbers"),
]


@pytest.mark.parametrize(("name", "change", "found", "expected"), WRONG, ids=[f"{w[0]}-{w[2]}" for w in WRONG])
def test_a_wrong_map_is_one_sentence(stage, name, change, found, expected):
    """Found when the loader is built where it is among the few that are read then, else when its turn comes."""
    message = rf"^data: .*{name}/000.*, the map '{name}' of image \d+, .*{found}.*; expected {expected}"
    message += rf".*: make it with stage {name}, or correct data.maps.{name}$"
    change(stage.path(name))
    with pytest.raises(UserError, match=message):
        stage.loader()
    stage.path(name).write_bytes(stage.path(name, 3).read_bytes())
    for k in (2, 5, 8, 11):  # 8 of 12 are read early: 0, 1, 3, 4, 6, 7, 9, 10
        change(stage.path(name, k))
    loader = stage.loader()
    with pytest.raises(UserError, match=message):
        list(loader)


@pytest.mark.parametrize("name", NAMES)
def test_missing_maps_are_counted_before_anything_is_read(stage, name):
    for k in (2, 5):
        stage.path(name, k).unlink()
    message = f"misses the map '{name}' of 2 of 12 images of 'set/train' .first: 00002.*, 00005.*; expected an? .*"
    with pytest.raises(UserError, match=message + f"make it with stage {name}, or correct data.maps.{name}"):
        stage.loader()


def test_a_map_that_goes_while_the_run_goes_on(stage):
    loader = stage.loader(num_workers=1)
    for k in range(12):
        stage.path("hint", k).unlink()
    with pytest.raises(UserError, match="^data: .*npz, the map 'hint' of image .* cannot be used: the file is missing"):
        list(loader)


def test_a_damaged_image_is_replaced_together_with_its_maps(stage):
    for k in (0, 2):  # one that the early look reads, and one that it does not
        damage(stage.root / f"images/train/{k:05d}.jpg", "truncated")
    seen = [(batch, k) for (batch,) in stage.loader() for k in range(4)]
    assert sum(len(batch.damaged) for batch, k in seen if k == 0) >= 1
    for batch, k in seen:
        image = torch.from_numpy(stage.data().image(int(batch.ids[k]))).float() / 255
        assert torch.equal(batch.maps["saliency"][k], image[:, :, 0])


def test_a_folder_that_is_not_there(stage):
    maps = {"labels": {"dir": stage.root / "nowhere", "kind": "labels"}}
    with pytest.raises(UserError, match="maps.labels.dir is '.*nowhere', which is not a folder; .*the stage before"):
        stage.loader(maps=maps)


def test_ground_truth_is_no_map(stage, tmp_path):
    (tmp_path / "link").symlink_to(stage.root / "masks" / "train")
    (tmp_path / "links").mkdir()
    for path in (stage.root / "masks" / "train").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    masks = stage.root / "masks"
    for folder in (masks / "train", masks / "../masks/train", tmp_path / "link", tmp_path / "links"):
        with pytest.raises(UserError, match="data.maps.labels leads to .*, a ground-truth mask of 'set/train'; exp"):
            stage.loader(maps={"labels": {"dir": folder, "kind": "labels"}})


@pytest.mark.parametrize("form", ["voc", "folder"])
def test_ground_truth_is_no_map_in_other_formats(tmp_path, form):
    if form == "voc":
        root, split = sets.write_voc(tmp_path), "train_aug"
        folder = root / "VOCdevkit/VOC2012/SegmentationClassAug"
    else:
        root, split, folder = sets.write_folder(tmp_path), "train", tmp_path / "train/masks"
        for name in "abc":
            sets.add_mask(root, f"{name}.png", {0: 1})
    cfg = sets.config(root, form, classes=None if form == "folder" else ["cat", "dog"] + list("efghijklmnop"))
    cfg = cfg.model_copy(update={"maps": sets.config(root, maps={"labels": {"dir": folder, "kind": "labels"}}).maps})
    with pytest.raises(UserError, match="data.maps.labels leads to .* a ground-truth mask"):
        check_maps(build_dataset(cfg, split), cfg.maps)


MAP = {"dir": "x", "kind": "grey"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment": "long_side"}, "'data.long_side' is None: .*needs the range of lengths in pixels"),
        ({"long_side": [320, 640]}, r"'data.long_side' is \[320, 640\]: .*'crop'.*set augment: long_side or remove it"),
        ({"augment": "long_side", "long_side": [640, 320]}, "range with 8 <= low <= high <= 4096"),
        ({"squash_size": 512}, "'data.squash_size' is 512: data.augment is 'crop'.*set augment: squash or remove it"),
        ({"augment": "squash", "squash_size": 300}, r"'data.squash_size' is 300: must be data.crop \(448\) or more"),
        ({"jitter": [0.3, 0.3, 0.3, 0.6]}, "'data.jitter' is .*hue at most 0.5"),
        ({"jitter": [0.3, -0.3, 0.3, 0.1]}, "'data.jitter' is .*all at least 0"),
        ({"jitter": 0.3}, "'data.jitter' is 0.3: .*write a list"),
        ({"pad": "white"}, "'data.pad' is 'white': .*'black' or 'mean'"),
        ({"rand_augment": {"n": 2, "m": 11}}, "'data.rand_augment.m' is 11"),
        ({"rand_augment": {"N": 2}}, "unknown key 'data.rand_augment.N'.*known keys: m, n"),
        ({"maps": {"hint": {"dir": "x", "kind": "score"}}}, "'data.maps.hint.kind' is 'score': .*'scores' or 'erased'"),
        ({"maps": {"hint": {"kind": "scores"}}}, "key 'data.maps.hint.dir' is missing"),
        ({"maps": {"hint": {**MAP, "made_bye": "x"}}}, "unknown key 'data.maps.hint.made_bye'.*did you mean 'made_by'"),
        ({"maps": {"my hint": MAP}}, "'my hint' is no name for a map"),
        ({"maps": {"hint": MAP}, "rand_augment": {}}, "'data.maps' is .*no longer lie on it; remove one"),
    ],
)
def test_config(values, message):
    with pytest.raises(UserError, match=message):
        parse(DataConfig, {"format": "coco", "root": "x", **values}, "data")
