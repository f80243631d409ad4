"""launch/pseudo_labels.py on a small PCRE run: every kind of file, any number of ranks, kills, slow ranks, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.synthetic import write_synthetic_dataset
from tests.methods import pcre_runs
from tests.train.ranks import run_ranks
from wsss_dist import agreement, dist, pseudo_labels, stages
from wsss_dist.config import load_config, parse_config
from wsss_dist.data import build_dataset
from wsss_dist.data.palette import voc_palette
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.pseudo_labels import LABELS, MAPS, make_pseudo_labels
from wsss_dist.stages.base import read_scores
from wsss_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TRAIN = 13


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("pseudo"), TRAIN)


def small_run(folder, images):
    """Folder of a run of three steps, its split "train" of so many images."""
    write_synthetic_dataset(folder / "data", images, 5, 64, 3, seed=0)
    values = pcre_runs.values(engine="plain", steps=3)
    values["run"] = {"name": "small", "dir": str(folder)}
    values["data"] = {"format": "coco", "root": str(folder / "data"), "eval_splits": ["val"], "crop": 64}
    values["data"] |= {"num_workers": 0}
    values["eval"] = {"size": 64, "cam_scales": [1.0, 0.5], "seg_scales": [1.0], "crf": {"iterations": 2}}
    values["optim"]["warmup_steps"] = 1
    assert Trainer(parse_config(values)).train() == 0
    return folder / "small"


def make(run_dir, out, kind="seg_tags_crf", splits=("train",), settings=()):
    """In this process; the lines that were said."""
    lines = []
    made = make_pseudo_labels(
        load_config(run_dir / "config.yaml", list(settings)), run_dir, out, kind, list(splits), lines.append
    )
    return made, lines


def digests(out):
    """Of every file under out/, the name of each relative to it."""
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.glob("out/**/*"))
        if p.is_file() and not p.name.startswith(".")
    }


def test_the_names_of_the_command_are_those_of_the_kinds():
    script = runpy.run_path(str(ROOT / "launch/pseudo_labels.py"), run_name="none")
    assert script["KINDS"] == [*LABELS, *MAPS] and set(pseudo_labels.SUFFIXES) == set(script["KINDS"])


@pytest.mark.parametrize("kind", [k for k in LABELS if k != "cam_crf"])
def test_labels_score_what_the_evaluation_scores(kind, run_dir, tmp_path):
    """The files of a split with masks have the score that the evaluation of the training found, and a palette."""
    made, _ = make(run_dir, tmp_path / "out", kind, ["val"], ["eval.batch=1"])
    known = json.loads((run_dir / "result.json").read_text())["splits"]["val"]["kinds"]
    files = sorted((tmp_path / "out/out/val").iterdir())
    assert len(files) == 5 == made.files and made.images == {"val": 5}
    for path in files:
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.size == (64, 64)
            assert picture.getpalette() == voc_palette().ravel().tolist()
    if kind == "pseudo":  # there, what is undecided counts as background; here it is left out
        assert made.scores["val"]["ignored"] == pytest.approx(known["pseudo"]["ignored"])
    else:
        assert made.scores["val"]["miou"] == pytest.approx(known[kind]["miou"], abs=1e-12)


def test_tags_rule_out_other_classes(run_dir, tmp_path):
    make(run_dir, tmp_path / "out", "seg_tags")
    data = build_dataset(load_config(run_dir / "config.yaml").data, "train")
    for i in range(len(data)):
        found = set(np.unique(np.array(Image.open(tmp_path / f"out/out/train/{data.id(i)}.png"))).tolist())
        assert found <= {0, *(np.flatnonzero(data.labels(i)) + 1).tolist()}


def test_a_crf_on_the_cam_keeps_to_its_labels(run_dir, tmp_path):
    make(run_dir, tmp_path / "plain", "cam")
    make(run_dir, tmp_path / "crf", "cam_crf")
    pairs = [
        [np.array(Image.open(tmp_path / n / f"out/train/{i:05d}.png")) for n in ("plain", "crf")] for i in range(3)
    ]
    assert all(set(np.unique(b)) <= set(np.unique(a)) for a, b in pairs)
    assert any((a != b).any() for a, b in pairs)


def test_maps_in_both_forms(run_dir, tmp_path):
    """The .npz is what stages read; the .npy is IRNet's dict, its full map the same up to half precision."""
    scores = make(run_dir, tmp_path / "npz", "maps")[0].scores
    assert set(scores) == {"train"} and 0.05 <= scores["train"]["threshold"] <= 0.8 and 0 < scores["train"]["miou"] < 1
    assert make(run_dir, tmp_path / "irn", "maps_irn")[0].scores == {}
    data = build_dataset(load_config(run_dir / "config.yaml").data, "train")
    for i in range(len(data)):
        tags = np.flatnonzero(data.labels(i)).tolist()
        scores = read_scores(tmp_path / "npz", "train", data.id(i), (64, 64), torch.from_numpy(data.labels(i)))
        irn = np.load(tmp_path / f"irn/out/train/{data.id(i)}.npy", allow_pickle=True).item()
        assert scores.classes.tolist() == irn["keys"].tolist() == tags
        assert irn["cam"].shape == (len(tags), 16, 16) and irn["high_res"].dtype == np.float32
        assert irn["cam"].dtype == torch.float32, "make_sem_seg_labels.py of IRNet calls .cuda()"
        small = torch.nn.functional.interpolate(torch.from_numpy(irn["high_res"])[None], (16, 16), mode="bilinear")
        assert torch.equal(irn["cam"], small[0])
        np.testing.assert_allclose(scores.maps.numpy(), irn["high_res"], atol=5e-4)


