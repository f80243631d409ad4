"""VOC 2012 as it comes from other hands: files missing or unreadable, odd lists, the test set, links."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from launch import prepare_data
from tests.data import official
from tests.data.preparing import contents, manifest, problems, run
from tests.methods import pcre_runs
from wsss_dist.config import parse_config
from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.loader import build_inference_loader
from wsss_dist.data.prepare import voc
from wsss_dist.errors import UserError
from wsss_dist.evaluate import open_splits
from wsss_dist.pseudo_labels import make_pseudo_labels
from wsss_dist.trainer import Trainer

NAMES = official.voc_names()
BASE = "VOCdevkit/VOC2012"
SMALL = dict(zip(voc.COUNTS, (14, 14, 7, 4, 3, 7, 8, 9), strict=True))


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    return official.write_voc(tmp_path_factory.mktemp("voc") / "archives")


@pytest.fixture(scope="module")
def made(archives, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    run("voc", archives, out)
    return out


@pytest.fixture
def folders(tmp_path) -> Path:
    return official.write_voc(tmp_path / "folders", folders=True)


def dataset(root: Path, split: str):
    return build_dataset(DataConfig(format="voc", root=root, num_workers=0), split)


def test_missing_files_are_rows_and_not_counts(folders, tmp_path, monkeypatch):
    """Of each kind one file is missing; `continue` leaves out what needs it."""
    monkeypatch.setattr(voc, "COUNTS", SMALL)
    base, cls = folders / BASE, folders / "benchmark_RELEASE/dataset/cls"
    trainval, of_sbd = NAMES["train"] + NAMES["val"], NAMES["sbd_train"] + NAMES["sbd_val"]
    extra, both = (sorted(set(of_sbd) - set(trainval)), sorted(set(of_sbd) & set(trainval)))
    unlisted = sorted(set(NAMES["all"]) - set(trainval) - set(of_sbd))
    error, left_out = "error", "left out of the lists"
    wanted = {
        base / f"JPEGImages/{trainval[0]}.jpg": (error, "the file is missing", left_out),
        base / f"JPEGImages/{unlisted[0]}.jpg": (error, "the file is missing", left_out),
        base / f"Annotations/{trainval[1]}.xml": (error, "the file is missing", left_out),
        base / f"Annotations/{unlisted[1]}.xml": ("note", "the file is missing", "without tags"),
        base / f"SegmentationClass/{trainval[2]}.png": (error, "the official mask is missing", left_out),
        cls / f"{both[-1]}.mat": ("note", "the file is missing", "not used for an image of VOC's own lists"),
        cls / f"{extra[0]}.mat": (error, "there is no mask, nor one of SBD", left_out),
    }
    for path in wanted:
        path.unlink()
    out = tmp_path / "out"
    with pytest.raises(UserError, match="5 files cannot be used .first: VOC2012/Annotations/.*the file is missing"):
        run("voc", folders, out, subset=False)
    said = run("voc", folders, out, subset=False, on_problem="continue")
    assert "images: found 12, expected 14 (2 missing ones are in problems.csv)" in said
    shown = {cls / f"{extra[0]}.mat": f"VOC2012/SegmentationClass/{extra[0]}.png"}
    rows = problems(out)
    for path, row in wanted.items():
        place = f"cls/{path.name}" if path.suffix == ".mat" else str(path.relative_to(folders / "VOCdevkit"))
        assert (shown.get(path, place), *row) in rows
    assert len(dataset(out, "trainval")) == 4 and manifest(out)["left_out"] == 5
    # what no row explains still ends it
    shutil.rmtree(out)
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (base / folder / f"{unlisted[1]}.{ending}").unlink(missing_ok=True)
    with pytest.raises(UserError, match="not the official counts: images: found 11, expected 14; XML files: found 12"):
        run("voc", folders, out, subset=False, on_problem="continue")


def test_what_macos_adds_is_no_data(folders, made, tmp_path, monkeypatch):
    monkeypatch.setattr(voc, "COUNTS", SMALL)
    cls = folders / "benchmark_RELEASE/dataset/cls"
    for folder in (*(folders / BASE / name for name in ("JPEGImages", "Annotations", "SegmentationClass")), cls):
        for path in list(folder.iterdir()):
            (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    run("voc", folders, tmp_path / "out", subset=False)
    assert manifest(tmp_path / "out")["files"] == manifest(made)["files"]


@pytest.mark.parametrize("how", ["a folder", "the disk"])
def test_an_xml_that_cannot_be_read_is_a_row(folders, tmp_path, monkeypatch, how):
    path = folders / BASE / f"Annotations/{NAMES['train'][0]}.xml"
    reason = "Is a directory" if how == "a folder" else "Input/output error"
    if how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        real = Path.read_bytes

        def read(self: Path) -> bytes:
            if self.name == path.name:
                raise OSError(errno.EIO, "Input/output error", str(self))
            return real(self)

        monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(UserError, match=f"1 files cannot be used .first: VOC2012/Annotations/.*: {reason}"):
        run("voc", folders, tmp_path / "out")
    run("voc", folders, tmp_path / "out", on_problem="continue")
    assert len(dataset(tmp_path / "out", "train")) == 3
    if how == "a folder":
        with pytest.raises(UserError, match="xml cannot be read .Is a directory.; unpack the archive again"):
            dataset(folders, "train")


def test_a_list_that_cannot_be_read_is_one_sentence(folders, tmp_path, monkeypatch):
    real = Path.read_text

    def read(self: Path, **options: str) -> str:
        if self.name == "train.txt":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "read_text", read)
    for start in (lambda: run("voc", folders, tmp_path / "out"), lambda: dataset(folders, "train")):
        with pytest.raises(UserError, match="train.txt cannot be read .Input/output error.; unpack the archive again"):
            start()
    assert [row for row in problems(tmp_path / "out") if row[0].endswith("train.txt")]


def test_an_archive_brings_no_tags_of_its_own(archives, made, tmp_path):
    """A labels.csv in the prepared folder would replace the XML files."""
    source = shutil.copytree(archives, tmp_path / "source")
    rows = "image,labels\n" + "".join(f"{name}.jpg,person\n" for name in NAMES["all"])
    with tarfile.open(source / "VOCtrainval_11-May-2012.tar", "a") as archive:
        for name in ("labels.csv", "ImageSets/labels.csv", "SegmentationClassAug/x.png"):
            entry = tarfile.TarInfo(f"{BASE}/{name}")
            entry.size = len(rows)
            archive.addfile(entry, io.BytesIO(rows.encode()))
    run("voc", source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(made)


def test_the_source_may_be_named_from_inside(folders, made, tmp_path, monkeypatch):
    monkeypatch.chdir(folders / BASE)
    run("voc", Path(), tmp_path / "out", sources=(Path(), Path("../../benchmark_RELEASE/dataset")))
    assert manifest(tmp_path / "out") == manifest(made)


def test_lists_as_others_write_them(folders, made, tmp_path):
    lists = folders / BASE / "ImageSets/Segmentation"
    (lists / "train.txt").write_bytes(b"\xef\xbb\xbf" + (lists / "train.txt").read_bytes().replace(b"\n", b"\r\n"))
    (lists / "val.txt").write_text("".join(f"/JPEGImages/{name}.jpg x\n" for name in NAMES["val"]))
    run("voc", folders, tmp_path / "out")
    assert manifest(tmp_path / "out") == manifest(made)
    data = dataset(folders, "val")
    assert data.files.tolist() == [f"{name}.jpg" for name in NAMES["val"]]
    assert dataset(folders, "train").files.tolist() == [f"{name}.jpg" for name in NAMES["train"]]


def test_a_name_with_a_dot_is_one_name(folders, tmp_path):
    """`img.v1` and `img.v2` are two images."""
    base = folders / BASE
    for old, new in zip(NAMES["val"], ("img.v1", "img.v2", "img"), strict=True):
        for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
            (base / folder / f"{old}.{ending}").rename(base / folder / f"{new}.{ending}")
    (base / "ImageSets/Segmentation/val.txt").write_text("img.v1\nimg.v2\nimg\n")
    for name in ("train", "val"):
        path = folders / f"benchmark_RELEASE/dataset/{name}.txt"
        path.write_text("".join(f"{n}\n" for n in path.read_text().split() if n not in NAMES["val"]))
    (base / "ImageSets/Segmentation/trainval.txt").write_text("\n".join([*NAMES["train"], "img.v1", "img.v2", "img"]))
    run("voc", folders, tmp_path / "out")
    assert dataset(tmp_path / "out", "val").files.tolist() == ["img.v1.jpg", "img.v2.jpg", "img.jpg"]


def test_file_names_that_are_no_text(folders, tmp_path, capsys):
    """Such a file is in no list, which is text; it is checked, noted in the journal, written and said."""
    Path(os.fsdecode(bytes(folders / BASE / "JPEGImages") + b"/caf\xe9.jpg")).write_bytes(b"x")
    command = ["voc", "--source", str(folders), "--out", str(tmp_path / "out"), "--workers", "0", "--subset"]
    with pytest.raises(UserError, match="1 files cannot be used .first: VOC2012/JPEGImages/caf\udce9.jpg: not a pict"):
        run("voc", folders, tmp_path / "out")
    assert prepare_data.main([*command, "--on-problem", "continue"]) == 0
    assert "1 files cannot be used (first: VOC2012/JPEGImages/caf\\udce9.jpg: not a pic" in capsys.readouterr().out


def test_a_list_of_the_images_of_a_class_is_no_split(folders):
    path = folders / BASE / "ImageSets/Main/aeroplane_train.txt"
    path.write_text("2007_000000 -1\n2007_000006  1\n")
    with pytest.raises(
        UserError, match="aeroplane_train.txt says of each image whether it shows one class .'2007_0000"
    ):
        dataset(folders, "aeroplane_train")


def test_a_list_that_changed_between_two_attempts(folders, tmp_path):
    """The journal of a stopped run holds an image as one of no list; the resumed one ends as a fresh one does."""
    base, unlisted = folders / BASE, NAMES["all"][-1]
    broken = base / f"JPEGImages/{NAMES['train'][0]}.jpg"
    whole = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="1 files cannot be used"):
        run("voc", folders, tmp_path / "resumed")
    broken.write_bytes(whole)
    with (base / "ImageSets/Segmentation/train.txt").open("a") as file:
        file.write(f"\n{unlisted}\n")
    for out in (tmp_path / "resumed", tmp_path / "fresh"):
        with pytest.raises(
            UserError, match="1 files cannot be used .*SegmentationClass/.*the official mask is missing"
        ):
            run("voc", folders, out)


@pytest.mark.parametrize("place", ["VOC2012", "VOC2012/SegmentationClassAug", "VOC2012/ImageSets", "legacy"])
def test_nothing_is_written_through_a_link(folders, tmp_path, place):
    target = folders / BASE if place == "VOC2012" else tmp_path / "theirs"
    (tmp_path / "theirs").mkdir()
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    before = contents(folders)
    with pytest.raises(UserError, match=f"{place} is a link, and nothing is written through it"):
        run("voc", folders, tmp_path / "out", legacy=True)
    assert contents(folders) == before and not any((tmp_path / "theirs").iterdir())


# --------------------------------------------------------------------------------------------------------- the test set


@pytest.mark.parametrize("packed", [True, False])
def test_the_test_set_is_prepared_and_opened(tmp_path, monkeypatch, made, packed):
    """Nine images, three of them in the list for segmentation, two with the boxes of other tasks."""
    source = official.write_voc(tmp_path / "source", folders=not packed, test=official.SMALL_TEST)
    monkeypatch.setattr(voc, "COUNTS", SMALL)
    monkeypatch.setattr(voc, "TEST", {"test": 3})
    out = tmp_path / "out"
    said = run("voc", source, out, subset=False)
    assert "images: found 14, expected 14" in said and "XML files: found 14, expected 14" in said
    data = dataset(out, "test")
    assert data.files.tolist() == [f"{name}.jpg" for name in official.voc_test_names(3)] and not data.tags.any()
    cfg = DataConfig(format="voc", root=out, num_workers=0)
    samples = list(build_inference_loader(data, cfg, range(3)))
    assert [sample.image.shape[1:] for sample in samples] == [data.image(i).shape[:2] for i in range(3)]
    with pytest.raises(UserError, match="VOC2012/test' has no masks, which an evaluation needs"):
        data.mask(0)
    assert not data.has_masks and dataset(out, "val").has_masks
    # nothing else is changed by it, and no row complains of it
    assert problems(out) == problems(made)
    of_test = {name for name in manifest(out)["files"] if "_900" in name}
    assert len([name for name in of_test if "JPEGImages" in name]) == 9
    ours = {k: v for k, v in manifest(out)["files"].items() if k not in of_test and "test.txt" not in k}
    assert ours == manifest(made)["files"]
    assert "is complete" in run("voc", source, out, subset=False)[-1]


def test_labels_are_made_of_the_test_set_and_it_is_never_scored(tmp_path):
    run("voc", official.write_voc(tmp_path / "source", test=official.SMALL_TEST), tmp_path / "out")
    values = pcre_runs.values(engine="plain", steps=1)
    values["run"] = {"name": "small", "dir": str(tmp_path)}
    values["data"] = {"format": "voc", "root": str(tmp_path / "out"), "train_split": "train_aug", "crop": 64}
    values["data"] |= {"num_workers": 0, "eval_splits": []}
    values["eval"] = {"size": 64, "cam_scales": [1.0], "seg_scales": [1.0], "crf": {"iterations": 1}}
    values["optim"]["warmup_steps"] = 0
    cfg = parse_config(values)
    with pytest.raises(UserError, match="evaluation: split 'test' of .* has no masks, so it cannot be scored"):
        open_splits(cfg, ["test"])
    assert Trainer(cfg).train() == 0
    made = make_pseudo_labels(cfg, tmp_path / "small", tmp_path / "labels", "seg_crf", ["test"], lambda line: None)
    assert made.images == {"test": 3} and not made.scores
    files = sorted(path.stem for path in (tmp_path / "labels").rglob("*.png"))
    assert files == sorted(official.voc_test_names(3))


def test_images_of_other_lists_are_never_without_tags_in_silence(folders, tmp_path):
    lists, xml = folders / BASE / "ImageSets/Segmentation", folders / BASE / "Annotations"
    for name in NAMES["val"]:
        (xml / f"{name}.xml").unlink()
    with pytest.raises(UserError, match="xml is missing, so the tags of .* are unknown"):
        dataset(folders, "val")
    # nor is a list of this name in which some have an XML
    (lists / "test.txt").write_text(f"{NAMES['val'][0]}\n{NAMES['train'][0]}\n")
    with pytest.raises(UserError, match="xml is missing, so the tags of .* are unknown"):
        dataset(folders, "test")
    (lists / "test.txt").write_text(f"{NAMES['val'][0]}\n")
    assert not dataset(folders, "test").tags.any()


def test_a_test_image_that_is_damaged_or_missing(tmp_path):
    source, names = official.write_voc(tmp_path / "source", folders=True, test=(9, 3, 2)), official.voc_test_names(9)
    for name, content in ((names[0], None), (names[1], b"")):
        (source / BASE / f"JPEGImages/{name}.jpg").unlink()
        if content is not None:
            (source / BASE / f"JPEGImages/{name}.jpg").write_bytes(content)
    with pytest.raises(
        UserError, match=f"1 files cannot be used .first: VOC2012/JPEGImages/{names[1]}.jpg: the file is"
    ):
        run("voc", source, tmp_path / "out")
    run("voc", source, tmp_path / "out", on_problem="continue")
    assert dataset(tmp_path / "out", "test").files.tolist() == [f"{names[2]}.jpg"]


def test_the_archive_of_the_test_set_is_not_passed_over(tmp_path, folders):
    packed = official.write_voc(tmp_path / "packed", test=official.SMALL_TEST)
    shutil.copy(packed / "VOC2012test.tar", folders)
    with pytest.raises(UserError, match="VOC2012test.tar is packed and .*VOC2012 is not, .*; unpack it there"):
        run("voc", folders, tmp_path / "out")
    # nor where a folder without it is complete
    test = (packed / "VOC2012test.tar").rename(tmp_path / "VOC2012test.tar")
    run("voc", packed, tmp_path / "two")
    with pytest.raises(UserError, match="made with other settings .test None instead of 'VOC2012test.tar'"):
        run("voc", packed, tmp_path / "two", sources=(packed, test))
