"""Every kind of bad input of every format is in one summary, with path and reason; commands go on or stop as told.

The other tests of what preparations report are in test_prepare_coco_damaged, test_prepare_voc and test_prepare_folder.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import official, sets
from tests.data.bad_input import QUIET, has, made, table
from tests.data.preparing import change, manifest, picture, problems, run
from tests.data.shards_made import write as write_shards
from wsss_dist.data import build_dataset, build_eval_loader, build_train_loader
from wsss_dist.data.prepare.check import check
from wsss_dist.data.problems import noted
from wsss_dist.errors import BadFile, UserError

# ------------------------------------------------------------------------------------------------- damaged archives


def break_member(path: Path, number: int) -> str:
    """Change bytes of a stored member of a zip; returns its name."""
    with zipfile.ZipFile(path) as archive:
        member = [entry for entry in archive.infolist() if not entry.is_dir()][number]
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.file_size // 2] ^= 255
    path.write_bytes(data)
    return member.filename


def test_a_damaged_zip_stops_or_is_used_as_far_as_it_goes(tmp_path):
    archives, out = official.write_coco(tmp_path / "archives"), tmp_path / "out"
    name = break_member(archives / "train2014.zip", 2)
    with pytest.raises(UserError, match="train2014.zip .* is truncated or damaged .Bad CRC-32 .*download it again"):
        run("coco", archives, out)
    assert has(table(out / "problems.csv"), str(archives / "train2014.zip"), "truncated or damaged (Bad CRC-32")
    assert not (out / "manifest.json").exists()
    run("coco", archives, out, on_problem="continue")
    rows = table(out / "problems.csv")
    assert has(rows, f"{archives / 'train2014.zip'}:{name}", "Bad CRC-32") and len(rows) == 1
    assert manifest(out)["counts"]["train-82k images"] == 8 and name not in manifest(out)["files"]


def test_a_truncated_zip_is_named_and_nothing_is_made(tmp_path):
    archives, out = official.write_coco(tmp_path / "archives"), tmp_path / "out"
    path = archives / "annotations_trainval2014.zip"
    path.write_bytes(path.read_bytes()[:-400])
    for on_problem in ("stop", "continue"):
        with pytest.raises(UserError):
            run("coco", archives, out, on_problem=on_problem)
        assert has(table(out / "problems.csv"), str(path), "truncated or damaged")
        assert not (out / "manifest.json").exists()


def test_a_truncated_tar_stops_or_is_used_as_far_as_it_goes(tmp_path):
    archives, out = official.write_voc(tmp_path / "archives"), tmp_path / "out"
    path = archives / "benchmark.tgz"
    with tarfile.open(path) as archive:
        content = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}
    late = [name for name in content if name.endswith(".mat") and "/cls/" in name][-1]
    with tarfile.open(path.with_suffix(".new"), "w", format=tarfile.GNU_FORMAT) as archive:
        for name in sorted(content, key=lambda name: name == late):
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            archive.addfile(member, io.BytesIO(content[name]))
    whole = path.with_suffix(".new").read_bytes()
    path.write_bytes(whole[: whole.index(late.encode()) + 600])
    with pytest.raises(UserError, match="benchmark.tgz .* is truncated or damaged"):
        run("voc", archives, out)
    assert has(table(out / "problems.csv"), str(path), "truncated or damaged")
    run("voc", archives, out, on_problem="continue")
    rows = table(out / "problems.csv")
    assert has(rows, str(path), "truncated or damaged")
    mask = f"VOC2012/SegmentationClass/{Path(late).stem}.png"
    assert has(rows, mask, "there is no mask, nor one of SBD") and len(rows) == 2
    assert manifest(out)["left_out"] == 1 and len(build_dataset(sets.config(out, "voc"), "train_aug")) == 8


def test_an_archive_that_leads_outside_is_refused_whatever_is_asked_for(tmp_path):
    archives = official.write_coco(tmp_path / "archives")
    with zipfile.ZipFile(archives / "val2014.zip", "a") as archive:
        archive.writestr("../../evil.jpg", b"x")
    with pytest.raises(UserError, match="evil.jpg', which leads out of the folder"):
        run("coco", archives, tmp_path / "out", on_problem="continue")
    assert has(table(tmp_path / "out/problems.csv"), str(archives / "val2014.zip"), "leads out of the folder")


def test_an_annotation_file_that_cannot_be_read_is_in_the_table(tmp_path):
    folders, out = official.write_coco(tmp_path / "folders", folders=True), tmp_path / "out"
    path = folders / "annotations/instances_val2014.json"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="truncated or not readable JSON"):
        run("coco", folders, out, on_problem="continue")
    assert has(
        table(out / "problems.csv"), str(out / "annotations/instances_val2014.json"), "truncated or not readable"
    )
    change(official.write_coco(tmp_path / "two", folders=True), lambda c: c["categories"].append(c["categories"][0]))
    with pytest.raises(UserError):
        run("coco", tmp_path / "two", tmp_path / "out2")
    ((where, (reason,)),) = table(tmp_path / "out2/problems.csv").items()
    assert where.endswith("instances_train2014.json") and "category 1 'class 1' comes twice" in reason


# --------------------------------------------------------------------------------------------------- folder format


def test_every_wrong_row_of_every_list_of_a_folder_is_named(tmp_path):
    root = sets.write_folder(tmp_path / "own")
    shutil.copytree(root / "train", root / "val")
    (root / "train/labels.csv").write_text("image,labels\na.png,bat\nb.jpg,cow;rat\nc.jpg\n")
    (root / "val/labels.csv").write_text("image,labels\na.png,cat\na.png,cat\nb.jpg,cat\nb.jpg,dog\n")
    (root / "val/images/c.jpg").unlink()
    shutil.copytree(root / "val", root / "more")
    (root / "more/labels.csv").write_text("image,labels\nc.jpg,cat\nb.jpg,cat\n")
    shutil.copytree(root / "val", root / "pairs")
    (root / "pairs/labels.csv").write_text("image,labels\na.png,cat\nb.jpg,cat\na.jpg,cow\nb.png,cat\n")
    (root / "more/images/b.jpg").write_bytes(b"")
    for on_problem in ("stop", "continue"):
        with pytest.raises(UserError, match="labels.csv"):
            run("folder", None, root, on_problem=on_problem)
        rows = table(root / "problems.csv")
        assert has(rows, "train/labels.csv", "image a.png has the unknown class name 'bat'")
        assert has(rows, "train/labels.csv", "image b.jpg has the unknown class name 'rat'")
        assert has(rows, "train/labels.csv", "row 4 has 1 cells")
        assert has(rows, "val/labels.csv", "images: a.png is there more than once")
        assert has(rows, "val/labels.csv", "images: b.jpg is there more than once")
        assert has(rows, "more/images/c.jpg", "the file is missing")
        assert has(rows, "more/images/b.jpg", "the file is empty") and sum(map(len, rows.values())) == 9
        assert has(rows, "pairs/labels.csv", "the images a.png and a.jpg have one id, a")
        assert has(rows, "pairs/labels.csv", "the images b.jpg and b.png have one id, b")
        assert not (root / "manifest.json").exists()


def test_unusual_pictures_of_a_folder_are_notes_and_do_not_stop(tmp_path):
    root = sets.write_folder(tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "train/images/a.png").write_bytes(picture("PNG", "I;16"))
    (root / "train/images/b.jpg").write_bytes(picture("JPEG", "CMYK"))
    (root / "train/images/c.jpg").write_bytes(picture("JPEG", "RGB", exif=exif))
    run("folder", None, root)
    assert [row[:3] for row in problems(root)] == [
        ("train/images/a.png", "note", "16-bit grey (mode I;16)"),
        ("train/images/b.jpg", "note", "mode CMYK"),
        ("train/images/c.jpg", "note", "turned by EXIF (orientation 6)"),
    ]


# ------------------------------------------------------------------------------- check: what the loader would meet


def checked(form: str, root: Path, split: str) -> dict[str, list[str]]:
    try:
        check(f"{form}:{root}", [split], None, None, 0, QUIET)
    except UserError as error:
        assert f"{root}/check.csv names them all" in str(error) and "data.leave_out=" in str(error)
        assert table(root / "check.csv")
    return table(root / "check.csv")


@pytest.mark.parametrize("form", ["coco", "voc", "folder"])
def test_a_set_without_a_manifest(form, tmp_path):
    root, split, images, masks = made(form, tmp_path / "set")
    assert checked(form, root, split) == {}
    first, second = sorted(images.iterdir())[:2]
    below = {p: str(p.relative_to(root)) for p in (first, second)}
    sound = masks / f"{first.stem}.png"
    broken = {
        "the file is empty": lambda: first.write_bytes(b""),
        "truncated": lambda: sets.picture().save(first) or first.write_bytes(first.read_bytes()[:-40]),
        "not a picture of a known format": lambda: first.write_bytes(b"<html>"),
    }
    whole = first.read_bytes()
    for reason, damage in broken.items():
        damage()
        rows = checked(form, root, split)
        assert has(rows, below[first], reason) and len(rows) == 1
        first.write_bytes(whole)
    for values, mode, reason in (
        (np.full((20, 30), 77, np.uint8), "L", "holds the ids [77]"),
        (np.zeros((20, 30, 4), np.uint8), "RGBA", "is a picture of mode 'RGBA'"),
        (np.zeros((7, 9), np.uint8), "L", "7 x 9 (height, width), the image 20 x 30"),
    ):
        Image.fromarray(values, mode).save(sound)
        rows = checked(form, root, split)
        assert has(rows, str(sound.relative_to(root)), reason) and len(rows) == 1
    sound.write_bytes(b"")
    first.unlink()
    second.write_bytes(b"")
    rows = checked(form, root, split)
    assert has(rows, below[first], "the file is missing, and") and has(rows, below[second], "the file is empty")
    assert len(rows) == 2, "the mask of an image that is not there does not matter"


def test_mistakes_in_lists_are_all_in_the_table(tmp_path):
    coco = sets.write_coco(tmp_path / "coco")
    sets.rewrite(coco, lambda c: [a.update(category_id=55) for a in c["annotations"][:2]])
    rows = checked("coco", coco, "train")
    assert has(rows, "annotations/train.json", "image 007.jpg has the unknown class id 55")
    sets.rewrite(coco, lambda c: [image.update(labels=["cat"]) for image in c["images"]])
    with_labels = checked("coco", coco, "train")
    assert has(with_labels, "annotations/train.json", "image 007.jpg has the unknown class id 55")
    sets.rewrite(coco, lambda c: [image.pop("labels") for image in c["images"]])
    sets.rewrite(coco, lambda c: [a.update(category_id=3) for a in c["annotations"]])
    sets.rewrite(coco, lambda c: c["images"].extend(c["images"][:2]))
    assert table_of_ids(checked("coco", coco, "train")) == ["image ids: 5", "image ids: 7"]
    sets.rewrite(coco, lambda c: c.update(images=c["images"][:3]))
    sets.rewrite(coco, lambda c: [image.update(file_name="007.jpg") for image in c["images"]])
    found = checked("coco", coco, "train")
    assert found == {"annotations/train.json": ["the images 007.jpg and 007.jpg have one id, 007"]}
    voc = sets.write_voc(tmp_path / "voc")
    base = voc / "VOCdevkit/VOC2012"
    (base / "Annotations/2007_a.xml").write_text("<annotation>")
    (base / "Annotations/2008_b.xml").unlink()
    rows = checked("voc", voc, "train_aug")
    assert has(rows, "VOCdevkit/VOC2012/Annotations/2007_a.xml", "is not readable XML")
    assert has(rows, "VOCdevkit/VOC2012/Annotations/2008_b.xml", "the file is missing")
    (base / "ImageSets/Segmentation/val.txt").write_text("2007_a\n2007_a\n")
    assert has(
        checked("voc", voc, "val"), "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "2007_a is there more than once"
    )
    own = sets.write_folder(tmp_path / "own", ["image,labels", "/etc/passwd,cat", "../../x.jpg,cat"])
    rows = checked("folder", own, "train")
    assert has(rows, "train/labels.csv", "'/etc/passwd' leads out") and has(rows, "train/labels.csv", "'../../x.jpg'")


def table_of_ids(rows: dict[str, list[str]]) -> list[str]:
    return sorted(reason.split(" is there")[0] for reason in rows["annotations/train.json"])


def test_a_set_of_shards(tmp_path):
    root, split, images, _ = made("folder", tmp_path / "set")
    (images / "b.jpg").write_bytes(b"<html>")
    out = write_shards(root, tmp_path / "out", form="folder", masks=True)
    (name,) = checked("shards", out, split)
    assert name == "train/train-000000.tar:b.jpg"
    data = build_dataset(sets.config(out, "shards", leave_out=out / "check.csv"), split)
    assert data.unusable == 1 and data.files.tolist() == ["a.png", "c.jpg"]


def test_a_mask_in_shards_that_is_left_out_counts_for_evaluations_alone(tmp_path):
    root, split, _, masks = made("folder", tmp_path / "set")
    (masks / "b.png").write_bytes(b"")
    Image.new("L", (7, 9)).save(masks / "c.png")
    out = write_shards(root, tmp_path / "out", form="folder", masks=True)
    rows = checked("shards", out, split)
    assert has(rows, "train/train-000000.tar:b.jpg (its mask)", "cannot be read (the file is empty)")
    assert has(rows, "train/train-000000.tar:c.jpg (its mask)", "its mask is 9 x 7")
    for splits, images in (([split], ["a.png"]), (["val"], ["b.jpg", "a.png", "c.jpg"])):
        cfg = sets.config(out, "shards", leave_out=out / "check.csv", eval_splits=splits)
        assert build_dataset(cfg, split).files.tolist() == images


# ------------------------------------------------------------------------------------- training and evaluation read


@pytest.mark.parametrize("form", ["coco", "voc", "folder"])
def test_a_list_that_names_missing_files_stops_or_goes_on(form, tmp_path):
    root, split, images, masks = made(form, tmp_path / "set")
    whole = build_dataset(sets.config(root, form), split)
    first = Path(str(whole.path(0)))
    first.unlink()
    with pytest.raises(BadFile, match=f"names 1 of {len(whole)} images that are not in"):
        build_dataset(sets.config(root, form), split)
    assert checked(form, root, split).keys() == {str(first.relative_to(root))}
    cfg = sets.config(root, form, leave_out=root / "check.csv", eval_splits=[split])
    data = build_dataset(cfg, split)
    assert data.unusable == 1 and data.files.tolist() == whole.files.tolist()[1:]
    assert (data.tags == whole.tags[1:]).all()
    assert len(list(build_eval_loader(data, cfg, range(len(data))))) == len(whole) - 1
    loader = build_train_loader(
        data, cfg, seed=0, global_batch=1, micro_batch=1, rank=0, world_size=1, start_step=0, num_steps=1
    )
    ((batch,),) = list(loader)
    assert batch.damaged == []


def test_a_mask_that_is_left_out_counts_for_evaluations_alone(tmp_path):
    root, split, _, masks = made("folder", tmp_path / "set")
    (masks / "b.png").write_bytes(b"")
    checked("folder", root, split)
    cfg = sets.config(root, "folder", leave_out=root / "check.csv", eval_splits=["val"])
    assert len(build_dataset(cfg, split)) == 3
    cfg = sets.config(root, "folder", leave_out=root / "check.csv", eval_splits=[split])
    data = build_dataset(cfg, split)
    assert data.files.tolist() == ["a.png", "c.jpg"]
    assert len(list(build_eval_loader(data, cfg, range(len(data))))) == 2


def test_an_evaluation_stops_at_a_bad_file_and_names_it(tmp_path):
    root, split, images, masks = made("folder", tmp_path / "set")
    cfg = sets.config(root, "folder", eval_splits=[split])
    (masks / "c.png").write_bytes(b"")
    runs = tmp_path / "run"
    runs.mkdir()
    for damaged, reason in ((masks / "c.png", "cannot be read (the file is empty)"), (images / "a.png", "truncated")):
        if damaged.stem == "a":
            damaged.write_bytes(damaged.read_bytes()[:-30])
        with pytest.raises(BadFile), noted(runs):
            rows = range(3) if damaged.stem == "a" else [2]
            data = build_dataset(cfg, split)
            loader = build_eval_loader(data, cfg, range(len(data)))
            for row in rows:
                item = loader.dataset[data.files.tolist().index(("b.jpg", "a.png", "c.jpg")[row])]
                if isinstance(item, UserError):
                    raise item
        assert has(table(runs / "problems.csv"), str(damaged), reason)
    assert len(table(runs / "problems.csv")) == 2, "the rows of the first are kept"


def test_everything_of_a_split_left_out_is_an_error(tmp_path):
    root, split, images, _ = made("folder", tmp_path / "set")
    for path in images.iterdir():
        path.write_bytes(b"")
    checked("folder", root, split)
    with pytest.raises(UserError, match="data.leave_out names all 3 images of 'set/train'; repair the files"):
        build_dataset(sets.config(root, "folder", leave_out=root / "check.csv"), split)


def test_labels_that_cannot_be_imported_are_in_the_table(tmp_path):
    folders, path = official.write_coco(tmp_path / "folders", folders=True), tmp_path / "cls_labels_onehot.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(UserError, match="is no cls_labels_onehot.npy"):
        run("coco", folders, tmp_path / "out", labels=path)
    assert has(table(tmp_path / "out/problems.csv"), str(path), "is no cls_labels_onehot.npy")
