"""What was damaged after a preparation, or before it and is repaired: the way that each message names leads out."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.data import official, sets
from tests.data.preparing import contents, manifest, problems, run
from wsss_dist.data.prepare.work import WorkFolder
from wsss_dist.errors import UserError


def flip(path: Path, at: int = -5) -> bytes:
    """Change one byte; returns what was there."""
    whole = path.read_bytes()
    data = bytearray(whole)
    data[at] ^= 1
    path.write_bytes(data)
    return whole


def of_archive(data: str, source: Path) -> dict[str, bytes]:
    """Path in the prepared folder -> content in the archive, of a few members."""
    if data == "coco":
        with zipfile.ZipFile(source / "train2014.zip") as images:
            name = next(name for name in images.namelist() if name.endswith(".jpg"))
            found = {name: images.read(name)}
        with zipfile.ZipFile(source / "annotations_trainval2014.zip") as annotations:
            name = "annotations/instances_val2014.json"
            return {**found, name: annotations.read(name)}
    with tarfile.open(source / "VOCtrainval_11-May-2012.tar") as archive:
        names = ("JPEGImages/2007_000000.jpg", "Annotations/2007_000000.xml", "SegmentationClass/2007_000000.png")
        return {f"VOC2012/{name}": archive.extractfile(f"VOCdevkit/VOC2012/{name}").read() for name in names}


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("data", ["coco", "voc"])
def test_the_way_that_verify_names_restores_what_was_damaged(data, killed, tmp_path, monkeypatch):
    source = (official.write_coco if data == "coco" else official.write_voc)(tmp_path / "source")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if killed:  # between the manifest and the end: what was noted of the archives does not count any more
            patch.setattr(WorkFolder, "remove", lambda work: None)
        run(data, source, out)
    whole = contents(out)
    for name, content in of_archive(data, source).items():
        assert flip(out / name) == content
    with pytest.raises(UserError, match=r"changed since .* or remove (.*manifest.json) and start this command again"):
        run(data, source, out, verify=True)
    (out / "manifest.json").unlink()
    run(data, source, out)
    for name, content in of_archive(data, source).items():
        assert (out / name).read_bytes() == content
    again = {name: digest for name, digest in contents(out).items() if name != "verify.csv"}
    assert again == {name: digest for name, digest in whole.items() if not name.startswith(".prepare")}
    assert "have their sha256" in run(data, source, out, verify=True)[-1]


# ------------------------------------------------------------------------------------- left out, and usable since then


@pytest.mark.parametrize("on_problem", ["stop", "continue"])
@pytest.mark.parametrize("data", ["coco", "voc"])
def test_an_archive_that_is_repaired_is_used(data, on_problem, tmp_path):
    source = (official.write_coco if data == "coco" else official.write_voc)(tmp_path / "source")
    run(data, source, tmp_path / "once")
    archive = source / ("train2014.zip" if data == "coco" else "benchmark.tgz")
    if data == "coco":
        with zipfile.ZipFile(archive) as file:
            at = file.infolist()[2].header_offset + 100
        whole = flip(archive, at)
    else:
        whole = archive.read_bytes()
        archive.write_bytes(whole[:-8])  # the checksum of gzip: all its members are good
    run(data, source, tmp_path / "out", on_problem="continue")
    assert [row[0] for row in problems(tmp_path / "out") if row[1] == "error"][0].startswith(str(archive))
    assert "nothing to do" in run(data, source, tmp_path / "out", on_problem="continue")[-1]
    with pytest.raises(UserError, match="truncated or damaged"):
        run(data, source, tmp_path / "out")
    assert "is complete" in run(data, source, tmp_path / "out", on_problem="continue")[-1]
    archive.write_bytes(whole)
    said = run(data, source, tmp_path / "out", on_problem=on_problem)
    assert "without some files that could not be used; it is made again" in said[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "once")
    assert "nothing to do" in run(data, source, tmp_path / "out")[-1]


def test_a_folder_that_leaves_files_out_needs_its_archives_no_more(tmp_path):
    source, out = official.write_coco(tmp_path / "source"), tmp_path / "out"
    with zipfile.ZipFile(source / "train2014.zip") as file:
        at = file.infolist()[2].header_offset + 100
    flip(source / "train2014.zip", at)
    run("coco", source, out, on_problem="continue")
    (source / "train2014.zip").unlink()
    assert "nothing to do" in run("coco", source, out, on_problem="continue")[-1]


def test_a_missing_file_of_a_folder_is_used_when_it_is_there(tmp_path):
    source, out = official.write_voc(tmp_path / "source", folders=True), tmp_path / "out"
    path = source / "VOCdevkit/VOC2012/SegmentationClass/2007_000000.png"
    whole = path.read_bytes()
    path.unlink()
    run("voc", source, out, on_problem="continue")
    with pytest.raises(UserError, match="1 files cannot be used"):
        run("voc", source, out)
    run("voc", source, out, on_problem="continue")
    path.write_bytes(whole)
    assert "train 4" in run("voc", source, out, on_problem="continue")[-1] and manifest(out)["left_out"] == 0


def test_a_checked_folder_with_errors_is_no_success(tmp_path):
    root = sets.write_folder(tmp_path / "own")
    (root / "train/images/b.jpg").write_bytes(b"")
    run("folder", None, root, on_problem="continue")
    assert "nothing to do" in run("folder", None, root, on_problem="continue")[-1]
    with pytest.raises(UserError, match="1 files cannot be used .first: train/images/b.jpg: the file is empty"):
        run("folder", None, root)


# ------------------------------------------------------------------------------------------------------- sources moved


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_a_source_that_was_moved_is_linked_again(data, tmp_path):
    write = official.write_coco if data == "coco" else official.write_voc
    source, out = write(tmp_path / "source", folders=True), tmp_path / "out"
    run(data, source, out)
    whole = contents(out)
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="are missing or changed since they were prepared"):
        run(data, moved, out)
    (out / "manifest.json").unlink()
    run(data, moved, out)
    assert {k: v for k, v in contents(out).items() if k != "verify.csv"} == whole


def test_a_dangling_link_of_the_user_stays(tmp_path):
    source, out = official.write_coco(tmp_path / "source", folders=True), tmp_path / "out"
    out.mkdir()
    (out / "train2014").symlink_to(tmp_path / "none")
    for _ in range(2):
        with pytest.raises(UserError, match="train2014 exists and is not .*; nothing is overwritten"):
            run("coco", source, out)


def test_no_list_is_written_through_a_link(tmp_path):
    source, out = official.write_coco(tmp_path / "source", folders=True), tmp_path / "out"
    out.mkdir()
    (out / "annotations").symlink_to(source / "annotations")
    before = contents(source)
    with pytest.raises(UserError, match="out/annotations is a link, and nothing is written through it"):
        run("coco", source, out)
    assert contents(source) == before


def test_a_subset_names_the_images_that_are_not_there(tmp_path):
    source = official.write_coco(tmp_path / "source", folders=True)
    gone = sorted((source / "train2014").iterdir())[:2]
    for path in gone:
        path.unlink()
    for name in ("._a.jpg", "._b.jpg"):  # what macOS adds is no image, named or not
        (source / "train2014" / name).write_bytes(b"\0\5\x16\7")
    run("coco", source, tmp_path / "out")
    wanted = [(f"train2014/{path.name}", "note", "the file is missing", "not in the lists") for path in gone]
    assert problems(tmp_path / "out") == wanted
