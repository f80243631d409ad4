"""A run of AE-PSL: what every step of erasing leaves, the same after kills and on two ranks, stores that do not fit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_damaged import damage
from tests.train import pipeline_runs
from tests.train.pipeline_runs import TRAIN, outputs, scores
from tests.train.ranks import run_ranks
from tests.train.test_pipeline import kill_when
from wsss_dist.data.erased import load_regions, read_manifest, regions_writer
from wsss_dist.errors import UserError
from wsss_dist.pipeline import Pipeline


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with pipeline_runs.one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pipeline_runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return pipeline_runs.finished(pipeline_runs.erasing_values(data, tmp_path_factory.mktemp("whole")))


@pytest.fixture
def copied(whole, tmp_path):
    return pipeline_runs.copy_of(whole, tmp_path)


def test_regions_grow_and_hold_the_share_of_each_step(whole):
    """Golden check 7: Z_t is in Z_(t+1); each step takes a fifth of the pixels of each tag at most, and something."""
    _, folder = whole
    files = sorted((folder / "regions_1/out/train").rglob("*.npz"))
    assert len(files) == TRAIN
    taken = grown = 0
    for path in files:
        steps = []
        for step in (1, 2, 3):
            labels, regions = load_regions(folder / f"regions_{step}/out/train" / path.name, 3)
            steps.append(regions)
        assert (steps[0].mean((1, 2)) <= 0.2 + 1e-9).all()
        for before, after in zip(steps, steps[1:], strict=False):
            assert (after >= before).all() and ((after & ~before).mean((1, 2)) <= 0.2 + 1e-9).all()
            grown += int((after & ~before).sum())
        taken += int(steps[0].sum())
    assert taken > 0 and grown > 0


def test_every_step_says_its_loss_and_what_the_rule_says(whole):
    _, folder = whole
    for step in (1, 2, 3):
        lines = [json.loads(line) for line in (folder / f"erasing_{step}/metrics.jsonl").read_text().splitlines()]
        mean = sum(line["loss_cls"] for line in lines) / 3  # an epoch has six steps, the run three
        manifest = read_manifest(folder / f"regions_{step}/out/train")
        assert len(manifest.losses) == step and manifest.losses[-1] == pytest.approx(mean, rel=1e-12)
        found = scores(folder)[f"regions_{step}"]["val"]["regions"]
        assert found["classifier_loss"] == manifest.losses[-1]
        assert found["stopping_rule"].startswith(f"step {step}: ")
        assert {manifest.classes[0], len(manifest.classes)} == {"disc-0", 3}
    report = (folder / "report.html").read_text()
    assert "Mined regions" in report and found["stopping_rule"].split(",")[0] in report


def test_precision_and_recall_are_those_of_the_pixels(whole):
    config, folder = whole
    pipeline = Pipeline(copy.deepcopy(config))
    dataset = pipeline_runs.dataset(pipeline, "val")
    hits = claimed = true = 0
    for i in range(len(dataset)):
        labels, regions = load_regions(folder / "regions_2/out/val" / f"{dataset.id(i)}.npz", 3)
        truth = dataset.mask(i)
        true += int(((truth > 0) & (truth < 255)).sum())
        for label, region in zip(labels, regions, strict=True):
            claimed += int((region & (truth != 255)).sum())
            hits += int((region & (truth == label + 1)).sum())
    found = scores(folder)["regions_2"]["val"]["regions"]
    assert found["region_precision"] == hits / claimed and found["region_recall"] == hits / true


def test_the_mean_colour_is_that_of_the_training_images(whole):
    config, folder = whole
    pipeline = Pipeline(copy.deepcopy(config))
    dataset = pipeline_runs.dataset(pipeline, "train")
    pixels = np.concatenate([dataset.image(i).reshape(-1, 3) for i in range(len(dataset))]).astype(np.float64)
    for step, split in ((1, "train"), (3, "train"), (3, "val")):
        found = read_manifest(folder / f"regions_{step}/out/{split}").mean
        assert found == pytest.approx(pixels.mean(0).tolist(), rel=1e-12)


def test_masks_follow_the_table(whole):
    _, folder = whole
    values = set()
    for path in sorted((folder / "masks/out/train").rglob("*.png")):
        labels, regions = load_regions(folder / "regions_2/out/train" / f"{path.stem}.npz", 3)
        mask = np.asarray(Image.open(path))
        claims = regions.sum(0)
        assert ((mask == 255) | (claims < 2)).all(), "a conflict is undecided"
        assert ((mask != 0) | (claims == 0)).all(), "a claimed pixel is never background"
        for label, region in zip(labels, regions, strict=True):
            assert (region[mask == label + 1]).all()
        values |= set(np.unique(mask))
    assert {0, 255} < values


def test_killed_in_a_training_in_the_mining_and_in_psl(whole, data, tmp_path):
    """kill -9: the same files, the same scores."""
    config = pipeline_runs.erasing_values(data, tmp_path)
    folder = tmp_path / "chain"
    for ready in (
        lambda: (folder / "erasing_2/checkpoints/ckpt-1").is_dir(),
        lambda: len(list((folder / "regions_2/out/train").rglob("*.npz"))) >= 2,
        lambda: (folder / "psl/checkpoints/ckpt-1").is_dir(),
    ):
        kill_when(config, tmp_path, ready)
    assert not (folder / "psl/stage.json").exists()
    assert pipeline_runs.start(config) == 0
    assert scores(folder) == scores(whole[1])
    assert outputs(folder) == outputs(whole[1])


def test_two_ranks_make_the_files_of_one(copied, tmp_path):
    config, folder = copied
    before, found = outputs(folder), scores(folder)
    for stage in ("regions_1", "regions_2", "masks", "psl_masks", "bound"):
        shutil.rmtree(folder / stage)
    assert run_ranks(2, tmp_path, pipeline_runs.start, config) == [0, 0]
    assert outputs(folder) == before and scores(folder) == found


def test_until_runs_what_a_stage_needs(data, tmp_path):
    config = pipeline_runs.erasing_values(data, tmp_path)
    assert Pipeline(copy.deepcopy(config)).start(until="regions_1") == 0
    assert {p.parent.name for p in (tmp_path / "chain").glob("*/stage.json")} == {"erasing_1", "regions_1"}
    assert Pipeline(copy.deepcopy(config)).start(until="cams") == 0
    done = {p.parent.name for p in (tmp_path / "chain").glob("*/stage.json")}
    assert done == {"erasing_1", "regions_1", "cams"}
    with pytest.raises(UserError, match="--until cam is none of the stages"):
        Pipeline(copy.deepcopy(config)).start(until="cam")
    with pytest.raises(UserError, match="--stage and --until exclude each other"):
        Pipeline(config).start("cams", "cams")


def test_the_bound_knows_the_tags(whole):
    """With the tags at test time no other class is predicted; without, the weights change nothing but classes."""
    config, folder = whole
    dataset = pipeline_runs.dataset(Pipeline(copy.deepcopy(config)), "val")
    assert set(scores(folder)["bound"]["val"]) == {"seg_tags_crf"}
    for i in range(len(dataset)):
        found = set(np.unique(np.asarray(Image.open(folder / "bound/out/val" / f"{dataset.id(i)}.png"))))
        assert found <= {0, *(np.flatnonzero(dataset.tags[i]) + 1)}


# ------------------------------------------------------------------------------------------------ mistakes


def test_one_rule_for_all_steps(copied):
    config, folder = copied
    config["stages"]["regions_2"]["share"] = 0.3
    with pytest.raises(UserError, match="stage 'regions_2': .*regions_1/out/train was mined by .*0.2.*, this .*0.3"):
        pipeline_runs.start(config, "regions_2")


def test_a_store_of_other_images_is_refused(copied):
    config, _ = copied
    config["stages"]["erasing_2"]["data"]["train_limit"] = 6
    with pytest.raises(UserError, match="regions_1/out/train/store.json was made of other images or tags"):
        pipeline_runs.start(config, "erasing_2")


def test_a_classifier_of_another_step_is_refused(copied):
    config, _ = copied
    config["stages"]["regions_2"]["network"] = "${erasing_1}"
    with pytest.raises(UserError, match="'erasing_1' was trained with nothing erased, 'before' says regions_1/out/tr"):
        pipeline_runs.start(config, "regions_2")


def test_masks_of_regions_that_are_not_there_are_refused(copied):
    config, folder = copied
    other, path = sorted((folder / "regions_2/out/train").rglob("*.npz"))[:2]
    shutil.copyfile(other, path)
    shutil.rmtree(folder / "masks")
    with pytest.raises(UserError, match=rf"regions of image {path.stem} in .* of the classes \[.*\]; expected its"):
        pipeline_runs.start(config, "masks")
    (folder / "regions_2/out/val/store.json").write_text("{")
    with pytest.raises(UserError, match="regions_2/out/val/store.json cannot be used"):
        pipeline_runs.start(config, "masks")
    path.unlink()
    with pytest.raises(UserError, match="reads stage 'regions_2', which is .* or has lost files"):
        pipeline_runs.start(config, "masks")


def test_the_report_leaves_out_what_belongs_to_another_config(copied):
    config, folder = copied
    config["stages"]["masks"]["regions"] = "${regions_1}"
    assert Pipeline(copy.deepcopy(config)).start(until="masks") == 0
    steps = {f"{kind}_{step}" for kind in ("erasing", "regions") for step in (1, 2, 3)}
    assert set(scores(folder)) == {*steps, "cams", "masks"}


def test_regions_of_other_tags_are_refused(copied):
    config, folder = copied
    path = sorted((folder / "regions_1/out/train").rglob("*.npz"))[2]
    damage(path, "truncated")
    with pytest.raises(UserError, match=f"{path.name} cannot be used: BadZipFile.*the stage 'regions_1' makes it"):
        (folder / "regions_2/stage.json").unlink()
        shutil.rmtree(folder / "regions_2/out")
        pipeline_runs.start(config, "regions_2")
    shutil.copyfile(sorted((folder / "regions_1/out/train").rglob("*.npz"))[1], path)
    with pytest.raises(UserError, match=rf"{path.name} holds regions of the classes \[.*\]; expected .*, the tags"):
        pipeline_runs.start(config, "regions_2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "cannot be used .the file is missing."),
        (Image.new("L", (63, 64)), r"is 64 x 63 .height x width.; expected an 8-bit grey PNG of 64 x 64"),
        (Image.new("RGB", (64, 64)), "cannot be used .*RGB"),
        (Image.new("I;16", (64, 64)), "cannot be used .*I;16"),
        (Image.new("L", (64, 64), 1), "holds the values 0 and 1 alone; expected .* 0 to 255"),
    ],
)
def test_saliency_that_does_not_fit_names_both_files(copied, tmp_path, make, message):
    config, folder = copied
    section, grey = with_saliency(config, folder, tmp_path)
    assert Pipeline(copy.deepcopy(config)).start("masks") == 0
    wrong = sorted((grey / "train").iterdir())[5]
    wrong.unlink()
    if make is not None:
        make.save(wrong)
    shutil.rmtree(folder / "masks")
    image = Path(config["data"]["root"]) / "images/train" / f"{wrong.stem}.jpg"
    with pytest.raises(UserError, match=f"saliency map {wrong} {message}.*image {image}: make it again"):
        Pipeline(copy.deepcopy(config)).start("masks")


def test_indoor_classes_are_classes_of_the_data(copied, tmp_path):
    """Also where the list is the default, VOC's."""
    config, folder = copied
    section, _ = with_saliency(config, folder, tmp_path)
    for names in (["sofa"], None):
        section["indoor_classes"] = names
        if names is None:
            del section["indoor_classes"]
        with pytest.raises(UserError, match=r"stage 'masks': indoor_classes names .*disc-0.*, or write \[\]"):
            Pipeline(copy.deepcopy(config)).start("masks")


