"""Evaluation on several ranks: the counts of one rank to the bit, slow ranks, images that cannot be read."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pytest
import torch

from tests.data.synthetic import write_synthetic_dataset
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.test_evaluate import Colours, ColourSet, config
from tests.train.test_pseudo_labels import small_run
from wsss_dist import dist, evaluate
from wsss_dist.config import load_config, parse_config
from wsss_dist.data.decode import DamagedImage
from wsss_dist.errors import UserError
from wsss_dist.evaluate import evaluate_splits
from wsss_dist.trained import load_newest


class Social(Colours):
    """What it says of an image depends on the others in the batch: a result tells which images met."""

    patch_size = 16

    def predict(self, batch, views):
        prediction = super().predict(batch, views)
        others = 0.3 * batch.images.mean() + 0.1 * len(batch)
        prediction.cam = torch.sigmoid(batch.images + others) * batch.labels[:, :, None, None]
        prediction.logits[:, 0] += others
        return prediction


class SomeDamaged(ColourSet):
    """Which images cannot be read is known to the readers alone, as of real files."""

    damaged = ()

    def image(self, i):
        if i in self.damaged:
            raise DamagedImage(f"c/{i}.jpg", "the file is empty")
        return super().image(i)


def _evaluate(folder, splits, workers=0, slow=None, damaged=()):
    """(result, images that this rank saw) of an evaluation on these ranks; split -> number of images.

    Rank `slow` does nothing until the others have done ENOUGH images.
    """
    multiprocessing.set_start_method("fork", force=True)  # of the workers of the loader; the tests' own is slow
    sets = {split: SomeDamaged(n) for split, n in splits.items()}
    for dataset in sets.values():
        dataset.damaged = damaged
    evaluate.build_dataset = lambda cfg, split: sets[split]
    evaluate.check_eval_samples = lambda *args: None
    method = Social(extras=True)
    if slow is not None:
        of_class, done = method.predict, folder.with_name("done")

        def predict(batch, views):
            if dist.rank() == slow:
                wait_for(lambda: done.is_file() and done.stat().st_size >= ENOUGH)
            else:
                with open(done, "ab") as file:
                    file.write(b"x" * len(batch.ids))
            return of_class(batch, views)

        method.predict = predict
    cfg = config(size=None, batch=4, num_images=5)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"num_workers": workers})})
    result = evaluate_splits(method, cfg, list(splits), folder, 1)
    return result, [name for _, ids, _ in method.seen for name in ids]


SPLITS = {"val": 50, "short": 2}
ENOUGH = 36


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "the others did not take the images of the slow rank"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and result of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    ((result, seen),) = run_ranks(1, folder, _evaluate, folder, SPLITS)
    assert len(seen) == 52
    assert result["val"]["seg"]["miou"] != result["val"]["seg_tags"]["miou"] > 0.2
    return folder, result


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 2), (4, 0)])
def test_any_number_of_ranks_gives_the_counts_of_one(ranks, workers, alone, tmp_path):
    folder, result = alone
    out = run_ranks(ranks, tmp_path, _evaluate, tmp_path / "run", SPLITS, workers)
    assert [found for found, _ in out] == [result] * ranks, "every rank gets the result of one rank, to the bit"
    every = [f"c/{i}" for n in SPLITS.values() for i in range(n)]
    assert sorted(name for _, seen in out for name in seen) == sorted(every), "each image once"
    one, other = (json.loads((f / "result.json").read_text())["splits"] for f in (folder, tmp_path / "run"))
    for split in SPLITS:
        assert one[split]["kinds"] == other[split]["kinds"] == json.loads(json.dumps(result[split]))
        a, b = (sorted((f / "samples" / split).iterdir()) for f in (folder, tmp_path / "run"))
        assert [f.name for f in a] == [f.name for f in b]
        for left, right in zip(a, b, strict=True):
            x, y = np.load(left), np.load(right)
            assert all(np.array_equal(x[k], y[k]) for k in (*x.files, *y.files))


def test_these_tests_would_notice_other_batches(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: ColourSet(SPLITS[split]))
    other = evaluate_splits(Social(extras=True), config(size=None, batch=3), list(SPLITS), tmp_path, 1)
    assert other != alone[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_rank_is_helped(workers, alone, tmp_path):
    out = run_ranks(2, tmp_path, _evaluate, tmp_path / "run", SPLITS, workers, 1)
    assert [found for found, _ in out] == [alone[1]] * 2
    fast, slow = (len(seen) for _, seen in out)
    assert fast + slow == 52 and fast >= ENOUGH


def _with_blocks_of(sizes):
    evaluate.build_dataset = lambda cfg, split: ColourSet()
    evaluate_splits(Colours(), config(batch=sizes[dist.rank()]), ["val"], None, 1, final=False)


def test_ranks_that_would_cut_other_blocks_are_told_apart(tmp_path):
    for kind, message in run_ranks(2, tmp_path, _with_blocks_of, [3, 4], fails=True):
        assert kind == "UserError" and "config 'eval.batch' is 4, on rank 0 3" in message


def test_a_damaged_image_ends_every_rank_with_one_message(tmp_path):
    """Each of the two is met by some rank; the first rank that met one names it, and the others take no more images."""
    ends = run_ranks(3, tmp_path, _evaluate, tmp_path / "run", {"val": 22}, 0, None, (5, 9), fails=True)
    assert ends == [ends[0]] * 3
    kind, message = ends[0]
    assert kind == "BadFile" and "cannot be read (the file is empty)" in message
    assert any(f"image c/{i}.jpg of the evaluation split" in message for i in (5, 9))


def _open(values):
    evaluate.open_splits(parse_config(values), ["val"])


def test_what_is_found_before_the_evaluation_ends_every_rank_with_the_same_error(tmp_path):
    root = write_synthetic_dataset(tmp_path / "data", 4, 3, 32, 3, seed=1)
    first = sorted((root / "images/val").iterdir())[0]
    first.write_bytes(b"")
    values = tiny.values(tmp_path)
    values["data"] = {"format": "coco", "root": str(root), "eval_splits": ["val"], "crop": 16, "num_workers": 0}
    ends = run_ranks(2, tmp_path, _open, values, fails=True)
    assert ends[0] == ends[1], "rank 0 alone looks, and hands on what it finds"
    kind, message = ends[1]
    assert kind == "BadFile" and f"{first} of the evaluation split" in message and "the file is empty" in message


def _write_often(folder, name):
    cfg = config()
    for i in range(100):
        samples = {name: [{"index": k, "image": np.full((8, 8, 3), i, np.uint8)} for k in range(i % 3 + 1)]}
        evaluate._write(folder, None, cfg, ["a"], {f"{name}{i}": {"kinds": {}}}, samples)


def test_two_evaluations_of_a_run_at_once_keep_what_the_other_found(tmp_path):
    folder = tmp_path / "run"
    alone = [{}, {}]  # two commands, not two ranks of one
    run_ranks(2, tmp_path, _write_often_as, folder, environments=alone)
    found = json.loads((folder / "result.json").read_text())["splits"]
    assert set(found) == {f"{name}{i}" for name in "ab" for i in range(100)}
    assert [p.name for p in sorted((folder / "samples/a").iterdir())] == ["000000.npz"], "those of the last one alone"
    assert not list(folder.rglob("*.partial"))


def _write_often_as(folder):
    with evaluate.locked(folder.parent):
        name = "b" if (folder.parent / "a").exists() else "a"
        (folder.parent / name).touch()
    _write_often(folder, name)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_damaged_result_is_one_sentence_before_the_work(content, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: ColourSet(6))
    (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    method = Colours()
    with pytest.raises(UserError, match=r"result\.json is no result of an evaluation .*; delete it, or put") as error:
        evaluate_splits(method, config(), ["val"], tmp_path, 1)
    assert not method.seen and "\n" not in str(error.value)


def _evaluate_run(run_dir, folder):
    cfg = load_config(run_dir / "config.yaml", ["eval.batch=2"])
    method, checkpoint = load_newest(cfg, run_dir, ["disc-0", "square-0", "triangle-0"])
    return evaluate_splits(method, cfg, ["val"], folder, checkpoint["step"])


def test_a_trained_network_has_the_counts_of_one_rank(tmp_path):
    run_dir = small_run(tmp_path, 4)
    one, two, three = (run_ranks(n, tmp_path, _evaluate_run, run_dir, tmp_path / str(n)) for n in (1, 2, 3))
    assert {"cam", "seg", "seg_tags_crf", "pseudo"} <= set(one[0]["val"])
    assert two == one * 2 and three == one * 3
