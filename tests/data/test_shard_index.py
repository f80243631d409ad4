"""The index of shards that others wrote, or of our own whose index was lost."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data import sets
from tests.data.shards_made import config, flip, jpeg, quiet, tar, write
from wsss_dist.data import build_dataset
from wsss_dist.data.prepare.index_shards import index_shards
from wsss_dist.errors import UserError


def test_shards_of_others_are_indexed_and_checked(tmp_path, in_memory):
    folder, long = tmp_path / "web", "d" * 120
    tar(
        folder / "0.tar",
        {
            "./b/x.jpg": jpeg(1),
            "./b/x.json": b'{"label": "dog"}',
            "meta.txt": b"",
            "b/y.jpg": jpeg(2),
            "b/y.cls": b"cat dog",
        },
    )
    mask = io.BytesIO()
    sets.Image.fromarray(np.ones((20, 30), np.uint8)).save(mask, "PNG")
    tar(
        folder / "1.tar",
        {f"{long}.jpg": jpeg(3), f"{long}.json": b'{"tags": []}', f"{long}.seg.png": mask.getvalue()},
        format=tarfile.GNU_FORMAT,
    )
    said = []
    index_shards(folder, None, None, None, said.append)
    index_shards(str(folder), "train", tmp_path / "index", None, quiet)
    for data in (build_dataset(config(tmp_path), "web"), build_dataset(config(tmp_path / "index"), "train")):
        assert [data.id(i) for i in range(3)] == ["b/x", "b/y", long]
        assert data.class_names == ["cat", "dog"] and data.tags.tolist() == [[0, 1], [1, 1], [0, 0]]
        assert all((data.image(i) == np.array(sets.Image.open(io.BytesIO(jpeg(i + 1))))).all() for i in range(3))
        assert (data.mask(2) == 1).all()
        with pytest.raises(UserError, match="1.tar.*mask.*|0.tar:b/x.jpg .its mask. is missing, though"):
            data.mask(0)
    index_shards(folder, None, None, None, said.append)
    assert "3 images of 2 classes, 1 masks" in said[2] and "checksums right" in said[-1]
    flip(folder / "1.tar", (folder / "1.tar").stat().st_size - 1)
    with pytest.raises(UserError, match="1.tar is damaged or another shard: its SHA-256 differs"):
        index_shards(folder, None, None, None, quiet)


def test_a_lost_index_is_made_again(made, tmp_path):
    kept = Path(shutil.copytree(made / "val", tmp_path / "set/val"))
    (kept / "shards.json").unlink()
    (kept / "samples.npz").unlink()
    classes = build_dataset(config(made), "val").class_names
    index_shards(kept, None, None, classes, quiet)
    assert (kept / "samples.npz").read_bytes() == (made / "val/samples.npz").read_bytes()
    one, two = (json.loads((folder / "val/shards.json").read_text()) for folder in (made, tmp_path / "set"))
    assert {k: v for k, v in one.items() if k != "made"} == {k: v for k, v in two.items() if k != "made"}


@pytest.mark.parametrize("ending", ["bmp", "tif", "webp", "JPG", "png", "x"])
def test_the_picture_of_an_index_made_again_is_never_the_mask(tmp_path, ending):
    root = sets.write_folder(tmp_path / "own", ["image,labels", f"v1.a.{ending},cat", f"b.{ending},dog"])
    for k, name in enumerate(("v1.a", "b")):
        sets.picture(seed=k).save(root / f"train/images/{name}.{ending}", "PNG")
        sets.add_mask(root, f"{name}.png", {k: 1})
    out = write(root, tmp_path / "out", form="folder", masks=True)
    for name in ("shards.json", "samples.npz"):
        (out / "train" / name).unlink()
    index_shards(out / "train", None, None, None, quiet)
    one, two = build_dataset(sets.config(root, "folder"), "train"), build_dataset(config(out), "train")
    assert one.files.tolist() == two.files.tolist()
    for i in range(2):
        assert (one.image(i) == two.image(i)).all() and (one.mask(i) == two.mask(i)).all()


def test_the_mask_of_others_is_no_picture_though_it_comes_first(tmp_path):
    buffers = [io.BytesIO(), io.BytesIO()]
    sets.picture().save(buffers[0], "WEBP", lossless=True)
    sets.Image.fromarray(np.ones((20, 30), np.uint8)).save(buffers[1], "PNG")
    picture, mask = (buffer.getvalue() for buffer in buffers)
    tar(tmp_path / "web/0.tar", {"x.cls": b"cat", "x.png": mask, "x.webp": picture, "meta.json": b"{"})
    index_shards(tmp_path / "web", None, None, None, quiet)
    data = build_dataset(config(tmp_path), "web")
    assert data.files.tolist() == ["x.webp"] and (data.mask(0) == 1).all()
    assert (data.image(0) == np.array(sets.picture())).all()


def test_a_gap_in_the_numbers_of_shards_is_said(tmp_path):
    for k in (1, 2, 3, 5, 6):
        tar(tmp_path / f"web/set-{k:06d}.tar", {f"{k}.jpg": jpeg(k), f"{k}.cls": b"cat"})
    said = []
    index_shards(tmp_path / "web", None, None, None, said.append)
    assert len(said) == 7 and "between the shards 3 and 5 others may be missing" in said[-1]
    tar(tmp_path / "web/set-000004.tar", {"4.jpg": jpeg(4), "4.cls": b"cat"})
    (tmp_path / "web/shards.json").unlink()
    index_shards(tmp_path / "web", None, None, None, said.append)
    assert "6 images of 1 classes" in said[-1]


def test_an_index_without_its_samples_is_said(copy):
    (copy / "val/samples.npz").unlink()
    with pytest.raises(UserError, match="samples.npz beside .*shards.json belongs to another index or is damaged"):
        index_shards(copy / "val", None, None, None, quiet)


def test_shards_at_an_address_are_indexed(made, in_memory, tmp_path):
    with pytest.raises(UserError, match="needs a folder of this machine; give --out"):
        index_shards(f"{in_memory}/val", None, None, None, quiet)
    classes = build_dataset(config(made), "val").class_names
    index_shards(f"{in_memory}/val", None, tmp_path, classes, quiet)
    one, two = build_dataset(config(made), "val"), build_dataset(config(tmp_path), "val")
    assert two.path(0).startswith("memory://bucket/set/val/val-000000.tar:")
    assert all((one.image(i) == two.image(i)).all() and (one.mask(i) == two.mask(i)).all() for i in range(5))


NUMBERS = {"x.jpg": b"", "x.cls": b"1 0"}
FOREIGN = {
    "empty": ({}, None, "0.tar has shards without|has shards without a picture"),
    "no tags": ({"x.jpg": b""}, None, "0.tar:x has no tags; expected <key>.json"),
    "odd tags": ({"x.jpg": b"", "x.json": b'{"tags": {"a": 1}}'}, None, "0.tar:x has no tags"),
    "bad JSON": ({"x.jpg": b"", "x.json": b"{"}, None, "the .json of .*0.tar:x is not readable JSON"),
    "numbers": (NUMBERS, None, r"the tags of .*0.tar:x are numbers \(\[1, 0\]\); give --classes"),
    "too high": (NUMBERS, ["a"], "0.tar:x has the unknown tag 1; expected one of 1 classes"),
    "a key twice": (
        {**NUMBERS, "y.cls": b"0", "x.jpg+": b"", "x.cls+": b""},
        ["a", "b"],
        "the key 'x' is in .*0.tar and",
    ),
    "a member twice": ({**NUMBERS, "x.cls+": b""}, ["a", "b"], "holds 'x.cls' twice"),
    "leads out": ({"../x.jpg": b"", "../x.cls": b"0"}, ["a"], "names lead out of the folder"),
    "a bitmap and its mask": (
        {"x.bmp": b"", "x.png": b"", "x.cls": b"0"},
        ["a"],
        "0.tar:x holds a picture '.bmp'; expected",
    ),
    "a bitmap": ({"x.bmp": b"", "x.cls": b"0"}, ["a"], "0.tar:x holds a picture '.bmp'; expected jpg, .* convert it"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_shards_of_others_that_cannot_be_used(tmp_path, case):
    members, classes, message = FOREIGN[case]
    tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path, None, None, classes, quiet)


def test_files_that_are_no_shards(tmp_path):
    with pytest.raises(UserError, match="has no .tar file; expected WebDataset shards"):
        index_shards(tmp_path, None, None, None, quiet)
    (tmp_path / "0.tar.gz").touch()
    with pytest.raises(UserError, match="0.tar.gz is packed: unpack it"):
        index_shards(tmp_path, None, None, None, quiet)
    tar(tmp_path / "0.tar", {"x.jpg": jpeg(), "x.cls": b"a"})
    whole = (tmp_path / "0.tar").read_bytes()
    for cut in (100, 700, 1024, len(jpeg()) + 200, 512 + -(-len(jpeg()) // 512) * 512):
        (tmp_path / "0.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"0.tar (is no plain .tar file, or is truncated|is truncated)"):
            index_shards(tmp_path, None, None, None, quiet)
    with pytest.raises(UserError, match="leave --split out, or give --out"):
        index_shards(tmp_path, "other", None, None, quiet)