def test_masks_without_a_decided_pixel_are_counted(copied, tmp_path, capfd):
    """Without a region and salient all over: nothing is decided."""
    config, folder = copied
    _, grey = with_saliency(config, folder, tmp_path)
    names = sorted(path.stem for path in (grey / "train").iterdir())[:2]
    for name in names:
        Image.new("L", (64, 64), 255).save(grey / "train" / f"{name}.png")
        path = folder / "regions_2/out/train" / f"{name}.npz"
        labels, regions = load_regions(path, 3)
        with open(path, "wb") as file:
            regions_writer(labels, np.zeros_like(regions))(file)
    assert Pipeline(copy.deepcopy(config)).start("masks") == 0
    empty = [p.stem for p in (folder / "masks/out/train").iterdir() if (np.array(Image.open(p)) == 255).all()]
    assert set(names) <= set(empty) and len(empty) < TRAIN
    assert f"masks, train: {len(empty)} of {TRAIN} images have no decided pixel" in capfd.readouterr().out


def test_a_damaged_image_stops_the_mean_colour_on_every_rank(copied, tmp_path):
    """On two ranks, one of which does not meet it, the run ends with status 2 and the image's name."""
    config, folder = copied
    shutil.rmtree(folder / "regions_1")
    root = tmp_path / "data"
    shutil.copytree(config["data"]["root"], root)
    config["data"]["root"] = str(root)
    bad = sorted((root / "images").rglob("*.jpg"))[3]
    bad.write_bytes(bad.read_bytes()[:40])
    errors = run_ranks(2, tmp_path, fails_with, config, "regions_1")
    assert all(bad.name in error for error in errors), errors


def fails_with(config, stage):
    """The message of the UserError that a stage ends with."""
    with pytest.raises(UserError) as caught:
        Pipeline(copy.deepcopy(config)).start(stage)
    return str(caught.value)


def with_saliency(config, folder, tmp_path):
    """The section of the masks, with grey maps on disk as background cue, and their folder."""
    grey = tmp_path / "grey"
    for split in ("train", "val"):
        (grey / split).mkdir(parents=True)
        for path in (folder / f"regions_1/out/{split}").rglob("*.npz"):
            Image.new("L", (64, 64), 40).save(grey / split / f"{path.stem}.png")
    section = config["stages"]["masks"]
    del section["cams"]
    section |= {"saliency": str(grey), "indoor_classes": []}
    shutil.rmtree(folder / "masks")
    return section, grey
