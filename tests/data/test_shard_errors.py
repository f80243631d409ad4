"""What is damaged, missing or does not fit is said in one sentence, when the set is opened or where it is read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data import sets
from tests.data.shards_made import config, flip, write
from tests.data.synthetic import write_synthetic_dataset
from tests.data.test_loader import N
from wsss_dist.data import DataConfig, build_dataset, build_train_loader, shard_files
from wsss_dist.data.decode import DamagedImage
from wsss_dist.data.prepare.shards import parse_size
from wsss_dist.data.shard_index import PICTURE
from wsss_dist.errors import UserError


def middle(data, i: int) -> tuple[Path, int]:
    """Shard of image i and a byte of its picture."""
    return Path(data.path(i).partition(":")[0]), int(data._offsets[i, PICTURE] + data._sizes[i, PICTURE] // 2)


def test_a_damaged_image_is_replaced_and_named(copy):
    cfg = config(copy)
    data = build_dataset(cfg, "train")
    flip(*middle(data, 5))
    data = build_dataset(cfg, "train")
    with pytest.raises(DamagedImage, match=r"train/train-00000\d.tar:00005.jpg: its bytes are not .*CRC-32.* again"):
        data.image(5)
    loader = build_train_loader(
        data, cfg, seed=0, global_batch=N, micro_batch=N, rank=0, world_size=1, start_step=0, num_steps=1
    )
    ((batch,),) = list(loader)
    assert batch.ids.count("00006") == 2 and "00005" not in batch.ids and batch.damaged[0][0] == data.path(5)


def test_what_was_damaged_before_is_damaged_in_the_same_words(tmp_path):
    root = write_synthetic_dataset(tmp_path / "set", 6, 1, 40, 3, seed=0)
    broken = {1: b"", 3: b"<html>", 4: (root / "images/train/00004.jpg").read_bytes()[:300]}
    for k, content in broken.items():
        (root / f"images/train/0000{k}.jpg").write_bytes(content)
    write(root, tmp_path / "out")
    one, two = build_dataset(sets.config(root), "train"), build_dataset(config(tmp_path / "out"), "train")
    for k in broken:
        reasons = []
        for data in (one, two):
            with pytest.raises(DamagedImage) as caught:
                data.image(k)
            reasons.append(caught.value.reason)
        assert reasons[0] == reasons[1]


def resave(copy: Path, **changes) -> None:
    """Change arrays of samples.npz, with the checksum that belongs to them."""
    with np.load(copy / "train/samples.npz") as file:
        arrays = {**file, **{k: change(file[k].copy()) for k, change in changes.items()}}
    np.savez(copy / "train/samples.npz", **arrays)
    content = json.loads((copy / "train/shards.json").read_text())
    content["samples"]["sha256"] = hashlib.sha256((copy / "train/samples.npz").read_bytes()).hexdigest()
    (copy / "train/shards.json").write_text(json.dumps(content))


def tars(copy: Path) -> list[Path]:
    return sorted((copy / "train").glob("*.tar"))


def replaced(values: np.ndarray, at, value) -> np.ndarray:
    values[at] = value
    return values


OPENING = {
    "missing": (lambda c: tars(c)[2].unlink(), r"train-000002.tar is missing; copy it there"),
    "truncated": (lambda c: os.truncate(tars(c)[1], 3000), r"train-000001.tar has 3000 bytes; expected \d+ .*copy it"),
    "another": (
        lambda c: tars(c)[0].write_bytes(b"x" * tars(c)[0].stat().st_size),
        r"train-000000.tar is not the shard that its index was made of: .* copy the shard again",
    ),
    "no index": (
        lambda c: (c / "train/shards.json").unlink(),
        r"\d tar files|\.tar files and no shards.json; make one",
    ),
    "no split": (lambda c: shutil.rmtree(c / "train"), r"there is no .*train/shards.json; splits found: val. Correct"),
    "no samples": (lambda c: (c / "train/samples.npz").unlink(), "samples.npz beside .* belongs to another index"),
    "flipped": (lambda c: flip(c / "train/samples.npz", 300), "samples.npz beside .* is damaged; make it again"),
    "no JSON": (
        lambda c: (c / "train/shards.json").write_text("{"),
        "shards.json is no index of shards .*make it again",
    ),
    "version": (
        lambda c: (c / "train/shards.json").write_text('{"version": 9, "samples": {"sha256": ""}}'),
        "version 9",
    ),
    "outside": (lambda c: resave(c, offsets=lambda v: replaced(v, (3, 0), 10**9)), "members outside their shards"),
    "no such shard": (lambda c: resave(c, shard=lambda v: replaced(v, 3, 99)), "shards that are not among the"),
    "shapes": (lambda c: resave(c, tags=lambda v: v[:4]), r"`tags` is uint8 \[4, 3\], expected \[19, 3\]"),
    "leads out": (
        lambda c: resave(c, files=lambda v: replaced(v.astype("U30"), 1, "../../x.jpg")),
        "names lead out of the",
    ),
    "absolute": (
        lambda c: resave(c, files=lambda v: replaced(v.astype("U30"), 1, "/etc/x.jpg")),
        "names lead out of the",
    ),
    "twice": (lambda c: resave(c, files=lambda v: replaced(v, 1, v[0])), "holds 1 images with the id of another"),
    "objects": (lambda c: resave(c, files=lambda v: v.astype(object)), "shards.json is no index"),
}


@pytest.mark.parametrize("case", OPENING)
def test_what_does_not_fit_is_said_when_the_set_is_opened(copy, case):
    change, message = OPENING[case]
    change(copy)
    with pytest.raises(UserError, match=message) as caught:
        build_dataset(config(copy), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_away_during_a_run_stops_it(copy, workers):
    cfg, whole = config(copy, num_workers=workers), tars(copy)[1].read_bytes()
    for change, message in (
        (lambda: os.truncate(tars(copy)[1], 600), "train-000001.tar ends before byte .*copy it again"),
        (lambda: tars(copy)[1].unlink(), "train-000001.tar is missing"),
    ):
        # sent as to a process on another node, it has no shard open yet
        data = pickle.loads(pickle.dumps(build_dataset(cfg, "train")))  # noqa: S301
        change()
        loader = build_train_loader(
            data, cfg, seed=0, global_batch=N, micro_batch=1, rank=0, world_size=1, start_step=0, num_steps=1
        )
        with pytest.raises(UserError, match=message):
            list(loader)
        (copy / "train/train-000001.tar").write_bytes(whole)


def test_an_address_that_cannot_be_used(in_memory, monkeypatch):
    monkeypatch.setattr(shard_files, "PAUSES", (0.0, 0.0))
    with pytest.raises(UserError, match="there is no memory://bucket/none/train/shards.json"):
        build_dataset(config("memory://bucket/none"), "train")
    with pytest.raises(UserError, match="nosuch://x/train is no address that fsspec knows"):
        build_dataset(config("nosuch://x"), "train")
    data = build_dataset(config(in_memory), "train")
    fails = []

    def broken(self, path, **kwargs):
        fails.append(path)
        raise TimeoutError("no answer")

    import fsspec

    memory = type(fsspec.filesystem("memory"))
    real = memory.cat_file
    monkeypatch.setattr(memory, "cat_file", broken)
    with pytest.raises(UserError, match=r"memory://bucket/set/train/train-000000.tar cannot be reached .*no answer"):
        data.image(0)
    assert len(fails) == 3
    monkeypatch.setattr(memory, "cat_file", lambda *a, **k: broken(*a) if len(fails) < 5 else real(*a, **k))
    assert data.image(0).shape == (40, 40, 3) and len(fails) == 5
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UserError, match=r"needs the package fsspec.*pip install -e '.\[remote\]'"):
        build_dataset(config(in_memory), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "coco", "root": "s3://b/x"}, "reads from a folder alone; .*prepare_data.py shards.*format: shards"),
        ({"format": "coco", "cache": {"dir": "/x", "gb": 1}}, "set format: shards or remove it"),
        ({"format": "shards", "cache": {"dir": "/x", "gb": 0}}, "greater than 0"),
        ({"format": "shards", "root": 5}, "must be a folder or an address"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"root": "x", **changes})


def test_an_address_stays_as_it_is():
    cfg = DataConfig(format="shards", root="s3://bucket//x")
    assert cfg.root == "s3://bucket//x" and DataConfig(**cfg.model_dump(mode="json")) == cfg
    assert DataConfig(format="shards", root="~/x").root == Path.home() / "x"


def test_other_classes_and_a_cache_that_cannot_be_written(made, tmp_path):
    with pytest.raises(UserError, match="data.classes is a, b, but .*shards.json was made with disc-0"):
        build_dataset(config(made, classes=["a", "b"]), "train")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache.dir is '.*file/x', which cannot be used"):
        build_dataset(config(made, cache={"dir": tmp_path / "file/x", "gb": 1}), "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "zip"}, "--from is 'zip:.*'; expected coco:FOLDER"),
        ({"size": 0}, "--size is 0 bytes"),
        ({"split": "test", "masks": True}, "has no masks; leave --masks out"),
    ],
)
def test_mistakes_of_the_command(tmp_path, arguments, message):
    root = sets.write_folder(tmp_path / "set")
    shutil.copytree(root / "train", root / "test")
    with pytest.raises(UserError, match=message):
        write(root, tmp_path / "out", **{"split": "train", "form": "folder", **arguments})
    with pytest.raises(UserError, match="--size is 'many'; expected a number"):
        parse_size("many")


def test_two_images_of_one_key_are_refused(tmp_path):
    root = sets.write_folder(tmp_path / "set")
    sets.picture().save(root / "train/images/x%2Ey.jpg")
    sets.picture().save(root / "train/images/x.y.jpg")
    (root / "train/labels.csv").write_text("image,labels\nx.y.jpg,cat\nx%2Ey.jpg,dog\n")
    with pytest.raises(UserError, match=r"set/train holds 1 keys more than once \(first: x%2Ey\)"):
        write(root, tmp_path / "out", form="folder")


@pytest.mark.parametrize("name", ["noext", "a.json", "a.cls"])
def test_a_picture_that_would_not_be_found_again_is_refused(tmp_path, name):
    root = sets.write_folder(tmp_path / "set", ["image,labels", f"{name},cat"])
    shutil.copy(root / "train/images/a.png", root / "train/images" / name)
    message = rf"set/train holds 1 images without the ending of a picture \(first: {name}\); expected one.* rename them"
    with pytest.raises(UserError, match=message):
        write(root, tmp_path / "out", form="folder")
