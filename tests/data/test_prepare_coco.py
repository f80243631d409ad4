"""COCO 2014 from archives and folders: the lists of both families, masks, what is wrong with the input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.data import official
from tests.data.preparing import coco_split, contents, manifest, problems, run
from wsss_dist.data.prepare import coco
from wsss_dist.errors import UserError


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    return official.write_coco(tmp_path_factory.mktemp("coco") / "archives")


@pytest.fixture(scope="module")
def made(archives, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("coco") / "coco14"
    run("coco", archives, out)
    return out


@pytest.fixture
def folders(tmp_path) -> Path:
    return official.write_coco(tmp_path / "folders", folders=True)


def test_both_families_are_splits(made):
    sizes = {
        s: len(coco_split(made, s)) for s in ("train-81k", "val-81k", "train-82k", "val-82k", "train2014", "val2014")
    }
    assert sizes == {"train-81k": 7, "val-81k": 4, "train-82k": 9, "val-82k": 5, "train2014": 9, "val2014": 5}
    every, annotated = coco_split(made, "train2014", untagged="drop"), coco_split(made, "train-81k")
    assert every.files.tolist() == annotated.files.tolist() and (every.tags == annotated.tags).all()
    assert annotated.name == "coco14/train-81k" and annotated.root == made / "train2014"
    assert annotated.class_names == [f"class {raw}" for raw in official.RAW_IDS]
    assert not (made / ".prepare").exists()


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_tags_and_masks_are_those_of_the_reader_and_of_pycocotools(made, folders, split):
    """The reader that draws from the official file is the definition; pycocotools draws the regions once more."""
    plain, prepared = coco_split(folders, split), coco_split(made, split)
    assert plain.files.tolist() == prepared.files.tolist() and (plain.tags == prepared.tags).all()
    assert prepared.has_masks and "masks" in str(prepared.mask_folders[0])
    api = COCO(str(folders / "annotations" / f"instances_{split}.json"))
    rank = {raw: k + 1 for k, raw in enumerate(official.RAW_IDS)}
    crowds = 0
    for i in range(len(plain)):
        mask = prepared.mask(i)
        assert (mask == plain.mask(i)).all() and mask.shape == prepared.image(i).shape[:2]
        entry = next(e for e in api.dataset["images"] if e["file_name"] == prepared.files[i])
        drawn = [(api.annToMask(a).astype(bool), a) for a in api.imgToAnns[entry["id"]]]
        expected = np.zeros_like(mask)
        for region, a in sorted(drawn, key=lambda r: -r[0].sum()):
            if not a["iscrowd"]:
                expected[region] = rank[a["category_id"]]
        for region, a in drawn:
            expected[region & (expected == 0) & bool(a["iscrowd"])] = 255
        assert (mask == expected).all()
        crowds += (mask == 255).any()
        assert set(np.unique(mask)) - {0, 255} <= set(np.flatnonzero(prepared.tags[i]) + 1)
    assert crowds


def test_masks_are_palettised(made):
    with Image.open(next((made / "masks" / "train2014").iterdir())) as mask:
        assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]


def test_folders_and_any_number_of_workers_give_the_same(made, folders, tmp_path):
    run("coco", folders, tmp_path / "linked", workers=3)
    assert (tmp_path / "linked" / "train2014").is_symlink() and contents(tmp_path / "linked") == contents(made)
    before = contents(folders)
    run("coco", folders, folders)  # in place
    after = contents(folders)
    assert before.items() <= after.items() and manifest(folders) == manifest(made)
    assert not any(path.is_symlink() for path in folders.rglob("*"))


def test_the_manifest_holds_what_lies_there(made):
    content = manifest(made)
    files, found = content["files"], contents(made)
    assert list(files) == sorted(files) and set(files) == set(found) - {"manifest.json", "problems.csv"}
    assert all(record["sha256"] == found[name] for name, record in files.items())
    assert all(record["size"] == (made / name).stat().st_size for name, record in files.items())
    for name, record in files.items():
        if not name.startswith("annotations"):
            with Image.open(made / name) as picture:
                assert (record["width"], record["height"], record["mode"]) == (*picture.size, picture.mode)
    assert content["counts"] == {
        "train-81k images": 7, "train-82k images": 9, "val-81k images": 4, "val-82k images": 5
    }  # fmt: skip
    assert content["left_out"] == 0 and problems(made) == []


def test_a_finished_folder_is_recognised_and_verified(made, archives, tmp_path):
    out = shutil.copytree(made, tmp_path / "coco14")
    assert "is complete: 36 files are there in their size" in run("coco", archives, out)[-1]
    assert "36 files have their sha256, nothing to do" in run("coco", archives, out, verify=True)[-1]
    mask = next((out / "masks" / "val2014").iterdir())
    data = bytearray(mask.read_bytes())
    data[-20] ^= 1
    mask.write_bytes(data)
    run("coco", archives, out)
    with pytest.raises(UserError, match=f"1 of 36 files in .* changed .*first: masks/val2014/{mask.name}.*restore"):
        run("coco", archives, out, verify=True, workers=2)
    mask.unlink()
    with pytest.raises(UserError, match="1 of 36 files in .* are missing"):
        run("coco", archives, out)
    with pytest.raises(UserError, match="other settings .legacy False instead of True"):
        run("coco", archives, out, legacy=True)


def test_other_counts_are_refused_and_named(archives, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="train2014 images: found 9, expected 82,783; .* add --subset"):
        run("coco", archives, tmp_path / "out", subset=False)
    assert not (tmp_path / "out" / "manifest.json").exists()
    small = {"train2014 images": 9, "train2014 annotated images": 7, "val2014 images": 5}
    monkeypatch.setattr(coco, "COUNTS", {**small, "val2014 annotated images": 4, "classes": 80})
    said = run("coco", archives, tmp_path / "out", subset=False)
    assert "val2014 annotated images: found 4, expected 4" in said


def test_missing_archives_are_named_with_their_address(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither train2014.zip nor train2014 in .*empty; download http://images.coco"):
        run("coco", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="--source is '.*none', which does not exist"):
        run("coco", tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folders / "val2014")
    (folders / "val2014").mkdir()
    with pytest.raises(UserError, match="none of the 5 images that .*val2014.json names is in"):
        run("coco", folders, tmp_path / "out")


def test_nothing_of_the_user_is_overwritten(archives, folders, tmp_path):
    (tmp_path / "a" / "masks").mkdir(parents=True)
    (tmp_path / "a" / "masks" / "mine.png").write_bytes(b"")
    with pytest.raises(UserError, match="a/masks exists and was not made by this command; nothing is overwritten"):
        run("coco", archives, tmp_path / "a")
    (tmp_path / "b" / "train2014").mkdir(parents=True)
    with pytest.raises(UserError, match="b/train2014 exists and is not .*folders/train2014; nothing is overwritten"):
        run("coco", folders, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train2014").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="c/train2014 is a link, and nothing is written through it"):
        run("coco", archives, tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="manifest.json is no manifest of this command"):
        run("coco", archives, tmp_path / "d")
