"""Runs of several stages: what is made, skipped, made again, resumed after a kill, and the same on two ranks."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.train import pipeline_runs
from tests.train.pipeline_runs import TRAIN, outputs, scores
from tests.train.ranks import run_ranks
from wsss_dist import dist, pipeline
from wsss_dist.data import build_dataset
from wsss_dist.errors import UserError
from wsss_dist.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with pipeline_runs.one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pipeline_runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return pipeline_runs.finished(pipeline_runs.values(data, tmp_path_factory.mktemp("whole")))


@pytest.fixture
def copied(whole, tmp_path):
    return pipeline_runs.copy_of(whole, tmp_path)


def manifest(folder, stage):
    return json.loads((folder / stage / "stage.json").read_text())


def test_every_stage_leaves_a_manifest_and_its_scores(whole):
    config, folder = whole
    for name, section in config["stages"].items():
        made = manifest(folder, name)
        assert made["kind"] == section["kind"] and made["seed"] == 3 and len(made["outputs"]) == 64
        assert set(made["inputs"]) == {s for s in config["stages"] if f"${{{s}}}" in json.dumps(section)}
        for other, digest in made["inputs"].items():
            assert digest == manifest(folder, other)["outputs"]
    found = {stage: {kind for s in values.values() for kind in s} for stage, values in scores(folder).items() if values}
    assert found == {
        "cams": {"cam"},
        "saliency": {"saliency"},
        "refined": {"saliency"},
        "labels": {"affinity_labels"},
        "walk": {"random_walk"},
        "masks": {"pseudo"},
        "segmentation": {"seg_crf"},
    }
    assert list(scores(folder)["cams"]) == ["train", "val"] and list(scores(folder)["segmentation"]) == ["val"]
    assert 0.05 <= scores(folder)["cams"]["val"]["cam"]["threshold"] <= 0.8


def test_the_report_shows_every_stage(whole):
    _, folder = whole
    page = (folder / "report.html").read_text()
    for name in ("cams", "saliency", "refined", "labels", "walk", "masks", "segmentation"):
        assert f"<td>{name}</td>" in page
    assert page.count("data:image/jpeg") == 2 and len(list((folder / "report").glob("*.png"))) == 2


def test_exported_weights_name_their_classes(whole):
    from safetensors import safe_open

    _, folder = whole
    with safe_open(folder / "classifier/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["disc-0", "square-0", "triangle-0"]
    newest = load_file(folder / "classifier/checkpoints/ckpt-3/model.safetensors")
    exported = load_file(folder / "classifier/model.safetensors")
    assert newest.keys() == exported.keys() and all((newest[k] == exported[k]).all() for k in newest)


def test_maps_are_what_their_kind_says(whole):
    _, folder = whole
    files = sorted((folder / "cams/out/train").rglob("*.npz"))
    assert len(files) == TRAIN
    with np.load(files[0]) as file:
        assert file["full"].shape == (len(file["labels"]), 64, 64) and file["s4"].shape[1:] == (16, 16)
        assert file["full"].dtype == np.float16 and file["full"].max() == pytest.approx(1, abs=2e-3)


def test_a_run_that_is_done_does_nothing(copied, capsys, monkeypatch):
    """It opens each split once to see that the images are the same, whatever the stages do with them."""
    config, folder = copied
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/stage.json")}
    opened = []
    monkeypatch.setattr(pipeline, "build_dataset", lambda cfg, name: opened.append(name) or build_dataset(cfg, name))
    assert pipeline_runs.start(config) == 0
    assert sorted(opened) == ["train", "val"]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/stage.json")} == before
    assert capsys.readouterr().out.count("done before") == len(config["stages"]) == len(before)


def test_a_changed_stage_runs_again_with_what_depends_on_it(copied, capsys):
    config, folder = copied
    config["stages"]["masks"]["background"] = 1.0  # everything is background
    assert pipeline_runs.start(config) == 0
    said = capsys.readouterr().out
    assert said.count("done before") == len(config["stages"]) - 3  # masks, deeplab, segmentation
    assert (folder / "masks.old/stage.json").is_file() and not (folder / "walk.old").exists()
    assert manifest(folder, "masks")["outputs"] != json.loads((folder / "masks.old/stage.json").read_text())["outputs"]


def test_a_stage_that_makes_the_same_again_stops_there(copied, capsys):
    """Another config, the same files: what depends on it is not run again."""
    config, _ = copied
    config["stages"]["walk"]["canvas"] = 63  # below the size of the images, as 64 is
    assert pipeline_runs.start(config) == 0
    assert capsys.readouterr().out.count("done before") == len(config["stages"]) - 1


def test_what_cannot_change_a_result_changes_no_stage(copied, tmp_path, capsys):
    """Workers, logging, saving, and where the data lie: nothing runs again."""
    config, _ = copied
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", config["data"]["root"], str(moved)], check=True)
    config["data"] |= {"num_workers": 1, "root": str(moved)}
    config["train"] |= {"log_every": 7, "save_every": 2, "keep": 5, "timeout_s": 60}
    assert pipeline_runs.start(config) == 0
    assert capsys.readouterr().out.count("done before") == len(config["stages"])


def test_what_was_made_is_never_deleted(copied):
    config, folder = copied
    for background in (1.0, 0.9):
        config["stages"]["masks"]["background"] = background
        assert pipeline_runs.start(config, "masks") == 0
    kept = [json.loads((folder / name / "stage.json").read_text()) for name in ("masks.old", "masks.old-2")]
    assert [made["section"].get("background") for made in kept] == [None, 1.0]
    assert manifest(folder, "masks")["section"]["background"] == 0.9


def test_files_that_are_gone_are_made_again(copied, capsys):
    config, folder = copied
    before = outputs(folder)
    subprocess.run(["rm", "-r", str(folder / "cams/out/val")], check=True)
    assert pipeline_runs.start(config) == 0
    said = capsys.readouterr().out
    assert said.count("done before") == len(config["stages"]) - 1 and f"cams, train: {TRAIN} of {TRAIN} images" in said
    assert outputs(folder) == before


def test_other_images_or_tags_are_other_data(copied, tmp_path, capsys):
    """Under the same root: the stages that read them run again."""
    config, folder = copied
    root = untagged(config["data"]["root"], tmp_path, 1)
    config["data"]["root"] = root
    assert Pipeline(copy.deepcopy(config)).start(until="classifier") == 0
    assert "done before" not in capsys.readouterr().out
    assert f"{TRAIN - 1} images" in manifest(folder, "classifier")["data"]["train"]
    message = "stage 'cams' reads stage 'cam_network', which is done with another config, data or inputs"
    with pytest.raises(UserError, match=message):
        pipeline_runs.start(config, "cams")


def _start_with(config, roots):
    config["data"]["root"] = roots[dist.rank()]
    return pipeline_runs.start(config, "masks")


def test_ranks_with_other_images_are_refused(copied, tmp_path):
    config, folder = copied
    roots = [config["data"]["root"], untagged(config["data"]["root"], tmp_path, 1)]
    subprocess.run(["rm", "-r", str(folder / "masks")], check=True)
    for kind, message in run_ranks(2, tmp_path, _start_with, config, roots, fails=True):
        assert kind == "UserError" and "rank 1 on" in message and "data of split 'train' is '11 images" in message
    assert not (folder / "masks").exists()


def test_one_stage_alone(data, tmp_path):
    config = pipeline_runs.values(data, tmp_path)
    with pytest.raises(UserError, match="stage 'cams' reads stage 'cam_network', which is not done; run the config"):
        Pipeline(copy.deepcopy(config)).start("cams")
    assert Pipeline(copy.deepcopy(config)).start("classifier") == 0
    assert [p.parent.name for p in (tmp_path / "chain").glob("*/stage.json")] == ["classifier"]
    with pytest.raises(UserError, match="--stage cam is none of the stages: classifier, cam_network, cams"):
        Pipeline(config).start("cam")


def kill_when(config, tmp_path, ready):
    """Start the run in a process and kill it as soon as `ready()`; it must not have ended before."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log.txt", "a") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.train.pipeline_runs", str(path)], cwd=ROOT, env=env, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 240
    while not ready():
        assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_killed_in_training_in_inference_and_in_the_walk(whole, data, tmp_path):
    """kill -9 in the middle of the CAM network, of the CAMs and of the random walk: the same files, the same scores."""
    config = pipeline_runs.values(data, tmp_path)
    folder = tmp_path / "chain"

    def some_of(stage):
        return lambda: len(list((folder / stage / "out/train").rglob("*.npz"))) >= 2

    kill_when(config, tmp_path, lambda: (folder / "cam_network/checkpoints/ckpt-1").is_dir())
    assert not (folder / "cam_network/stage.json").exists()
    assert not (folder / "cam_network/checkpoints/ckpt-3").exists()
    for stage in ("cams", "walk"):
        kill_when(config, tmp_path, some_of(stage))
        assert not (folder / stage / "stage.json").exists()
        assert 2 <= len(list((folder / stage / "out/train").rglob("*.npz"))) < TRAIN
    assert pipeline_runs.start(config) == 0
    assert scores(folder) == scores(whole[1])
    assert outputs(folder) == outputs(whole[1])


