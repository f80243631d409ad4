"""Each format is read as documented: tags, ids, masks, and nothing but tags while training."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset, build_eval_loader, build_inference_loader, build_train_loader
from wsss_dist.data import coco as coco_module
from wsss_dist.data import dataset as dataset_module
from wsss_dist.errors import UserError


def test_coco_maps_raw_ids_in_order_and_counts_crowds_as_tags(tmp_path):
    data = build_dataset(sets.config(sets.write_coco(tmp_path / "set")), "train")
    assert data.class_names == ["cat", "dog", "cow"]  # ascending raw id: 3, 18, 90
    assert data.name == "set/train"
    assert [data.id(i) for i in range(3)] == ["007", "005", "009"]
    assert [data.labels(i).tolist() for i in range(3)] == [[0, 1, 1], [1, 0, 1], [0, 0, 0]]
    assert data.labels(0).dtype == np.float32


def test_coco_draws_polygons_rle_and_crowds(tmp_path):
    data = build_dataset(sets.config(sets.write_coco(tmp_path)), "train")
    dog_and_crowd, cow_on_cat, empty = (data.mask(i) for i in range(3))
    expected = np.zeros((20, 30), np.uint8)
    expected[0:10, 0:12] = 255
    expected[2:8, 2:10] = 2
    assert (dog_and_crowd == expected).all()
    expected = np.zeros((20, 30), np.uint8)
    expected[5:15, 5:25] = 1
    expected[8:12, 8:12] = 3
    assert (cow_on_cat == expected).all()
    assert empty.shape == (20, 30) and not empty.any()


def test_coco_compressed_rle_and_two_point_polygons(tmp_path):
    content = sets.coco_content()
    region = np.zeros((20, 30), np.uint8, order="F")
    region[3:9, 4:20] = 1
    rle = coco_mask.encode(region)
    content["annotations"][0]["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    content["annotations"][3]["segmentation"] = [[1, 1, 5, 5]]
    data = build_dataset(sets.config(sets.write_coco(tmp_path, content)), "train")
    assert ((data.mask(0) == 2) == (region == 1)).all()
    assert set(np.unique(data.mask(1))) == {0, 3}


def test_coco_official_layout(tmp_path):
    root = sets.write_coco(tmp_path, split="train2014", official=True)
    data = build_dataset(sets.config(root, train_split="train2014"), "train2014")
    assert len(data) == 3 and data.image(0).shape == (20, 30, 3) and data.has_masks


@pytest.mark.parametrize("as_names", [True, False])
def test_coco_labels_list_is_preferred_to_annotations(tmp_path, as_names):
    content = sets.coco_content()
    for image, labels in zip(content["images"], ([3], [90, 18], []), strict=True):
        names = {c["id"]: c["name"] for c in sets.CATEGORIES}
        image["labels"] = [names[raw] for raw in labels] if as_names else labels
    data = build_dataset(sets.config(sets.write_coco(tmp_path, content)), "train")
    assert data.tags.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_coco_mask_folder_is_preferred(tmp_path):
    root = sets.write_coco(tmp_path)
    sets.add_mask(root, "007.png", {4: 3, 5: 255}, folder="masks/train")
    mask = build_dataset(sets.config(root), "train").mask(0)
    assert (mask[4] == 3).all() and (mask[5] == 255).all() and not mask[:4].any()


def test_untagged_images_are_kept_or_dropped(tmp_path):
    content = sets.coco_content()
    content["images"].reverse()  # the untagged one comes first, so that dropping it moves the others
    root = sets.write_coco(tmp_path, content)
    kept = build_dataset(sets.config(root), "train")
    dropped = build_dataset(sets.config(root, untagged="drop"), "train")
    assert len(kept) == 3
    assert [dropped.id(i) for i in range(len(dropped))] == ["005", "007"]
    assert dropped.tags.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert all((dropped.mask(i) == kept.mask(i + 1)).all() and dropped.mask(i).any() for i in range(2))


def test_voc_tags_include_difficult_objects_and_no_parts(tmp_path):
    data = build_dataset(sets.config(sets.write_voc(tmp_path), "voc"), "train_aug")
    assert len(data.class_names) == 20
    assert [data.id(i) for i in range(2)] == ["2008_b", "2007_a"]
    present = [[data.class_names[c] for c in np.flatnonzero(data.labels(i))] for i in range(2)]
    assert present == [["dog"], ["cat", "dog"]]


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_root_may_be_any_of_the_three_folders(tmp_path, below):
    assert len(build_dataset(sets.config(sets.write_voc(tmp_path) / below, "voc"), "val")) == 1


def test_voc_official_masks_come_first(tmp_path):
    data = build_dataset(sets.config(sets.write_voc(tmp_path), "voc"), "train_aug")
    assert set(np.unique(data.mask(1))) == {0, 8, 255}  # official, not the 3 of SegmentationClassAug
    assert set(np.unique(data.mask(0))) == {0, 12}


def test_voc_labels_csv_replaces_the_xml(tmp_path):
    base = sets.write_voc(tmp_path) / "VOCdevkit" / "VOC2012"
    shutil.rmtree(base / "Annotations")
    (base / "labels.csv").write_text("image,labels\n2007_a,sheep\n2008_b.jpg,person;sofa\n")
    data = build_dataset(sets.config(tmp_path, "voc"), "train_aug")
    assert [data.class_names[c] for c in np.flatnonzero(data.labels(0))] == ["person", "sofa"]


def test_voc_layout_with_own_classes(tmp_path):
    root = sets.write_voc(tmp_path, ("left", "right"))
    data = build_dataset(sets.config(root, "voc", classes=["left", "right"]), "train_aug")
    assert data.tags.tolist() == [[0, 1], [1, 1]]


def test_folder(tmp_path):
    root = sets.write_folder(tmp_path)
    data = build_dataset(sets.config(root, "folder"), "train")
    assert [data.id(i) for i in range(3)] == ["b", "a", "c"]
    assert data.tags.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert not data.has_masks
    sets.add_mask(root, "b.png", {0: 2})
    data = build_dataset(sets.config(root, "folder"), "train")
    assert data.has_masks and (data.mask(0)[0] == 2).all()


def test_folder_classes_from_the_config_overrule_the_file(tmp_path):
    root = sets.write_folder(tmp_path)
    data = build_dataset(sets.config(root, "folder", classes=["cow", "cat", "dog"]), "train")
    assert data.tags[2].tolist() == [1, 0, 0]


def test_synthetic_masks_agree_with_rle_and_tags(tmp_path):
    root = write_synthetic_dataset(tmp_path / "a", 12, 3, 48, 7, seed=3)
    data = build_dataset(sets.config(root), "train")
    from_files = [data.mask(i) for i in range(12)]
    shutil.rmtree(root / "masks")
    drawn = build_dataset(sets.config(root), "train")
    for i, mask in enumerate(from_files):
        assert (mask == drawn.mask(i)).all()
        assert {int(c) for c in np.unique(mask)} - {0} == {c + 1 for c in np.flatnonzero(data.labels(i))}
    assert data.tags.any(axis=0).all()


def test_synthetic_is_deterministic(tmp_path):
    one = write_synthetic_dataset(tmp_path / "a", 3, 2, 32, 3, seed=5)
    two = write_synthetic_dataset(tmp_path / "b", 3, 2, 32, 3, seed=5)
    other = write_synthetic_dataset(tmp_path / "c", 3, 2, 32, 3, seed=6)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) == 12
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    assert any((one / f).read_bytes() != (other / f).read_bytes() for f in files)


def _train_batches(root: Path, **changes) -> list:
    cfg = sets.config(root, **changes)
    loader = build_train_loader(
        build_dataset(cfg, "train"),
        cfg,
        seed=0,
        global_batch=4,
        micro_batch=2,
        rank=0,
        world_size=1,
        start_step=0,
        num_steps=4,
    )
    return [
        (b.ids, b.labels.tolist(), b.images.numpy().tobytes(), {k: v.numpy().tobytes() for k, v in b.maps.items()})
        for step in loader
        for b in step
    ]


@pytest.mark.parametrize("with_maps", [False, True])
def test_training_never_opens_a_mask(tmp_path, monkeypatch, with_maps):
    root = write_synthetic_dataset(tmp_path / "set", 9, 2, 40, 3, seed=0)
    maps = sets.write_maps(tmp_path / "earlier", build_dataset(sets.config(root), "train")) if with_maps else {}
    before = _train_batches(root, maps=maps)

    def forbidden(*_):
        raise AssertionError("a mask was opened")

    monkeypatch.setattr(dataset_module, "read_mask", forbidden)
    monkeypatch.setattr(coco_module, "draw_mask", forbidden)
    monkeypatch.setattr(coco_module.CocoDataset, "open_masks", forbidden)
    real_open, opened = builtins.open, []

    def recorded(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", recorded)
    monkeypatch.setattr(io, "open", recorded)
    monkeypatch.setattr(dataset_module.Dataset, "mask", forbidden)
    monkeypatch.setattr(coco_module.CocoDataset, "mask", forbidden)
    assert _train_batches(root, maps=maps) == before
    assert any("/images/train/" in name for name in opened)  # the recorder sees what the loader opens
    for name in maps:
        assert any(f"/earlier/{name}/" in path for path in opened)
    assert not [name for name in opened if "mask" in name.removeprefix(str(tmp_path))]


def test_training_is_the_same_without_any_pixel_label(tmp_path):
    root = write_synthetic_dataset(tmp_path / "set", 9, 2, 40, 3, seed=0)
    before = _train_batches(root)
    shutil.rmtree(root / "masks")
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"] = []
    path.write_text(json.dumps(content))
    assert _train_batches(root) == before


def test_eval_loader_keeps_order_and_native_sizes(tmp_path):
    root = write_synthetic_dataset(tmp_path / "set", 1, 11, 40, 3, seed=0)
    cfg = sets.config(root)
    data = build_dataset(cfg, "val")
    samples = list(build_eval_loader(data, cfg, [1, 4, 7, 10]))
    assert [s.index for s in samples] == [1, 4, 7, 10]
    sample = samples[2]
    assert sample.image.shape == (3, 40, 40) and (sample.image.permute(1, 2, 0).numpy() == data.image(7)).all()
    assert (sample.mask.numpy() == data.mask(7)).all() and sample.id == data.id(7)
    assert sample.labels.tolist() == data.labels(7).tolist()


@pytest.mark.parametrize(("workers", "ahead", "read"), [(0, 3, 0), (1, 3, 3), (2, 3, 4), (3, 1, 3)])
def test_no_more_images_are_asked_for_ahead_of_their_use(workers, ahead, read, tmp_path):
    root = write_synthetic_dataset(tmp_path / "set", 1, 11, 40, 3, seed=0)
    cfg, asked = sets.config(root, num_workers=workers), []
    data = build_dataset(cfg, "val")
    samples = iter(build_eval_loader(data, cfg, (asked.append(k) or k for k in range(11)), ahead))
    for k in range(3):
        assert next(samples).index == k and len(asked) == k + 1 + read


def test_eval_without_masks_gives_none(tmp_path):
    cfg = sets.config(sets.write_folder(tmp_path), "folder")
    assert [s.mask for s in build_eval_loader(build_dataset(cfg, "train"), cfg, range(3))] == [None] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_inference_loader_gives_every_image_once_and_opens_no_mask(tmp_path, monkeypatch, workers):
    root = write_synthetic_dataset(tmp_path / "set", 7, 2, 40, 3, seed=0)
    cfg = sets.config(root, num_workers=workers, val_limit=2)
    data = build_dataset(cfg, "train")
    assert data.has_masks

    def forbidden(*_):
        raise AssertionError("a mask was opened")

    for name in ("mask", "open_masks"):
        monkeypatch.setattr(coco_module.CocoDataset, name, forbidden)
    shards = [build_inference_loader(data, cfg, np.arange(7)[rank::3]) for rank in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    samples = [list(shard) for shard in shards]
    assert [[s.index for s in shard] for shard in samples] == [[0, 3, 6], [1, 4], [2, 5]]
    for sample in (s for shard in samples for s in shard):
        assert sample.mask is None and sample.id == data.id(sample.index)
        assert sample.labels.tolist() == data.labels(sample.index).tolist()
        assert (sample.image.permute(1, 2, 0).numpy() == data.image(sample.index)).all()


def test_inference_stops_at_an_image_that_cannot_be_read(tmp_path):
    root = write_synthetic_dataset(tmp_path / "set", 3, 1, 40, 3, seed=0)
    (root / "images/train/00001.jpg").write_bytes(b"")
    cfg = sets.config(root)
    with pytest.raises(UserError, match="00001.jpg.* of the split 'set/train' cannot be read .*the next stage without"):
        list(build_inference_loader(build_dataset(cfg, "train"), cfg, np.arange(3)))


def test_a_colour_palette_does_not_change_ids(tmp_path):
    sets.add_mask(tmp_path, "m.png", {0: 2, 3: 255}, folder=".")
    assert Image.open(tmp_path / "m.png").mode == "P"
    assert dataset_module.checked_mask(tmp_path / "m.png", 3)[0, 0] == 2


def test_coco_lists_can_share_a_folder(tmp_path):
    root = sets.write_coco(tmp_path / "set")
    content = sets.coco_content()
    content["images"] = content["images"][:2]
    (root / "annotations" / "few.json").write_text(json.dumps({**content, "folder": "train"}))
    few, every = (build_dataset(sets.config(root), split) for split in ("few", "train"))
    assert few.name == "set/few" and few.root == every.root and few.files.tolist() == every.files.tolist()[:2]
    sets.add_mask(root, f"{every.id(0)}.png", {0: 3}, folder="masks/train")
    few = build_dataset(sets.config(root), "few")
    assert few.has_masks and (few.mask(0)[0] == 3).all()


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", 7, None])
def test_coco_folder_is_one_name(tmp_path, name):
    root = sets.rewrite(sets.write_coco(tmp_path), lambda content: content.update(folder=name))
    with pytest.raises(UserError, match="'folder' of .*train.json is .*; expected the name of one folder"):
        build_dataset(sets.config(root), "train")
