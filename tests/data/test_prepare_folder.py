"""The folder format, checked: every file decoded once, what is wrong in one table, nothing else changed."""

from __future__ import annotations

import pytest

from tests.data import sets
from tests.data.preparing import contents, manifest, problems, run
from wsss_dist.errors import UserError


@pytest.fixture
def root(tmp_path):
    root = sets.write_folder(tmp_path / "own")
    for name in "abc":
        sets.add_mask(root, f"{name}.png", {0: 1, 1: 255})
    return root


def test_a_good_folder_gets_a_manifest(root):
    before = contents(root)
    said = run("folder", None, root)
    assert "train: 3 images, with masks" in said
    after = contents(root)
    assert after.keys() - before.keys() == {"manifest.json", "problems.csv"} and before.items() <= after.items()
    content = manifest(root)
    assert set(content["files"]) == set(before) and content["counts"] == {"train images": 3}
    assert all(record["sha256"] == before[name] for name, record in content["files"].items())
    assert content["files"]["train/masks/a.png"]["mode"] == "P" and problems(root) == []
    assert "8 files have their sha256, nothing to do" in run("folder", None, root, verify=True)[-1]
    (root / "manifest.json").unlink()
    run("folder", None, root, workers=2)
    assert contents(root) == after


def test_what_is_wrong_is_listed_and_the_lists_stay(root):
    (root / "train/images/b.jpg").write_bytes(b"")
    (root / "train/images/a.png").unlink()
    sets.add_mask(root, "c.png", {0: 9})
    sets.picture().save(root / "train/masks/b.png")
    (root / "train/images/more.jpg").write_bytes(b"x")
    (root / "train/images/._a.png").write_bytes(b"of macOS")
    labels = (root / "train/labels.csv").read_bytes()
    with pytest.raises(UserError, match="4 files cannot be used .*or add --on-problem continue to write the manifest"):
        run("folder", None, root)
    rows = {row[0]: row[1:] for row in problems(root)}
    stays = "stays in the list: training replaces it, an evaluation stops there"
    assert rows["train/images/b.jpg"] == ("error", "the file is empty", stays)
    assert rows["train/images/a.png"] == ("error", "the file is missing", stays)
    assert rows["train/masks/c.png"][1].startswith("holds the ids [9]")
    assert rows["train/masks/b.png"][1].startswith("is a picture of mode 'RGB'")
    assert rows["train/images/"] == ("note", "1 files that labels.csv does not name (first: more.jpg)", "not used")
    run("folder", None, root, on_problem="continue")
    assert (root / "train/labels.csv").read_bytes() == labels and "train/images/a.png" not in manifest(root)["files"]


@pytest.mark.parametrize("name", ["", ".", "x/.", "x/", "../../own/train/images/a.png", "/etc/hostname", "a\0.jpg"])
def test_a_name_that_is_none_is_the_mistake_of_its_list(root, name):
    (root / "train/labels.csv").write_text(f"image,labels\na.png,\n{name},cat\n")
    with pytest.raises(UserError, match="train/labels.csv .*(nam|lead|CSV)"):
        run("folder", None, root, on_problem="continue")
    assert [row for row in problems(root) if row[0] == "train/labels.csv" and row[1] == "error"]


def test_masks_that_come_between_two_attempts_are_checked(root):
    """Without them the images were finished already; the resumed run ends as a fresh one does."""
    (root / "train/masks").rename(root / "masks")
    (root / "train/images/b.jpg").rename(root / "b.jpg")
    with pytest.raises(UserError, match="1 files cannot be used"):
        run("folder", None, root)
    (root / "masks").rename(root / "train/masks")
    (root / "b.jpg").rename(root / "train/images/b.jpg")
    (root / "train/masks/c.png").unlink()
    with pytest.raises(UserError, match="1 files cannot be used .first: train/masks/c.png: the file is missing"):
        run("folder", None, root)


def test_what_is_no_such_folder(tmp_path, root):
    with pytest.raises(UserError, match="has no <split>/labels.csv; name the folder"):
        run("folder", None, tmp_path / "none")
    (root / "train/labels.csv").write_text("image,labels\na.png,cat\na.png,cat\n")
    with pytest.raises(UserError, match="holds 1 images more than once"):
        run("folder", None, root)