@pytest.fixture(scope="module")
def whole(run_dir, tmp_path_factory):
    """Digests of the files that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "out"
    run_ranks(1, folder, make, run_dir, out)  # on one thread, as the ranks that are compared with it
    assert len(digests(out)) == TRAIN
    return digests(out)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_bytes(ranks, run_dir, whole, tmp_path):
    out = run_ranks(ranks, tmp_path, make, run_dir, tmp_path / "out")
    assert [made.files for made, _ in out] == [TRAIN] * ranks
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize("kind", MAPS)
def test_two_ranks_make_the_same_maps(kind, run_dir, tmp_path):
    for ranks, name in ((1, "one"), (2, "two")):
        run_ranks(ranks, tmp_path, make, run_dir, tmp_path / name, kind)
    assert len(digests(tmp_path / "one")) == TRAIN and digests(tmp_path / "one") == digests(tmp_path / "two")


def made_by_rank(run_dir, out, slow):
    """How many files this rank writes; rank `slow` takes its time with each."""
    count, write = [], stages.base._write

    def counting(path, content):
        if dist.rank() == slow:
            time.sleep(0.5)
        count.append(path.name)
        write(path, content)

    stages.base._write = counting
    try:
        make(run_dir, out)
    finally:
        stages.base._write = write
    return count


def test_a_slow_rank_is_helped(run_dir, whole, tmp_path):
    """Each image is made once, and the rank that is slow makes fewer of them."""
    slow, fast = run_ranks(2, tmp_path, made_by_rank, run_dir, tmp_path / "out", 0)
    assert sorted(slow + fast) == [f"{i:05d}.png" for i in range(TRAIN)]
    assert len(slow) < len(fast), (slow, fast)
    assert digests(tmp_path / "out") == whole


def test_killed_and_started_again(run_dir, whole, tmp_path):
    """Killed at random moments, it goes on with what is missing; no file is ever half written."""
    out, draw = tmp_path / "out", random.Random(0)
    command = [sys.executable, str(ROOT / "launch/pseudo_labels.py"), "--run", str(run_dir), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for aim in (2, 6):
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        while len(digests(out)) < aim and child.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.02)
        child.kill()
        child.wait()
        assert digests(out).items() <= whole.items()
    before = len(digests(out))
    assert 2 <= before
    made, lines = make(run_dir, out)
    assert any(f"{before} of {TRAIN} images are there already" in line for line in lines) or before == TRAIN
    assert made.files == TRAIN - before
    assert digests(out) == whole


def test_other_settings_are_refused_in_a_folder_that_has_some(run_dir, whole, tmp_path):
    make(run_dir, tmp_path / "out", "cam")
    before = digests(tmp_path / "out")
    for kind, settings, named in (
        ("seg", [], "kind"),
        ("cam", ["eval.beta=0.3"], "eval"),
        ("cam", ["method.cam.low=0.01"], "method"),
        ("cam", ["kernels.par=reference"], "kernels"),
    ):
        with pytest.raises(UserError, match=rf"pseudo_labels.json is of other settings \({named}\).*another --out"):
            make(run_dir, tmp_path / "out", kind, settings=settings)
    with pytest.raises(UserError, match=r"other settings \(images of train\)"):
        make(run_dir, tmp_path / "out", "cam", settings=["data.train_limit=4"])
    make(run_dir, tmp_path / "out", "cam", ["val"])
    assert before.items() < digests(tmp_path / "out").items()
    for text in ("{", "[]", "{}"):
        (tmp_path / "out/pseudo_labels.json").write_text(text)
        with pytest.raises(UserError, match=r"pseudo_labels.json is no manifest.*delete \S*/out$"):
            make(run_dir, tmp_path / "out", "cam")
    (tmp_path / "out/pseudo_labels.json").unlink()
    with pytest.raises(UserError, match=r"out holds files, but \S*pseudo_labels.json, which says what they"):
        make(run_dir, tmp_path / "out", "seg")


def test_classes_in_another_order_are_refused(run_dir, tmp_path):
    """As many of them, so that the weights would fit."""
    data = shutil.copytree(run_dir.parent / "data", tmp_path / "data")
    for path in (data / "annotations").glob("*.json"):
        text = path.read_text()
        path.write_text(text.replace("disc-0", "?").replace("square-0", "disc-0").replace("?", "square-0"))
    message = "ckpt-3/model.safetensors was trained on other classes .'disc-0' there, 'square-0' here"
    with pytest.raises(UserError, match=message):
        make(run_dir, tmp_path / "out", settings=[f"data.root={data}"])
    assert not digests(tmp_path / "out")


def test_every_image_of_a_split_whatever_the_evaluations_see(run_dir, tmp_path):
    made, _ = make(run_dir, tmp_path / "out", "cam", ["val"], ["data.val_limit=2"])
    assert made.images == {"val": 5} and made.files == 5


def test_two_at_once_are_refused(run_dir, tmp_path, monkeypatch):
    refused = []

    def meanwhile(*args):
        monkeypatch.undo()
        refused.append(run_ranks(1, tmp_path, make, run_dir, tmp_path / "out", fails=True))

    monkeypatch.setattr(pseudo_labels, "check_shared", meanwhile)
    make(run_dir, tmp_path / "out")
    (((kind, message),),) = refused
    assert kind == "UserError" and "another process is making files in" in message and "another --out" in message
    assert make(run_dir, tmp_path / "out")[0].files == 0


def _make_here(run_dir, outs):
    agreement._SEEN_WITHIN_S = 1
    make(run_dir, outs[dist.rank()])


def test_a_folder_that_the_nodes_do_not_share_is_refused(run_dir, tmp_path):
    for kind, message in run_ranks(2, tmp_path, _make_here, run_dir, [tmp_path / "a", tmp_path / "b"], fails=True):
        assert kind == "UserError" and "a is not shared: rank 1 on" in message and "set --out to a folder" in message
    assert not digests(tmp_path / "a") and not digests(tmp_path / "b")


def test_a_crf_that_is_switched_off_and_outputs_a_method_lacks(run_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'eval.crf' is null, but --kind seg_crf needs one"):
        make(run_dir, tmp_path / "a", "seg_crf", settings=["eval.crf=null"])
    method = load_method("pcre").Method
    monkeypatch.setattr(method, "predict", lambda *_: pseudo_labels.Prediction(cam=torch.zeros(1, 3, 64, 64)))
    with pytest.raises(UserError, match="method 'pcre' gives no segmentation; choose another --kind than seg"):
        make(run_dir, tmp_path / "b", "seg")


def test_a_damaged_image_names_itself_and_nothing_made_is_lost(run_dir, whole, tmp_path):
    data = shutil.copytree(run_dir.parent / "data", tmp_path / "data")
    (data / "images/train/00009.jpg").write_bytes(b"")
    setting = [f"data.root={data}"]
    with pytest.raises(UserError, match="image .*00009.jpg of the split .* cannot be read .the file is empty"):
        make(run_dir, tmp_path / "out", settings=setting)
    assert len(digests(tmp_path / "out")) == 9
    shutil.copy(run_dir.parent / "data/images/train/00009.jpg", data / "images/train")
    make(run_dir, tmp_path / "out", settings=setting)
    assert digests(tmp_path / "out") == whole


def test_the_command(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["x", "--run", str(run_dir), "--kind", "cam", "--split", "val", "--split", "train"]
    )
    monkeypatch.setattr(dist, "shutdown", lambda: None)
    assert runpy.run_path(str(ROOT / "launch/pseudo_labels.py"))["main"]() == 0
    out = capsys.readouterr().out
    assert "val: cam mIoU" in out and f"pseudo_labels/cam: {TRAIN + 5} images; {TRAIN + 5} files made now, on 1" in out
    assert " images/s" in out.splitlines()[-1]
    assert len(digests(run_dir / "pseudo_labels/cam")) == TRAIN + 5
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(tmp_path)])
    assert runpy.run_path(str(ROOT / "launch/pseudo_labels.py"))["main"]() == 2
    assert "holds no config.yaml; name a trained run's folder" in capsys.readouterr().err
