"""`prepare_data.py verify` finds what changed, by the SHA-256; the table of problems, and what is read of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.data import official, sets
from tests.data.bad_input import QUIET, has, made, table
from tests.data.preparing import manifest, run
from tests.data.shards_made import flip
from tests.data.shards_made import write as write_shards
from wsss_dist.data import build_dataset
from wsss_dist.data.prepare.check import check
from wsss_dist.data.prepare.verify import verify
from wsss_dist.data.problems import STAYS, LeftOut, add_problems, read_problems, write_problems
from wsss_dist.errors import UserError

PREPARE = [sys.executable, str(Path(__file__).parents[2] / "launch" / "prepare_data.py")]


def verified(root: Path, workers: int = 0) -> dict[str, list[str]]:
    try:
        verify(root, None, workers, QUIET)
    except UserError as error:
        assert f"{root}/verify.csv names them all" in str(error)
    return table(root / "verify.csv")


@pytest.mark.parametrize("form", ["coco", "voc", "folder"])
def test_changed_files_of_a_prepared_set_are_all_named(form, tmp_path):
    out = tmp_path / "out"
    if form == "folder":
        made("folder", out)
        run("folder", None, out)
    else:
        write = official.write_coco if form == "coco" else official.write_voc
        run(form, write(tmp_path / "archives"), out)
    files = manifest(out)["files"]
    assert verified(out) == {}
    below = {"coco": ("train2014/", "masks/"), "voc": ("VOC2012/JPEG", "VOC2012/Seg"), "folder": ("train/i", "train/m")}
    images, masks = ([name for name in files if name.startswith(begin)] for begin in below[form])
    one, two, three, four = images[0], images[1], masks[0], masks[-1]
    # a picture that is whole, and another one: no decoder tells
    Image.new("RGB", (32, 24)).save(out / one, "PNG")
    (out / two).write_bytes((out / two).read_bytes()[:-30])
    (out / three).unlink()
    (out / four).write_bytes(b"")
    text = next(name for name in files if name.endswith((".json", ".txt", ".csv")))
    (out / text).write_bytes((out / text).read_bytes() + b"\n")
    for workers in (0, 2):
        rows = verified(out, workers)
        assert rows.keys() == {one, two, three, four, text}
        assert has(rows, one, "changed since it was prepared") and has(rows, one, "; it decodes without an error")
        assert has(rows, two, f"{files[two]['size'] - 30:,} bytes instead of {files[two]['size']:,}")
        assert has(rows, three, "the file is missing") and has(rows, four, "; the file is empty")
    effects = {row[0]: row[3] for row in read_problems(out / "verify.csv")}
    assert effects[one] == effects[text] == "read as it is" and effects[two] == STAYS
    # what names them can be used: the run goes on without them
    split, train = {"coco": ("train-82k", 9), "voc": ("train_aug", 9), "folder": ("train", 3)}[form]
    data = build_dataset(sets.config(out, form, leave_out=out / "verify.csv"), split)
    assert len(data) == train - data.unusable < train and all(str(data.path(i)) not in rows for i in range(len(data)))


def test_changed_shards(tmp_path):
    root, split, *_ = made("folder", tmp_path / "set")
    out = write_shards(root, tmp_path / "out", form="folder", masks=True)
    assert verified(out) == {} == verified(out / split)
    data = build_dataset(sets.config(out, "shards"), split)
    shard, size = out / "train/train-000000.tar", (out / "train/train-000000.tar").stat().st_size
    flip(shard, int(data._offsets[1, 0]) + 40)
    rows = verified(out)
    assert rows.keys() == {"train/train-000000.tar", f"train/train-000000.tar:{data.files[1]}"}
    os.truncate(shard, size // 2)
    assert len(verified(out)) > 2
    shard.unlink()
    assert verified(out) == {"train/train-000000.tar": ["the file is missing"]}


def test_the_commands_say_it_by_their_status(tmp_path):
    root, *_ = made("folder", tmp_path / "set")
    commands = (["folder", str(root), "--workers", "0"], ["verify", str(root), "--workers", "0"])
    for command in (*commands, ["check", "--from", f"folder:{root}", "--split", "train", "--workers", "2"]):
        done = subprocess.run([*PREPARE, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    (root / "train/images/b.jpg").write_bytes(b"")
    for command, name in (
        (commands[1], "verify"),
        (["check", "--from", f"folder:{root}", "--split", "train"], "check"),
    ):
        done = subprocess.run([*PREPARE, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.startswith("error: prepare: 1 ") and "Traceback" not in done.stderr
        assert has(table(root / f"{name}.csv"), "train/images/b.jpg", "the file is empty")


@pytest.mark.parametrize("command", ["verify", "check"])
def test_a_table_that_cannot_be_written_is_said_before_anything_is_read(command, tmp_path, monkeypatch):
    root, *_ = made("folder", tmp_path / "set")
    run("folder", None, root)
    monkeypatch.setattr("wsss_dist.data.prepare.verify.in_processes", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr("wsss_dist.data.prepare.check.in_processes", lambda *_: pytest.fail("it was read"))

    def start(report: Path | None) -> None:
        if command == "verify":
            verify(root, report, 0, QUIET)
        else:
            check(f"folder:{root}", ["train"], None, report, 0, QUIET)

    for report, reason in ((tmp_path / "none/x.csv", "No such file or directory"), (tmp_path, "it is a folder")):
        with pytest.raises(
            UserError, match=f"the table cannot be written to {report} .{reason}.; give a file .*--repo"
        ):
            start(report)

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr("wsss_dist.data.prepare.verify.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"written to {root}/{command}.csv .Read-only file system.; give a file"):
        start(None)


def test_the_home_folder_is_that_of_the_reader(tmp_path, monkeypatch):
    made("folder", tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check("folder:~/set", ["train"], None, None, 0, QUIET)
    assert (tmp_path / "set/check.csv").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": [1]}', '{"files": {"a": 5}}', "x" * 9, '{"files": {"a": {}}}'])
def test_what_is_no_manifest_is_said(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is no manifest of this command|has no manifest.json with checksums"):
        verify(tmp_path, None, 0, QUIET)
    with pytest.raises(UserError, match="has no manifest.json with checksums and no shards.json"):
        verify(tmp_path / "none", None, 0, QUIET)


def test_other_manifests_of_ours_are_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    for content in ({"files": {"a.bin": digest}}, {"a.bin": {"sha256": digest, "licence": "x"}}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        assert verified(tmp_path) == {}
    (tmp_path / "a.bin").write_bytes(b"b")
    assert has(verified(tmp_path), "a.bin", "sha256 3e23e8160039... instead of ca978112ca1b")


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_keeps_odd_names_and_many_writers(tmp_path):
    rows = [("a,b\n\"c'.jpg", "error", "x; y", "z"), ("é", "note", "1", "2"), ("\udcff.jpg", "error", "no text", "-")]
    write_problems(tmp_path / "problems.csv", [*rows, *rows, ("n\0l", "error", "a", "b")])
    found = read_problems(tmp_path / "problems.csv")
    assert len(found) == 4 and set(rows[:2]) <= set(found) and ("n\\x00l", "error", "a", "b") in found
    add_problems(tmp_path / "problems.csv", [(str(tmp_path / "q.jpg"), "error", "r", "s")])
    assert len(read_problems(tmp_path / "problems.csv")) == 5


def test_what_is_left_out_is_found_through_links_and_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "real/images").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rows = [
        ("images/a.jpg", "error", "x", "y"),
        ("images/b.jpg", "note", "x", "y"),
        ("s3://b/c.tar:d.jpg",) + ("error",) * 3,
    ]
    write_problems(tmp_path / "link/problems.csv", rows)
    monkeypatch.chdir(tmp_path)
    for table_path in ("link/problems.csv", tmp_path / "real/problems.csv"):
        left_out = LeftOut(Path(table_path))
        for path in ("link/images/a.jpg", "real/images/a.jpg", tmp_path / "link/images/a.jpg", "s3://b/c.tar:d.jpg"):
            assert path in left_out
        assert "images/b.jpg" not in left_out and tmp_path / "real/images/b.jpg" not in left_out
    for content in (b"", b"path,kind\n", b"\xff", b"path,kind,reason,effect\na,b\n"):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(UserError, match="x.csv is no table of problems .*expected the problems.csv"):
            LeftOut(tmp_path / "x.csv")
    with pytest.raises(UserError, match="none.csv is no table of problems"):
        LeftOut(tmp_path / "none.csv")