def test_two_ranks_make_the_files_of_one(copied, tmp_path):
    config, folder = copied
    before, found = outputs(folder), scores(folder)
    for stage in ("cams", "saliency", "refined", "labels", "walk", "masks", "segmentation"):
        subprocess.run(["rm", "-r", str(folder / stage)], check=True)
    assert run_ranks(2, tmp_path, pipeline_runs.start, config) == [0, 0]
    assert outputs(folder) == before and scores(folder) == found


def untagged(root, tmp_path, count):
    """The data set, with the tags and annotations of the first images of its training split taken away."""
    new = tmp_path / "untagged"
    subprocess.run(["cp", "-r", str(root), str(new)], check=True)
    path = new / "annotations/train.json"
    content = json.loads(path.read_text())
    ids = {image["id"] for image in content["images"][:count]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in ids]
    for image in content["images"][:count]:
        image["labels"] = []
    path.write_text(json.dumps(content))
    return str(new)


@pytest.mark.parametrize("how", ["drop", "keep"])
def test_images_without_tags_are_left_out_and_counted(copied, tmp_path, capsys, how):
    config, folder = copied
    config["data"] |= {"root": untagged(config["data"]["root"], tmp_path, 2), "untagged": how}
    assert Pipeline(config).start(until="masks") == 0
    said = capsys.readouterr().out
    assert said.count("cams, train: 2 images without tags are left out") == 1
    assert said.count("walk, train: 2 images without tags are left out") == 1
    assert len(list((folder / "cams/out/train").rglob("*.npz"))) == TRAIN - 2
    masks = sorted((folder / "masks/out/train").rglob("*.png"))
    assert len(masks) == (TRAIN - 2 if how == "drop" else TRAIN)
    if how == "keep":
        assert (np.asarray(Image.open(masks[0])) == 0).all()


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {}}, "'stages' must be a mapping of names to stages"),
        ({"stages": {"a b": {"kind": "cams"}}}, "names a stage 'a b'"),
        (
            {"stages": {"x": {"kind": "camz"}}},
            "'stages.x.kind' is 'camz'; expected one of train, affinity_labels, cams",
        ),
        (
            {"stages": {"x": {"kind": "cams", "network": "${y}"}}},
            r"'stages.x' refers to \$\{y\}, which is no earlier st",
        ),
        ({"stages": {"x": {"kind": "cams", "network": "y", "scale": [1]}}}, "stage 'x': config: unknown key 'scale'"),
        ({"mehtod": {}}, "unknown key 'mehtod' beside 'stages'"),
    ],
)
def test_mistakes_in_the_config(tmp_path, change, message):
    config = pipeline_runs.values(tmp_path, tmp_path) | change
    with pytest.raises(UserError, match=message):
        Pipeline(config)


