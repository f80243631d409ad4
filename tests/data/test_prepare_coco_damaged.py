"""COCO 2014 with damaged pictures and annotations: what is reported, what stops, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import official
from tests.data.preparing import change, coco_split, contents, manifest, picture, problems, run
from wsss_dist.data.prepare import coco, coco_index
from wsss_dist.data.prepare.coco_index import AnnotationIndex
from wsss_dist.errors import UserError


@pytest.fixture
def folders(tmp_path) -> Path:
    return official.write_coco(tmp_path / "folders", folders=True)


# ------------------------------------------------------------------------------------------------- damaged pictures


def turned(orientation: int, size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture("JPEG", "RGB", size, exif=exif)


WHOLE = official.jpeg(0, (24, 32))
# image k of train is (height, width) = SIZES[k % 4]; content, kind, reason and effect in problems.csv
PICTURES = {
    0: (WHOLE[:-60], "error", "truncated", "left out of the lists"),
    1: (b"", "error", "the file is empty", "left out of the lists"),
    2: (b"<html>404</html>", "error", "not a picture of a known format", "left out of the lists"),
    3: (None, "error", "the file is missing", "left out of the lists"),
    4: (picture("JPEG", "CMYK"), "note", "mode CMYK", "read as RGB"),
    5: (turned(6, (32, 24)), "note", "turned by EXIF (orientation 6)", "read upright"),
    6: (picture("PNG", "I;16", (30, 30)), "note", "16-bit grey (mode I;16)", "read as RGB, scaled to 8 bits"),
    7: (picture("PNG", "RGBA", (40, 25)), "note", "with transparency (mode RGBA)", "read as RGB, transparent"),
    8: (turned(6, (32, 24)), "error", "32 x 24 pixels (height, width) as the loader reads", "left out"),
}  # fmt: skip


@pytest.fixture
def damaged(folders) -> Path:
    names = [entry["file_name"] for entry in change(folders, lambda content: None)["images"]]
    for k, (content, *_) in PICTURES.items():
        path = folders / "train2014" / names[k]
        path.unlink()  # others share its bytes
        if content is not None:
            path.write_bytes(content)
    (folders / "train2014" / "Thumbs.db").write_bytes(b"x")
    return folders


def check_rows(rows: list, names: list[str]) -> None:
    for k, (_, kind, reason, effect) in PICTURES.items():
        of_image = [row for row in rows if row[0] == f"train2014/{names[k]}"]
        notes = [row for row in of_image if row[1] == kind and reason in row[2] and row[3].startswith(effect)]
        assert len(notes) == 1, (k, of_image)


def test_damaged_and_unusual_pictures_stop_or_are_left_out(damaged, tmp_path, monkeypatch):
    out = tmp_path / "out"
    names = [entry["file_name"] for entry in change(damaged, lambda content: None)["images"]]
    # a missing image of a subset is no problem, so the counts are made official
    monkeypatch.setattr(coco, "COUNTS", {})
    with pytest.raises(UserError, match=r"5 files cannot be used .first: train2014/.*problems.csv names them all"):
        run("coco", damaged, out, subset=False)
    assert not (out / "manifest.json").exists() and not (out / "annotations" / "train-82k.json").exists()
    rows = problems(out)
    check_rows(rows, names)
    thumbs = "1 files that the annotations do not name (first: Thumbs.db)"
    assert ("train2014/", "note", thumbs, "not used") in rows and len(rows) == len(PICTURES) + 2

    said = run("coco", damaged, out, subset=False, on_problem="continue")
    assert problems(out) == rows and "5 files cannot be used (first: train2014/" in " ".join(said)
    data = coco_split(out, "train-82k")
    assert sorted(data.files) == sorted(names[k] for k in PICTURES if PICTURES[k][1] == "note")
    assert all(data.mask(i).shape == data.image(i).shape[:2] for i in range(len(data)))
    assert manifest(out)["left_out"] == 5
    assert f"masks/train2014/{Path(names[0]).stem}.png" not in manifest(out)["files"]


def test_a_repaired_file_alone_is_done_again(damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "COUNTS", {})
    with pytest.raises(UserError, match="cannot be used"):
        run("coco", damaged, tmp_path / "out", subset=False)
    (damaged / "train2014" / "Thumbs.db").unlink()
    repaired = official.write_coco(tmp_path / "whole", folders=True)
    run("coco", repaired, tmp_path / "once")
    for path in (repaired / "train2014").iterdir():
        (damaged / "train2014" / path.name).write_bytes(path.read_bytes())
    done = []
    real = coco._finish_image
    monkeypatch.setattr(coco, "_finish_image", lambda item: done.append(item[0]) or real(item))
    run("coco", damaged, tmp_path / "out", subset=False)
    assert done == ["train2014"] * 9
    again, first = contents(tmp_path / "out"), contents(tmp_path / "once")
    for name in ("manifest.json", "annotations/instances_train2014.json"):  # this one was written anew by `change`
        assert again.pop(name) and first.pop(name)
    assert again == first


# ---------------------------------------------------------------------------------------------- damaged annotations


def edited(content: dict) -> None:
    images, annotations = content["images"], content["annotations"]
    by_image = {image["id"]: image for image in images}
    annotations[0]["category_id"] = 12  # a hole
    annotations[1]["image_id"] = 10**9
    annotations[3]["id"] = annotations[4]["id"]
    images.append({**images[-1], "file_name": "other.jpg"})
    other = next(a for a in annotations[5:] if a["image_id"] != annotations[0]["image_id"])
    other["segmentation"] = {"size": [3, 3], "counts": [9]}
    content["expected"] = [by_image[annotations[0]["image_id"]]["file_name"], by_image[other["image_id"]]["file_name"]]


def test_entries_that_fit_to_nothing_are_reported(folders, tmp_path):
    unknown, wrong_size = change(folders, edited)["expected"]
    with pytest.raises(UserError, match="4 files cannot be used"):
        run("coco", folders, tmp_path / "out")
    file = "annotations/instances_train2014.json"
    found = {(row[0], row[1], row[3]): row[2] for row in problems(tmp_path / "out")}
    left_out = "left out of the lists"
    assert "unknown category 12" in found[f"train2014/{unknown}", "error", left_out]
    assert "is [3, 3] (height, width), the image" in found[f"train2014/{wrong_size}", "error", left_out]
    assert "is of image 1000000000, which is not listed" in found[file, "error", "the annotation is left out"]
    assert "comes twice" in found[file, "error", left_out]
    assert "comes more than once" in found[file, "note", "all of them are used"]
    run("coco", folders, tmp_path / "out", on_problem="continue")
    data = coco_split(tmp_path / "out", "train-82k")
    assert len(data) == 7 and not {unknown, wrong_size, "other.jpg"} & set(data.files)


def broken(key: str, **values):
    return lambda content: content[key][0].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c.update(images=[]), "has no list 'images' with entries"),
        (broken("images", id="7"), "in 'images' 'id' of an entry is '7'; expected a whole number"),
        (broken("images", id=2**70), "in 'images' 'id' of an entry is"),
        (broken("images", file_name="../x.jpg"), "file_name '../x.jpg', which is not the name of a file"),
        (broken("images", width=0), "is 32 x 0 pixels|is 24 x 0 pixels"),
        (broken("annotations", image_id=True), "in 'annotations' 'image_id' of an entry is 'True'"),
        (lambda c: c["annotations"].insert(0, [1]), r"in 'annotations' 'image_id' of an entry is '\[1\]'"),
        (lambda c: c["categories"].append(c["categories"][0]), "category 1 'class 1' comes twice"),
        (broken("categories", name="other"), "the categories of .*val2014.json are not those of"),
    ],
)
def test_a_file_that_is_not_cocos_is_one_sentence(folders, tmp_path, edit, message):
    change(folders, edit)
    with pytest.raises(UserError, match=message):
        run("coco", folders, tmp_path / "out")


def test_the_index_is_what_a_parser_of_the_whole_finds(folders, monkeypatch):
    path = folders / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content = {"version": 20140901.25, **content}  # a number may go on behind the window
    content["annotations"][2]["note"] = 'é€😀 \\" ] }'
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    for block in (1, 7, 64, 2**22):  # values that go over the edge of the window
        monkeypatch.setattr(coco_index, "_BLOCK", block)
        index = AnnotationIndex(path)
        assert [image._asdict() for image in index.images] == [
            {key: image[key] for key in ("id", "file_name", "height", "width")} for image in content["images"]
        ]
        assert index.categories == {c["id"]: c["name"] for c in content["categories"]} and not index.defects
        for row, image in enumerate(content["images"]):
            assert index.annotations(row) == [a for a in content["annotations"] if a["image_id"] == image["id"]]


def test_a_truncated_or_damaged_file_is_one_sentence(folders, tmp_path):
    whole = (folders / "annotations" / "instances_val2014.json").read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "x.json"
    for cut in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="x.json is truncated or not readable JSON .* download it again"):
            AnnotationIndex(path)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            AnnotationIndex(path)
        except UserError:
            refused += 1
    assert 10 < refused < 150
