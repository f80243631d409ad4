"""VOC 2012 with the masks of SBD, from the official archives or what they unpack to, to a folder for the reader `voc`.

    out/VOC2012/
        JPEGImages, Annotations, SegmentationClass, SegmentationObject, ImageSets/Main    unpacked, or links
        SegmentationClassAug/<name>.png     the official mask where there is one, else that of SBD
        ImageSets/Segmentation/*.txt        train, val, trainval, test where there; train_aug
        labels.csv                          with `labels` alone: the imported tags, which the reader prefers
    out/legacy/                             with `legacy`: cls_labels_onehot.npy, train_aug.txt, train.txt, val.txt
    out/manifest.json, out/problems.csv     see manifest.py

train_aug (10,582 images) is SBD's train and val and VOC's train, less VOC's val. SBD numbers the classes as VOC does,
and has no 255 at the outlines. Sources: Everingham et al., IJCV 2010; Hariharan et al., "Semantic Contours from Inverse
Detectors", ICCV 2011.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from wsss_dist.data.prepare.inputs import (
    Archive,
    Console,
    Options,
    check_counts,
    find,
    link,
    own_folder,
    prepare,
    refuse_foreign,
    unpack,
)
from wsss_dist.data.prepare.legacy import read_onehot, write_onehot
from wsss_dist.data.prepare.manifest import Problem, file_record, gather, settle_problems, write_manifest
from wsss_dist.data.prepare.voc_image import Places, finish_image
from wsss_dist.data.prepare.work import WorkFolder, finish_items
from wsss_dist.data.voc import VOC_CLASSES
from wsss_dist.errors import BadFile, UserError
from wsss_dist.files import write_whole

COUNTS = {
    "images": 17125,
    "XML files": 17125,
    "official masks": 2913,
    "train": 1464,
    "val": 1449,
    "trainval": 2913,
    "SBD masks": 11355,
    "train_aug": 10582,
}
TEST = {"test": 1456}
_VOC = Archive(
    "VOCtrainval_11-May-2012.tar", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
)
_SBD = Archive(
    "benchmark.tgz",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
)
_MEMBERS = "VOCdevkit/VOC2012"
_BASE = "VOC2012"
_SBD_BASE = "benchmark_RELEASE/dataset"
_LISTS = "ImageSets/Segmentation"
_LINKED = ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject", "ImageSets/Main")
_ABOUT = "VOC 2012 and SBD as prepared by launch/prepare_data.py voc; sizes and modes are those of the files as stored."

# What the worker processes read; set before they are forked.
_shared: dict = {}


def prepare_voc(options: Options, console: Console) -> None:
    """Make the folder.

    Raises:
        UserError: an archive is missing or broken, there are other counts than the official ones, or problems.
    """
    prepare(options, "VOC 2012", lambda work, settings: _steps(work, options, settings, console), console)


def _steps(work: WorkFolder, options: Options, settings: dict, console: Console) -> None:
    out = options.out
    base, lists_folder, sbd = _place_inputs(work, options, console)
    lists, problems = _read_lists(lists_folder, sbd)
    places = Places(out, base, sbd / "cls", VOC_CLASSES)
    images, masks = places.names("JPEGImages", ".jpg"), places.names("SegmentationClass", ".png")
    matlab = {path.stem for path in (sbd / "cls").glob("*.mat")}
    xml = places.names("Annotations", ".xml")
    found = {"images": len(images), "XML files": len(xml), "official masks": len(masks), "SBD masks": len(matlab)}
    found |= {name: len(names) for name, names in lists.items()}
    check_counts(found, {**COUNTS, **(TEST if "test" in lists else {})}, options.subset, console.say)
    if options.subset:
        problems += _drop_absent(lists, images)
    imported = read_onehot(options.labels, len(VOC_CLASSES)) if options.labels else None

    official = {*lists["train"], *lists["val"], *lists["trainval"]}
    listed = official | set(lists["train_aug"])
    items = {name: (name, name in official, name in listed) for name in sorted(images | listed)}
    _shared.update(places=places)
    try:
        results = finish_items(work, {}, items, _finish_image, workers=options.workers, track=console.track)
    finally:
        _shared.clear()
    tags_of = {name: json.loads(line)["tags"] for name, line in results.items()}
    files, bad, problems = gather(results, [*work.problems, *problems])
    settle_problems(out, problems, options.on_problem, console.say)

    made = {}
    for name, names in lists.items():
        content = "".join(f"{image}\n" for image in names if image not in bad).encode()
        made[f"{_BASE}/{_LISTS}/{name}.txt"] = content
    kept = [name for name in sorted(listed) if name not in bad]
    tags = np.zeros((len(kept), len(VOC_CLASSES)), np.uint8)
    for row, name in zip(tags, kept, strict=True):
        row[tags_of[name]] = 1
    if imported is not None:
        tags = _imported(imported, kept, tags, console)
        made[f"{_BASE}/labels.csv"] = _labels_csv(kept, tags)
    if options.legacy:
        made["legacy/cls_labels_onehot.npy"] = write_onehot(kept, tags)
        for name in ("train_aug", "train", "val"):
            made[f"legacy/{name}.txt"] = made[f"{_BASE}/{_LISTS}/{name}.txt"]
    for name, content in made.items():
        _write_list(out / name, content, in_place=(out / name).parent.resolve() == lists_folder.resolve())
        files[name] = json.dumps(file_record(content))
    counts = {name: len([image for image in names if image not in bad]) for name, names in sorted(lists.items())}
    left_out = len(bad & set(items))
    write_manifest(out, {"about": _ABOUT, "settings": settings, "counts": counts, "left_out": left_out}, files)
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    console.say(f"{out} is complete: {shown}; {len(files):,} files in manifest.json")


def _place_inputs(work: WorkFolder, options: Options, console: Console) -> tuple[Path, Path, Path]:
    """Unpack or link; returns the folders VOC2012, of the official lists, and of SBD's data."""
    base = options.out / _BASE
    voc, voc_archive = find(options, (_MEMBERS, "VOC2012", ""), _VOC, "the images of VOC 2012")
    sbd, sbd_archive = find(options, (_SBD_BASE, "dataset", ""), _SBD, "the masks of SBD")
    refuse_foreign(work, [base / "SegmentationClassAug", base / _LISTS / "train_aug.txt", base / "labels.csv"])
    if voc_archive is not None:
        lists = work.path / "lists"
        for name in _LINKED:
            own_folder(base / name)
        unpack(work, voc_archive, partial(_voc_member, base, lists), options, console)
    else:
        lists = voc / _LISTS
        for name in _LINKED:
            if (voc / name).is_dir():
                link(voc / name, base / name)
    if sbd_archive is not None:
        sbd = work.path / "sbd"
        unpack(work, sbd_archive, partial(_sbd_member, sbd), options, console)
    for folder in (base / "JPEGImages", base / "Annotations", base / "SegmentationClass", lists, sbd / "cls"):
        if not folder.is_dir():
            what = "does not exist, though it is part of the official archives"
            raise BadFile(folder, what, f"prepare: {folder} {what}; unpack them as they are")
    return base, lists, sbd