@pytest.mark.parametrize(
    ("stage", "next_stage", "suffix"), [("cams", "walk", ".npz"), ("refined", "labels", ".png"), ("labels", "", ".png")]
)
def test_a_damaged_file_names_itself_and_its_stage(copied, stage, next_stage, suffix):
    config, folder = copied
    file = sorted((folder / stage / "out/train").rglob(f"*{suffix}"))[3]
    file.write_bytes(file.read_bytes()[:40])
    again = next_stage or stage
    (folder / again / "stage.json").unlink()
    subprocess.run(["rm", "-rf", str(folder / next_stage / "out")], check=True) if next_stage else None
    with pytest.raises(UserError, match=f"{file.name} cannot be used: .*: the stage '{stage}' makes it"):
        pipeline_runs.start(config, again)


def renamed_classes(root, tmp_path):
    """The data set with another name for its first class."""
    new = tmp_path / "renamed"
    subprocess.run(["cp", "-r", str(root), str(new)], check=True)
    for path in (new / "annotations").glob("*.json"):
        path.write_text(path.read_text().replace("disc-0", "ring-0"))
    return str(new)


@pytest.mark.parametrize(("stage", "network"), [("cams", "cam_network"), ("cam_network", "classifier")])
def test_weights_of_other_classes_are_refused_before_the_first_step(copied, tmp_path, stage, network):
    """Inference of a CAM network, and training against a second classifier."""
    config, folder = copied
    config["stages"][stage]["data"] = {"root": renamed_classes(config["data"]["root"], tmp_path)}
    with pytest.raises(
        UserError, match=f"{network}/model.safetensors was trained on other classes .'disc-0' there, 'ri"
    ):
        pipeline_runs.start(config, stage)
    assert not list((folder / stage).glob("checkpoints/*")) and not (folder / stage / "out").exists()


def test_a_network_that_cannot_do_it(copied):
    config, _ = copied
    config["stages"]["cams"]["network"] = "${classifier}"
    config["stages"]["saliency"]["network"] = "${classifier}"
    with pytest.raises(UserError, match="stage 'saliency': the network of 'classifier' gives no saliency"):
        pipeline_runs.start(config, "saliency")
