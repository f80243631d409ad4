"""Shards hold the bytes of the set they were made from, and give the same samples, wherever they lie."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data import sets
from tests.data.shards_made import config, contents, flip, jpeg, tar, write
from tests.data.test_loader import STEPS, N, stream
from wsss_dist.data import build_dataset, build_eval_loader, build_train_loader
from wsss_dist.data.prepare import shards as prepare
from wsss_dist.data.prepare.shards import parse_size
from wsss_dist.data.shard_files import LocalFolder
from wsss_dist.data.shard_index import sample_key
from wsss_dist.errors import UserError


def test_shards_hold_the_original_bytes(scenes, made):
    tars = sorted((made / "val").glob("*.tar"))
    assert len(tars) > 1 and len(list((made / "train").glob("*.tar"))) > 3
    seen = {}
    for path in tars:
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                seen[member.name] = archive.extractfile(member).read()
    assert list(seen) == [f"{k:05d}.{kind}" for k in range(5) for kind in ("jpg", "png", "json")]
    for k in range(5):
        assert seen[f"{k:05d}.jpg"] == (scenes / f"images/val/{k:05d}.jpg").read_bytes()
        assert seen[f"{k:05d}.png"] == (scenes / f"masks/val/{k:05d}.png").read_bytes()
    data = build_dataset(sets.config(scenes), "val")
    about = json.loads(seen["00002.json"])
    assert about == {
        "tags": [data.class_names[c] for c in np.flatnonzero(data.tags[2])],
        "name": "00002",
        "path": "00002.jpg",
    }
    with tarfile.open(next((made / "train").glob("*.tar"))) as archive:
        assert not [name for name in archive.getnames() if name.endswith(".png")]


@pytest.mark.parametrize("format", ["coco", "voc", "folder"])
def test_a_data_set_of_shards_is_the_one_it_was_made_of(tmp_path, format):
    root = getattr(sets, f"write_{format}")(tmp_path / "set")
    classes = None if format != "voc" else ["cat", "dog"]
    split = "train" if format != "voc" else "train_aug"
    if format == "folder":
        for name in ("a.b", "c"):  # dots that WebDataset would cut at; a PNG beside its mask
            sets.add_mask(root, f"{name}.png", {0: 1})
        (root / "train/images/a.png").rename(root / "train/images/a.b.PNG")
        (root / "train/images/b.jpg").rename(root / "train/images/b.JPG")
        (root / "train/labels.csv").write_text('image,labels\na.b.PNG,""\nc.jpg,cow\n')
    if format == "voc":
        (root / "VOCdevkit/VOC2012/SegmentationClass/2007_a.png").unlink()
        sets.add_mask(root / "VOCdevkit/VOC2012", "2007_a.png", {0: 2}, folder="SegmentationClass")
        sets.add_mask(root / "VOCdevkit/VOC2012", "2008_b.png", {0: 1}, folder="SegmentationClassAug")
    write(root, tmp_path / "out" / "set", split, format, masks=True, classes=classes)
    one = build_dataset(sets.config(root, format, classes=classes), split)
    two = build_dataset(config(tmp_path / "out" / "set"), split)
    assert two.class_names == one.class_names and (two.tags == one.tags).all()
    assert len(one) == len(two) > 1 and format == "voc" or two.name == one.name
    for i in range(len(one)):
        assert two.id(i) == one.id(i) and (two.image(i) == one.image(i)).all() and (two.mask(i) == one.mask(i)).all()
    if format == "folder":
        assert sample_key("x.y/a.b.PNG") == "x.y/a%2Eb" and two.path(0).endswith(".tar:a%2Eb.png")


def test_subsets_move_the_places_too(scenes, made):
    for changes in ({"train_limit": 7}, {"untagged": "drop"}):
        one, two = (build_dataset(cfg, "train") for cfg in (sets.config(scenes, **changes), config(made, **changes)))
        assert [two.id(i) for i in range(len(two))] == [one.id(i) for i in range(len(one))]
        assert all((two.image(i) == one.image(i)).all() for i in range(len(one)))


@pytest.mark.parametrize("kill_at", ["first image", "between shards", "inside a shard", "before the index"])
def test_a_killed_run_goes_on_to_the_same_bytes(scenes, tmp_path, made, kill_at):
    """The child ends itself as SIGKILL would: nothing is flushed, nothing is cleaned up."""
    written = tmp_path / "written"
    if (child := os.fork()) == 0:
        calls = {"first image": 1, "between shards": 4, "inside a shard": 8, "before the index": 10**9}[kill_at]
        real = prepare._contents

        def counted(dataset, i, masks):
            nonlocal calls
            calls -= 1
            if not calls:
                os._exit(9)
            return real(dataset, i, masks)

        prepare._contents = counted
        prepare._index = lambda *_: os._exit(9)
        write(scenes, written)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (written / "train").exists()
    said = []
    write(scenes, written, say=said.append)
    total = len(list((made / "train").glob("*.tar")))
    done = {"first image": 0, "between shards": 1, "inside a shard": 2, "before the index": total}[kill_at]
    assert len(said) - 1 == total - done
    assert contents(written / "train") == contents(made / "train")
    assert sorted(path.name for path in written.iterdir()) == ["train"]


def test_what_is_there_is_checked_and_never_replaced(scenes, copy):
    said = []
    write(scenes, copy, say=said.append)
    assert "is complete: 19 images" in said[0]
    whole = (copy / "train/shards.json").read_text()
    (copy / "train/shards.json").write_text('{"version": 1, "samples": {"sha256": ""}}')
    with pytest.raises(UserError, match="train holds something else; delete the folder, or give another --out"):
        write(scenes, copy)
    (copy / "train/shards.json").write_text(whole)
    with pytest.raises(UserError, match="train holds shards of .*delete the folder, or give another --out"):
        write(scenes, copy, size=9000)
    path = sorted((copy / "train").glob("*.tar"))[1]
    flip(path, 700)
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged"):
        write(scenes, copy)


def test_a_changed_set_is_begun_anew(scenes, tmp_path):
    partial, old = tmp_path / ".train.partial", hashlib.sha256(b"old").hexdigest()
    partial.mkdir()
    (partial / "progress.json").write_text(json.dumps({"key": "another", "shards": {"train-000000.tar": old}}))
    (partial / "train-000000.tar").write_bytes(b"old")
    write(scenes, tmp_path)
    assert not partial.exists() and len(build_dataset(config(tmp_path), "train")) == N


def test_two_writers_do_not_meet(scenes, tmp_path):
    import fcntl

    (tmp_path / ".train.partial").mkdir()
    with (tmp_path / ".train.partial/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes .*wait for it"):
            write(scenes, tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_file_system_without_locks_does_not_stop_a_writer(scenes, tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    if number == errno.EACCES:
        with pytest.raises(UserError, match="another process writes .*wait for it"):
            write(scenes, tmp_path, "val")
    elif number == errno.EIO:
        with pytest.raises(OSError, match="put/output"):
            write(scenes, tmp_path, "val")
    else:
        assert len(build_dataset(config(write(scenes, tmp_path, "val")), "val")) == 5


def test_a_set_in_the_home_folder_keeps_what_it_says_of_itself(tmp_path, monkeypatch):
    sets.write_folder(tmp_path / "own")
    (tmp_path / "own/manifest.json").write_text('{"about": "tags of one person"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    write(Path("~/own"), tmp_path / "out", form="folder")
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == {"about": "tags of one person"}


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1 GiB", 2**30), ("500", 500), ("1.5k", 1500), ("2mb", 2_000_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.fixture(scope="module")
def reference(scenes):
    """(step, position) -> id, hash of the augmented pixels, box, flip, tags, from the files."""
    return stream(scenes)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_for_any_workers_and_ranks(made, reference, workers, world):
    assert stream(made, format="shards", workers=workers, world=world) == reference


def test_resume_at_a_random_step_with_other_workers_and_ranks(made, reference):
    rng = np.random.default_rng(3)
    for _ in range(3):
        start, workers, world = int(rng.integers(1, STEPS)), int(rng.integers(0, 3)), int(rng.choice([1, 2, 4]))
        resumed = stream(made, format="shards", start=start, steps=STEPS - start, workers=workers, world=world)
        assert resumed == {key: value for key, value in reference.items() if key[0] >= start}


@pytest.mark.parametrize("world", [1, 2])
def test_damaged_images_are_replaced_by_the_same_as_those_of_files(scenes, tmp_path, world):
    root = Path(shutil.copytree(scenes, tmp_path / "set"))
    for k in (4, 5, N - 1):  # two in a row, and the last, after which comes the first
        (root / f"images/train/{k:05d}.jpg").write_bytes(b"<html>")
    write(root, tmp_path / "out")
    of_files, of_shards = [], []
    files = stream(root, damaged=of_files)
    assert stream(tmp_path / "out", format="shards", world=world, workers=1, damaged=of_shards) == files
    assert sorted(of_files) == sorted(of_shards) and {name for name, _ in of_files} >= {"00004.jpg", "00005.jpg"}
    resumed = stream(tmp_path / "out", format="shards", start=2, steps=STEPS - 2, world=world, damaged=[])
    assert resumed == {key: value for key, value in files.items() if key[0] >= 2}


def test_another_size_of_shards_is_no_other_stream(scenes, tmp_path, reference):
    write(scenes, tmp_path, size=10**9)
    assert len(list((tmp_path / "train").glob("*.tar"))) == 1
    assert stream(tmp_path, format="shards") == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_over_an_address(made, in_memory, tmp_path, reference, workers):
    assert stream(in_memory, format="shards", workers=workers) == reference
    assert stream(f"file://{made}", format="shards", workers=workers) == reference
    cache = {"dir": tmp_path / "cache", "gb": 1}
    for _ in range(2):
        assert stream(in_memory, format="shards", workers=workers, world=2, cache=cache) == reference
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(list((made / "train").glob("*.tar")))


def test_maps_of_earlier_stages_stay_in_their_folders(scenes, made, tmp_path):
    maps = sets.write_maps(tmp_path / "earlier", build_dataset(sets.config(scenes), "train"))
    seen = []
    for cfg in (sets.config(scenes, maps=maps), config(made, maps=maps)):
        data = build_dataset(cfg, "train")
        loader = build_train_loader(
            data, cfg, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, start_step=0, num_steps=2
        )
        seen.append([{name: values.tolist() for name, values in batch.maps.items()} for (batch,) in loader])
    assert seen[0] == seen[1] and set(seen[0][0]) == {"labels", "saliency", "hint"}


def test_training_never_reads_a_mask(scenes, tmp_path, monkeypatch):
    write(scenes, tmp_path, masks=True)
    data = build_dataset(config(tmp_path), "train")
    assert data.has_masks
    masks = {
        (data._shards[data._shard[i]].file, int(data._offsets[i, 1]), int(data._sizes[i, 1])) for i in range(len(data))
    }
    read = []
    real = LocalFolder.read
    monkeypatch.setattr(LocalFolder, "read", lambda self, *where: read.append(where) or real(self, *where))
    real_open = builtins.open

    def no_tar(file, *args, **kwargs):
        assert not str(file).endswith(".tar")
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", no_tar)
    monkeypatch.setattr(io, "open", no_tar)
    stream(tmp_path, format="shards")
    train = [where for where in read if where[2] != 512]  # the headers that opening a set looks at
    assert train and all(a[0] != b[0] or a[1] + a[2] <= b[1] or b[1] + b[2] <= a[1] for a in train for b in masks)
    list(build_eval_loader(data, config(tmp_path), range(len(data))))
    assert masks <= set(read)


def test_evaluation_sees_the_masks(scenes, made):
    cfg = config(made, num_workers=1)
    one, two = build_dataset(sets.config(scenes), "val"), build_dataset(cfg, "val")
    samples = list(build_eval_loader(two, cfg, range(5)))
    assert all((sample.mask.numpy() == one.mask(sample.index)).all() for sample in samples) and len(samples) == 5
    assert not build_dataset(cfg, "train").has_masks
    with pytest.raises(UserError, match="'set/train' has no masks"):
        build_dataset(cfg, "train").mask(0)


def test_a_data_set_can_be_sent_to_another_process(made):
    data = build_dataset(config(made), "train")
    data.image(0)
    assert (pickle.loads(pickle.dumps(data)).image(3) == data.image(3)).all()  # noqa: S301


def test_the_commands(scenes, made, tmp_path, capsys):
    import importlib.util

    path = Path(__file__).parents[2] / "launch/prepare_data.py"
    spec = importlib.util.spec_from_file_location("launch_prepare_data", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = ["shards", "--from", f"coco:{scenes}", "--split", "val", "--out", str(tmp_path)]
    assert script.main([*command, "--size", "6kB", "--masks"]) == 0
    assert contents(tmp_path / "val") == contents(made / "val")
    assert script.main(["index", str(tmp_path / "val")]) == 0
    assert script.main(["shards", "--from", "zip:x", "--split", "val", "--out", str(tmp_path)]) == 2
    (tmp_path / "names.txt").write_text("a\nb\n")
    tar(tmp_path / "web/0.tar", {"x.jpg": jpeg(), "x.cls": b"1"})
    assert script.main(["index", str(tmp_path / "web"), "--classes", str(tmp_path / "names.txt")]) == 0
    assert build_dataset(config(tmp_path), "web").labels(0).tolist() == [0, 1]
    out = capsys.readouterr()
    assert "checksums right" in out.out and out.err.startswith("error: prepare: --from is 'zip:x'")


def test_the_benchmark(scenes, tmp_path, capsys):
    from wsss_dist.data import bench

    arguments = ["--images", str(scenes / "images"), "--count", "8", "--rounds", "1", "--crop", "32", "--rate", "1e9"]
    assert bench.main([*arguments, "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["readers"]
    assert set(found) == set(bench.READERS) and found["folder"]["ratio"] == 1
    for one in found.values():
        speed = one["images_per_second"]
        assert speed == pytest.approx(8 / one["seconds"][0]) and one["workers"]["1000000000.0"] == int(-(-1e9 // speed))
    assert "images/s a worker" in capsys.readouterr().out
    with pytest.raises(UserError, match="where no picture is; name a folder"):
        bench.main(["--images", str(tmp_path)])
