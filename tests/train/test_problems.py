"""The summary of a run, problems.csv: every file that was replaced, or at which it stopped, with path and reason."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.data.synthetic import write_synthetic_dataset
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.test_trainer import ROOT, run
from wsss_dist.data.problems import REPLACED, STOPPED, noted, read_problems
from wsss_dist.errors import BadFile


@pytest.fixture
def root(tmp_path) -> Path:
    return write_synthetic_dataset(tmp_path / "data", 8, 3, 32, 3, seed=1)


def values(tmp_path: Path, root: Path, name: str, **changes: object) -> dict:
    found = tiny.values(tmp_path)
    found["run"]["name"] = name
    found["data"] = {"format": "coco", "root": str(root), "crop": 16, "num_workers": 1}
    found["train"] = {"steps": 4, "global_batch": 4, "micro_batch": 2, "save_every": 2, "engine": "plain"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section][name] = value
    return found


def rows(tmp_path: Path, name: str) -> list[tuple[str, ...]]:
    return read_problems(tmp_path / name / "problems.csv")


def test_what_was_replaced_is_in_the_table_of_any_number_of_ranks_and_after_a_resume(tmp_path, root):
    images = root / "images/train"
    (images / "00002.jpg").write_bytes(b"")
    (images / "00005.jpg").write_bytes((images / "00005.jpg").read_bytes()[:-30])
    assert run_ranks(1, tmp_path, run, values(tmp_path, root, "one")) == [0]
    assert run_ranks(2, tmp_path, run, values(tmp_path, root, "two")) == [0, 0]
    assert run_ranks(1, tmp_path, run, values(tmp_path, root, "cut", train__stop_after=2)) == [0]
    assert run_ranks(1, tmp_path, run, values(tmp_path, root, "cut")) == [0]
    found = rows(tmp_path, "one")
    assert [(row[0], row[1], row[3]) for row in found] == [
        (str(images / f"{name}.jpg"), "error", REPLACED) for name in ("00002", "00005")
    ]
    assert found[0][2] == "the file is empty" and "truncated" in found[1][2]
    assert found == rows(tmp_path, "two") == rows(tmp_path, "cut")

    # with data.leave_out the run does without them from the start
    without = values(tmp_path, root, "without", data__leave_out=str(tmp_path / "one/problems.csv"), data__max_damaged=0)
    assert run_ranks(2, tmp_path, run, without) == [0, 0] and rows(tmp_path, "without") == []


def test_a_run_that_stops_names_what_it_stopped_at(tmp_path, root):
    images = root / "images/train"
    for name in ("00001", "00004", "00006"):
        (images / f"{name}.jpg").write_bytes(b"<html>")
    for _, message in run_ranks(2, tmp_path, run, values(tmp_path, root, "a", data__max_damaged=2), fails=True):
        assert (
            "'data.max_damaged' is 2: repair the files or raise" in message and "a/problems.csv names them" in message
        )
    assert {row[0] for row in rows(tmp_path, "a")} == {str(images / f"{k}.jpg") for k in ("00001", "00004", "00006")}
    for path in images.iterdir():
        path.write_bytes(b"")
    ((_, message),) = run_ranks(1, tmp_path, run, values(tmp_path, root, "b"), fails=True)
    assert "in a row cannot be read" in message
    found = rows(tmp_path, "b")
    assert len(found) == 8 and {row[2:] for row in found} == {("the file is empty", STOPPED)}
    # a second start, of a run that never made a checkpoint, begins a table of its own
    shutil.rmtree(root)
    write_synthetic_dataset(root, 8, 3, 32, 3, seed=1)
    assert run_ranks(1, tmp_path, run, values(tmp_path, root, "b")) == [0] and rows(tmp_path, "b") == []


@pytest.mark.parametrize("content", [b"path,kind,reason,effect\nbroken row\n", None])
def test_a_table_that_cannot_be_added_to_does_not_hide_the_error(content, tmp_path):
    if content is None:
        (tmp_path / "problems.csv").mkdir()
    else:
        (tmp_path / "problems.csv").write_bytes(content)
    with pytest.raises(BadFile, match=r"^data: x\.jpg cannot be read \[not noted in .*problems\.csv: .*\]$"):
        with noted(tmp_path):
            raise BadFile("x.jpg", "empty", "data: x.jpg cannot be read")
    assert content is None or (tmp_path / "problems.csv").read_bytes() == content


def evaluate(*arguments: str) -> int:
    sys.argv = ["evaluate.py", *arguments]
    return runpy.run_path(str(ROOT / "launch/evaluate.py"))["main"]()


def test_an_evaluation_stops_at_a_damaged_file_or_goes_on_without_it(tmp_path, root):
    training = values(tmp_path, root, "a", data__eval_splits=["val"], data__num_workers=0)
    assert run_ranks(1, tmp_path, run, training) == [0]
    again = ("--run", str(tmp_path / "a"))
    mask, image = root / "masks/val/00001.png", root / "images/val/00002.jpg"
    mask.write_bytes(b"")
    assert run_ranks(1, tmp_path, evaluate, *again) == [2]
    ((path, kind, reason, effect),) = rows(tmp_path, "a")
    assert (path, kind, effect) == (str(mask), "error", STOPPED) and "the file is empty" in reason
    image.write_bytes(b"<html>")
    table = tmp_path / "a/problems.csv"
    left_out = (*again, "--set", f"data.leave_out={table}")
    assert run_ranks(1, tmp_path, evaluate, *left_out) == [2]  # now at the image
    assert {row[0] for row in rows(tmp_path, "a")} == {str(mask), str(image)}
    assert run_ranks(1, tmp_path, evaluate, *left_out) == [0]
    assert json.loads((tmp_path / "a/result.json").read_text())["splits"]["val"]["images"] == 1
