"""Each mistake gives one sentence that names the file or key, what was found, what was expected, and the fix."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data import sets
from wsss_dist.data import DataConfig, build_dataset, build_eval_loader
from wsss_dist.errors import UserError
from wsss_dist.schema import parse


def coco(root, change=None):
    sets.write_coco(root)
    if change:
        sets.rewrite(root, change)
    return sets.config(root)


def set_key(content, *path_and_value):
    *path, key, value = path_and_value
    for step in path:
        content = content[step]
    content[key] = value


CHANGES = {
    r"train.json names 2 of 3 images that are not in .*images/train \(first: x.jpg, y.jpg\); copy": lambda c: (
        set_key(c, "images", 0, "file_name", "x.jpg"),
        set_key(c, "images", 2, "file_name", "y.jpg"),
    ),
    r"image 007.jpg has the unknown class id 4; expected one of 3, 18, 90": lambda c: set_key(
        c, "annotations", 0, "category_id", 4
    ),
    r"image 007.jpg has the unknown class name 'bat'; expected one of cat, dog, cow": lambda c: [
        set_key(image, "labels", ["bat"]) for image in c["images"]
    ],
    r"image 007.jpg has the unknown class id 99; expected one of 3, 18, 90": lambda c: (
        [set_key(image, "labels", []) for image in c["images"]],
        set_key(c, "annotations", 0, "category_id", 99),
    ),
    r"image 005.jpg has no list 'labels', though others have one": lambda c: set_key(c, "images", 0, "labels", []),
    r"holds 1 image ids more than once \(first: 7\).*remove the repetitions": lambda c: set_key(
        c, "images", 2, "id", 7
    ),
    r"holds 1 images with the id of another \(first: 007.jpg and 007.jpg\); expected .* rename": lambda c: set_key(
        c, "images", 2, "file_name", "007.jpg"
    ),
    r"images with the id of another \(first: 007.jpg and 007.png\); expected names that differ": lambda c: set_key(
        c, "images", 2, "file_name", "007.png"
    ),
    r"holds 1 category ids more than once": lambda c: set_key(c, "categories", 0, "id", 3),
    r"holds 1 category names more than once \(first: cat\)": lambda c: set_key(c, "categories", 0, "name", "cat"),
    r"has 2 annotations of images it does not list \(first: image ids \[7, 7\]\)": lambda c: set_key(
        c, "images", c["images"][1:]
    ),
    r"train.json lists no image; expected at least one": lambda c: set_key(c, "images", []),
    r"has 0 categories; expected 1 to 254": lambda c: set_key(c, "categories", []),
    r"has no list 'annotations'; expected COCO JSON": lambda c: c.pop("annotations"),
    r"'file_name' of images\[1\] is None; expected a string": lambda c: c["images"][1].pop("file_name"),
    r"'id' of images\[0\] is \[1\]; expected a number or a string": lambda c: set_key(c, "images", 0, "id", [1]),
    r"'id' of categories\[0\] is 'thing'; expected a whole number": lambda c: set_key(c, "categories", 0, "thing"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_coco_annotations(tmp_path, message):
    with pytest.raises(UserError, match=message):
        build_dataset(coco(tmp_path, CHANGES[message]), "train")


def test_coco_unreadable_json(tmp_path):
    cfg = coco(tmp_path)
    path = tmp_path / "annotations" / "train.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="train.json is not readable JSON .*; download or write it again"):
        build_dataset(cfg, "train")
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="train.json is not readable JSON"):
        build_dataset(cfg, "train")


@pytest.mark.parametrize("form", ["coco", "voc", "folder"])
def test_missing_root(tmp_path, form):
    cfg = sets.config(tmp_path / "nowhere", form)
    with pytest.raises(UserError, match="data.root is '.*nowhere', which is not a folder; give the folder"):
        build_dataset(cfg, "train")


@pytest.mark.parametrize(
    ("form", "write", "found"),
    [
        ("coco", sets.write_coco, "train"),
        ("voc", sets.write_voc, "train_aug, val"),
        ("folder", sets.write_folder, "train"),
    ],
)
def test_missing_split_names_those_that_exist(tmp_path, form, write, found):
    with pytest.raises(UserError, match=f"split 'test' has no .*splits found: {found}. Correct data"):
        build_dataset(sets.config(write(tmp_path), form), "test")


def test_coco_missing_image_folder(tmp_path):
    cfg = coco(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match="no images of split 'train': expected the folder .*images/train or .*train"):
        build_dataset(cfg, "train")


def test_coco_classes_that_do_not_agree(tmp_path):
    coco(tmp_path)
    wrong = sets.config(tmp_path, classes=["cat", "dog", "sow"])
    with pytest.raises(UserError, match=r"data.classes .*not in the file: \['sow'\]; not in the list: \['cow'\]"):
        build_dataset(wrong, "train")
    with pytest.raises(UserError, match="data.classes does not agree .*the order differs"):
        build_dataset(sets.config(tmp_path, classes=["dog", "cat", "cow"]), "train")


def test_coco_all_untagged(tmp_path):
    coco(tmp_path, lambda c: c["annotations"].clear())
    with pytest.raises(UserError, match="no image of '.*/train' has a tag and data.untagged is 'drop'"):
        build_dataset(sets.config(tmp_path, untagged="drop"), "train")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 31], "counts": [620]}, r"a mask of 007 is \[20, 31\] \(height, width\), the image \[20, 30\]"),
        ({"size": [20, 30], "counts": [5, 5]}, "of 007 is no polygon and no RLE"),
        ({"size": [20, 30]}, "of 007 is no polygon and no RLE"),
        (None, "of 007 is no polygon and no RLE"),
        ("x", "of 007 is no polygon and no RLE"),
        ([5], "of 007 is no polygon and no RLE"),
    ],
)
def test_coco_segmentation(tmp_path, segmentation, message):
    cfg = coco(tmp_path, lambda c: set_key(c, "annotations", 0, "segmentation", segmentation))
    with pytest.raises(UserError, match=message):
        build_dataset(cfg, "train").mask(0)


FOLDER_ROWS = {
    "the first line of .*labels.csv is 'a.png,cat'; expected the header 'image,labels'": ["a.png,cat"],
    "the first line of .*labels.csv is ''": [""],
    "image a.png has the unknown class name 'bat'; expected one of cat, dog, cow": ["image,labels", "a.png,bat"],
    "row 2 of .*labels.csv has 3 cells; expected two": ["image,labels", "a.png,cat,dog"],
    "row 3 of .*labels.csv names no image; expected one, as a.jpg: correct": ["image,labels", "a.png,cat", " ,dog"],
    r"images with the id of another \(first: a.png and a.jpg\); .* rename": ["image,labels", "a.png,cat", "a.jpg,cat"],
    r"with the id of another \(first: b/a.x and b/./a.y\)": ["image,labels", "b/a.x,cat", "b/./a.y,cat"],
    "holds 1 images more than once": ["image,labels", "a.png,cat", "a.png,dog"],
    r"labels.csv names 1 of 1 images that are not in .*train/images \(first: z.png\)": ["image,labels", "z.png,cat"],
    "labels.csv lists no image": ["image,labels"],
}


@pytest.mark.parametrize("message", FOLDER_ROWS)
def test_folder_labels(tmp_path, message):
    root = sets.write_folder(tmp_path, FOLDER_ROWS[message])
    with pytest.raises(UserError, match=message):
        build_dataset(sets.config(root, "folder"), "train")


def test_folder_without_class_names(tmp_path):
    root = sets.write_folder(tmp_path)
    (root / "classes.txt").unlink()
    with pytest.raises(
        UserError, match="class names are unknown: .*classes.txt does not exist and data.classes is not"
    ):
        build_dataset(sets.config(root, "folder"), "train")


def test_folder_labels_not_utf8(tmp_path):
    root = sets.write_folder(tmp_path)
    (root / "train" / "labels.csv").write_bytes(b"image,labels\n\xff\xfe,cat\n")
    with pytest.raises(UserError, match="labels.csv is not a CSV file in UTF-8"):
        build_dataset(sets.config(root, "folder"), "train")


def test_voc_mistakes(tmp_path):
    with pytest.raises(UserError, match="which has no folder JPEGImages"):
        build_dataset(sets.config(tmp_path, "voc"), "val")
    base = sets.write_voc(tmp_path) / "VOCdevkit" / "VOC2012"
    cfg = sets.config(tmp_path, "voc")
    with pytest.raises(UserError, match="2007_a.xml has an object of the unknown class name 'cat'; expected one of x"):
        build_dataset(sets.config(tmp_path, "voc", classes=["x"]), "val")
    (base / "Annotations" / "2007_a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match="2007_a.xml is not readable XML"):
        build_dataset(cfg, "val")
    (base / "Annotations" / "2007_a.xml").unlink()
    with pytest.raises(UserError, match="2007_a.xml is missing, so the tags of 2007_a are unknown; .*labels.csv"):
        build_dataset(cfg, "val")
    (base / "labels.csv").write_text("image,labels\n2008_b,dog\n")
    with pytest.raises(UserError, match=r"labels.csv has no row for 1 images of the split \(first: 2007_a\)"):
        build_dataset(cfg, "val")
    (base / "JPEGImages" / "2007_a.jpg").unlink()
    with pytest.raises(UserError, match="val.txt names 1 of 1 images that are not in .*JPEGImages"):
        build_dataset(cfg, "val")
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt lists no image"):
        build_dataset(cfg, "val")


def evaluate(root):
    cfg = sets.config(root, "folder")
    data = build_dataset(cfg, "train")
    return list(build_eval_loader(data, cfg, range(len(data))))


def test_masks(tmp_path):
    root = sets.write_folder(tmp_path, ["image,labels", "b.jpg,dog"])
    with pytest.raises(UserError, match="'.*/train' has no masks, which an evaluation needs; add them, or take"):
        build_dataset(sets.config(root, "folder"), "train").mask(0)
    (root / "train" / "masks").mkdir()
    with pytest.raises(UserError, match="mask .*b.png is missing; expected one PNG"):
        evaluate(root)
    sets.add_mask(root, "b.png", {0: 4, 1: 200, 2: 255})
    with pytest.raises(UserError, match=r"b.png holds the ids \[4, 200\]; expected 0 \(background\), 1..3"):
        evaluate(root)
    sets.add_mask(root, "b.png", {0: 1}, size=(20, 31))
    with pytest.raises(UserError, match="mask of .*b.jpg is 20 x 31 .*, the image is 20 x 30; expected the same size"):
        evaluate(root)
    Image.fromarray(np.zeros((20, 30, 4), np.uint8)).save(root / "train" / "masks" / "b.png")
    with pytest.raises(UserError, match="b.png is a picture of mode 'RGBA'; expected 8-bit single-channel class ids"):
        evaluate(root)
    (root / "train" / "masks" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b.png cannot be read .*write it again"):
        evaluate(root)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": [2.0, 0.5]}, r"'data.scale' is .*range with 0 < low <= high"),
        ({"classes": ["a", "b", "a"]}, "'data.classes' is .*names a class twice: a"),
        ({"classes": []}, "must name 1 to 254 classes"),
        ({"format": "vok"}, "'data.format' is 'vok': .*'coco', 'voc', 'folder' or 'shards'"),
        ({"crop": 0}, "'data.crop' is 0"),
        ({"num_worker": 2}, "unknown key 'data.num_worker' .*did you mean 'num_workers'"),
    ],
)
def test_config(values, message):
    with pytest.raises(UserError, match=message):
        parse(DataConfig, {"format": "coco", "root": "x", **values}, "data")