def _voc_member(base: Path, lists: Path, name: str) -> Path | None:
    if not name.startswith(f"{_MEMBERS}/"):
        return None
    inside = name.removeprefix(f"{_MEMBERS}/")
    # the lists in `base` are written anew, without the images that are left out
    return lists / Path(inside).name if inside.startswith(f"{_LISTS}/") else base / inside


def _sbd_member(sbd: Path, name: str) -> Path | None:
    inside = name.removeprefix(f"{_SBD_BASE}/")
    wanted = inside in ("train.txt", "val.txt") or (inside.startswith("cls/") and inside.endswith(".mat"))
    return sbd / inside if wanted and inside != name else None


def _read_lists(folder: Path, sbd: Path) -> tuple[dict[str, list[str]], list[Problem]]:
    """Names of the images by list, train_aug made of the others, and what is wrong with them."""
    problems: list[Problem] = []
    lists = {}
    for name in ("train", "val", "trainval", "test"):
        if name != "test" or (folder / "test.txt").is_file():
            lists[name] = _read_list(folder / f"{name}.txt", f"{_BASE}/{_LISTS}/{name}.txt", problems)
    of_sbd: set[str] = set()
    for name in ("train.txt", "val.txt"):
        of_sbd.update(_read_list(sbd / name, f"{_SBD_BASE}/{name}", problems))
    lists["train_aug"] = sorted((of_sbd | set(lists["train"])) - set(lists["val"]))
    return lists, problems


def _read_list(path: Path, shown: str, problems: list[Problem]) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"prepare: {path} is missing; unpack the official archive again"
        raise BadFile(path, "the file is missing", message) from None
    except UnicodeDecodeError as error:
        message = f"prepare: {path} is no text ({error}); unpack the official archive again"
        raise BadFile(path, f"it is no text ({error})", message) from None
    times = Counter(Path(line.split()[0]).stem for line in text.splitlines() if line.strip())
    for name, count in times.items():
        if count > 1:
            problems.append((shown, "error", f"{name} is listed more than once", "listed once"))
    return list(times)


def _drop_absent(lists: dict[str, list[str]], images: set[str]) -> list[Problem]:
    """Take the images that are not there out of the lists."""
    problems = []
    for name, names in lists.items():
        kept = [image for image in names if image in images]
        if len(kept) < len(names):
            shown = f"{_BASE}/{_LISTS}/{name}.txt"
            problems.append((shown, "note", f"{len(names) - len(kept)} images are not there", "not in the list"))
        names[:] = kept
    return problems


def _finish_image(item: tuple[str, bool, bool]) -> dict:
    return finish_image(_shared["places"], *item)


def _imported(imported: dict, names: list[str], tags: np.ndarray, console: Console) -> np.ndarray:
    missing = [name for name in names if name not in imported]
    if missing:
        raise UserError(
            f"prepare: --labels has none for {len(missing):,} images (first: {missing[0]}); give the file of this data "
            "set, or leave --labels out"
        )
    rows = np.stack([imported[name] for name in names]) if names else tags
    changed = int((rows != tags).any(axis=1).sum())
    console.say(f"the tags of {changed:,} images are not those of the XML files; taken from --labels")
    return rows


def _labels_csv(names: list[str], tags: np.ndarray) -> bytes:
    lines = ["image,labels\n"]
    for name, row in zip(names, tags, strict=True):
        lines.append(f"{name}.jpg,{';'.join(VOC_CLASSES[c] for c in np.flatnonzero(row))}\n")
    return "".join(lines).encode()


def _write_list(place: Path, content: bytes, in_place: bool) -> None:
    """Write a file that is ours; a list that lies in the source itself is only added, never changed."""
    if in_place and place.is_file() and place.name != "train_aug.txt":
        if place.read_bytes().split() != content.split():
            raise UserError(
                f"prepare: {place} would have to leave images out, and it is the official list itself; choose an --out "
                "other than the folder of --source"
            )
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, content)
