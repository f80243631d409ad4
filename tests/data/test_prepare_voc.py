"""VOC 2012 and SBD from archives and folders: train_aug, the masks of both, what is wrong with the input."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import official
from tests.data.preparing import contents, manifest, picture, problems, run
from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.prepare import matfile, voc
from wsss_dist.data.prepare.matfile import MatError, read_mat_field
from wsss_dist.errors import UserError

NAMES = official.voc_names()
NUMBER = {name: k for k, name in enumerate(NAMES["all"])}


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
    return build_dataset(DataConfig(format="voc", root=root), split)


@pytest.mark.parametrize("below", ["", "VOC2012"])
def test_the_splits_are_those_of_the_literature(made, below):
    sbd = set(NAMES["sbd_train"]) | set(NAMES["sbd_val"])
    wanted = {"train": NAMES["train"], "val": NAMES["val"]}
    wanted["train_aug"] = sorted((sbd | set(NAMES["train"])) - set(NAMES["val"]))
    assert sbd & set(NAMES["val"]) and sbd & set(NAMES["train"]) and sbd - set(NAMES["train"]) - set(NAMES["val"])
    for split, names in wanted.items():
        data = dataset(made / below, split)
        assert data.files.tolist() == [f"{name}.jpg" for name in names]
        for i, name in enumerate(names):
            k = NUMBER[name]
            assert np.flatnonzero(data.tags[i]).tolist() == sorted({k % 20, k * 7 % 20})
            # the official mask wins over that of SBD
            is_official = name in NAMES["train"] + NAMES["val"]
            assert (data.mask(i) == official.voc_mask(k % 80 if is_official else k % 240, border=is_official)).all()


def test_the_augmented_masks_are_complete(made):
    """Other repositories read all 12,031 from SegmentationClassAug alone."""
    folder, sbd = made / "VOC2012" / "SegmentationClassAug", set(NAMES["sbd_train"]) | set(NAMES["sbd_val"])
    trainval = NAMES["train"] + NAMES["val"]
    assert {path.stem for path in folder.iterdir()} == sbd | set(trainval)
    for name in trainval:
        assert (folder / f"{name}.png").read_bytes() == (
            folder.parent / "SegmentationClass" / f"{name}.png"
        ).read_bytes()
    with Image.open(folder / f"{sorted(sbd - set(trainval))[0]}.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]


def test_folders_give_the_same_as_archives(made, folders, tmp_path):
    run("voc", folders, tmp_path / "out", workers=2)
    assert manifest(tmp_path / "out") == manifest(made) and (tmp_path / "out/VOC2012/JPEGImages").is_symlink()
    before = contents(folders)
    run("voc", folders, folders / "VOCdevkit")  # in place
    assert before.items() <= contents(folders).items()
    there, elsewhere = manifest(folders / "VOCdevkit"), manifest(made)
    for name in ("train", "val", "trainval"):  # the official lists stay as they are, here without the last line break
        record = there["files"].pop(f"VOC2012/ImageSets/Segmentation/{name}.txt")
        assert record["size"] == elsewhere["files"].pop(f"VOC2012/ImageSets/Segmentation/{name}.txt")["size"] - 1
    assert there == elsewhere
    assert "have their sha256" in run("voc", folders, folders / "VOCdevkit", verify=True)[-1]


def test_the_manifest_holds_what_training_and_evaluation_read(made):
    files, found = manifest(made)["files"], contents(made)
    read = {name for name in found if not re.search("SegmentationObject|ImageSets/Main|^manifest|^problems", name)}
    assert list(files) == sorted(files) and set(files) == read
    assert all(record["sha256"] == found[name] for name, record in files.items())
    assert manifest(made)["counts"] == {"train": 4, "train_aug": 9, "trainval": 7, "val": 3}
    assert files["VOC2012/JPEGImages/2007_000000.jpg"] | {"sha256": 0, "size": 0} == {
        "sha256": 0, "size": 0, "width": 32, "height": 24, "mode": "RGB"
    }  # fmt: skip


def test_odd_boxes_are_remarks_and_keep_their_tags(made):
    rows = problems(made)
    assert (
        "VOC2012/Annotations/2010_000003.xml",
        "note",
        "empty box (object 2, bicycle)",
        "its tag counts all the same",
    ) in rows
    assert {row[2].split(" (")[0] for row in rows} == {"empty box", "box beyond the image"}


def test_other_counts_are_refused_and_named(archives, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="images: found 14, expected 17,125; .*train_aug: found 9, expected 10,582"):
        run("voc", archives, tmp_path / "out", subset=False)
    found = (14, 14, 7, 4, 3, 7, 8, 9)
    monkeypatch.setattr(voc, "COUNTS", dict(zip(voc.COUNTS, found, strict=True)))
    run("voc", archives, tmp_path / "out", subset=False)


def test_archives_that_are_missing_are_named(archives, tmp_path):
    (tmp_path / "half").mkdir()
    shutil.copy(archives / "VOCtrainval_11-May-2012.tar", tmp_path / "half")
    with pytest.raises(
        UserError, match="the masks of SBD are missing: found neither benchmark.tgz .*download https://"
    ):
        run("voc", tmp_path / "half", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BASE = "VOCdevkit/VOC2012"


def damage(folders: Path) -> dict[str, tuple[str, str]]:
    """Break one thing of each kind; returns path in problems.csv -> kind, reason."""
    base, sbd = folders / BASE, folders / "benchmark_RELEASE/dataset/cls"
    train, val = NAMES["train"], NAMES["val"]
    extra = [name for name in NAMES["sbd_train"] + NAMES["sbd_val"] if name not in train + val]

    def write(path: Path, content: bytes) -> None:
        path.unlink(missing_ok=True)  # others share its bytes
        path.write_bytes(content)

    def as_png(values: np.ndarray) -> bytes:
        write(folders / "x", b"")
        Image.fromarray(values).save(folders / "x", "PNG")
        return (folders / "x").read_bytes()

    shape = official.SIZES[NUMBER[train[1]] % 4]
    write(base / f"JPEGImages/{train[0]}.jpg", b"")
    write(base / f"SegmentationClass/{train[1]}.png", as_png(np.full(shape, 21, np.uint8)))
    write(base / f"SegmentationClass/{train[2]}.png", as_png(np.zeros((24, 32, 4), np.uint8)))
    write(base / f"SegmentationClass/{val[0]}.png", as_png(np.zeros((7, 9), np.uint8)))
    (base / f"SegmentationClass/{val[1]}.png").unlink()
    write(sbd / f"{extra[0]}.mat", (sbd / f"{extra[0]}.mat").read_bytes()[:300])
    write(sbd / f"{extra[1]}.mat", official.mat("GTcls", np.full((9, 9), 40, np.uint8), True))
    write(sbd / f"{extra[2]}.mat", official.mat("GTinst", np.zeros((9, 9), np.uint8), True))
    write(base / f"Annotations/{extra[3]}.xml", b"<annotation><object>")
    unlisted = NAMES["all"][-1]
    write(base / f"Annotations/{unlisted}.xml", b"<annotation><object><name>unicorn</name></object></annotation>")
    write(base / f"JPEGImages/{unlisted}.jpg", picture("JPEG", "CMYK"))
    with (base / "ImageSets/Segmentation/train.txt").open("a") as file:
        file.write(f"\n{train[3]}\n2007_999999\n")
    return {
        f"VOC2012/JPEGImages/{train[0]}.jpg": ("error", "the file is empty"),
        f"VOC2012/SegmentationClass/{train[1]}.png": ("error", "holds the ids [21]"),
        f"VOC2012/SegmentationClass/{train[2]}.png": ("error", "is a picture of mode 'RGBA'"),
        f"VOC2012/SegmentationClass/{val[0]}.png": ("error", "7 x 9 pixels (height, width), the image as the loader"),
        f"VOC2012/SegmentationClass/{val[1]}.png": ("error", "the official mask is missing"),
        f"cls/{extra[0]}.mat": ("error", "it ends in the middle, or is damaged"),
        f"cls/{extra[1]}.mat": ("error", "holds the ids [40]; expected 0..20"),
        f"cls/{extra[2]}.mat": ("error", "it holds no variable 'GTcls'"),
        f"VOC2012/Annotations/{extra[3]}.xml": ("error", "not readable XML"),
        f"VOC2012/Annotations/{unlisted}.xml": ("error", "unknown class 'unicorn'"),
        f"VOC2012/JPEGImages/{unlisted}.jpg": ("note", "mode CMYK"),
        "VOC2012/ImageSets/Segmentation/train.txt": ("error", f"{train[3]} is listed more than once"),
        "VOC2012/JPEGImages/2007_999999.jpg": ("error", "the file is missing"),
    }


def test_everything_that_cannot_be_used_is_reported_once_and_left_out(folders, tmp_path, monkeypatch):
    wanted, out = damage(folders), tmp_path / "out"
    monkeypatch.setattr(voc, "COUNTS", {})
    with pytest.raises(UserError, match="files cannot be used .*--on-problem continue to leave them out"):
        run("voc", folders, out, subset=False)
    rows = problems(out)
    for path, (kind, reason) in wanted.items():
        assert [row for row in rows if row[0] == path and row[1] == kind and reason in row[2]], (path, rows)
    assert not (out / "VOC2012/ImageSets/Segmentation").exists()
    run("voc", folders, out, subset=False, on_problem="continue")
    assert problems(out) == rows
    assert dataset(out, "train").files.tolist() == [f"{NAMES['train'][3]}.jpg"]
    assert dataset(out, "val").files.tolist() == [f"{NAMES['val'][2]}.jpg"]
    left = dataset(out, "train_aug")
    assert len(left) and all(left.mask(i).shape == left.image(i).shape[:2] for i in range(len(left)))
    with pytest.raises(UserError, match="train.txt would have to leave images out, and it is the official list itself"):
        run("voc", folders, folders / "VOCdevkit", subset=False, on_problem="continue")


def test_a_subset_takes_the_absent_out_of_the_lists(folders, tmp_path):
    (folders / BASE / f"JPEGImages/{NAMES['val'][0]}.jpg").unlink()
    run("voc", folders, tmp_path / "out")
    assert len(dataset(tmp_path / "out", "val")) == 2
    row = (f"VOC2012/JPEGImages/{NAMES['val'][0]}.jpg", "note", "the file is missing", "not in the lists")
    assert row in problems(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ MATLAB files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(375, 500), (1, 1), (1, 4), (3, 2), (2, 9)])
def test_a_matrix_of_a_matlab_file(shape, packed):
    ids = np.random.default_rng(0).integers(0, 21, shape, dtype=np.uint8)
    found = read_mat_field(official.mat("GTcls", ids, packed), "GTcls", "Segmentation")
    assert found.dtype == np.uint8 and (found == ids).all() and found.shape == shape


@pytest.mark.parametrize("packed", [False, True])
def test_files_as_scipy_writes_and_reads_them(packed):
    io, scipy = pytest.importorskip("io"), pytest.importorskip("scipy.io")
    sparse = pytest.importorskip("scipy.sparse")
    for kind in (np.uint8, np.float64, np.int16):
        ids = np.random.default_rng(0).integers(0, 21, (13, 7)).astype(kind)
        cells = np.empty((20, 1), object)
        cells[:, 0] = [sparse.csc_matrix(np.eye(4))] * 20
        out = io.BytesIO()
        content = {"Boundaries": cells, "Segmentation": ids, "CategoriesPresent": np.array([3.0])}
        scipy.savemat(out, {"other": 1.0, "GTcls": content}, do_compression=packed)
        found = read_mat_field(out.getvalue(), "GTcls", "Segmentation")
        twin = scipy.loadmat(out)["GTcls"]["Segmentation"][0, 0]
        assert (found == twin).all() and (found == ids).all()


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_matlab_files_are_refused_or_read(packed):
    whole = official.mat("GTcls", np.ones((20, 30), np.uint8), packed)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            read_mat_field(
                bytes(data[: rng.integers(len(data))] if rng.random() < 0.5 else data), "GTcls", "Segmentation"
            )
        except MatError:
            refused += 1
    assert refused > 200
    with pytest.raises(MatError, match="not a MATLAB file of level 5"):
        read_mat_field(b"", "GTcls", "Segmentation")
    with pytest.raises(MatError, match="has the fields Boundaries, Segmentation, CategoriesPresent, and not 'Other'"):
        read_mat_field(whole, "GTcls", "Other")
    with pytest.raises(MatError, match="'GTcls.Boundaries' is no full matrix"):
        read_mat_field(whole, "GTcls", "Boundaries")


def test_a_matlab_file_cannot_fill_the_memory(monkeypatch):
    monkeypatch.setattr(matfile, "MAX_BYTES", 10_000)
    with pytest.raises(MatError, match="unpacks to more than 10000 bytes"):
        read_mat_field(official.mat("GTcls", np.zeros((200, 200), np.uint8), True), "GTcls", "Segmentation")


def test_a_matlab_file_of_elements_without_content_cannot_fill_the_memory():
    whole = official.mat("GTcls", np.ones((20, 30), np.uint8), False)
    with pytest.raises(MatError, match="more than 1000 elements in a row"):
        read_mat_field(whole[:128] + bytes(2**24), "GTcls", "Segmentation")
