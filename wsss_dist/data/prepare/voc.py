"""VOC 2012 with the masks of SBD, from the official archives or what they unpack to, to a folder for the reader `voc`.

    out/VOC2012/
        JPEGImages, Annotations, SegmentationClass, SegmentationObject, ImageSets/Main    unpacked, or links
        SegmentationClassAug/<name>.png     the official mask where there is one, else that of SBD
        ImageSets/Segmentation/*.txt        train, val, trainval, train_aug; test where its archive is there
        labels.csv                          with `labels` alone: the imported tags, which the reader prefers
    out/legacy/                             with `legacy`: cls_labels_onehot.npy, train_aug.txt, train.txt, val.txt
    out/manifest.json, out/problems.csv     see manifest.py

train_aug (10,582 images) is SBD's train and val and VOC's train, less VOC's val. SBD numbers the classes as VOC does,
and has no 255 at the outlines. The images of test, from VOC2012test.tar or unpacked into the same VOCdevkit, have no
tags and no masks, and the official counts are those of the other images. Sources: Everingham et al., IJCV 2010;
Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from wsss_dist.data.prepare.archives import archive_in
from wsss_dist.data.prepare.inputs import (
    Archive,
    Console,
    Options,
    check_counts,
    check_names,
    find,
    link,
    own_folder,
    prepare,
    refuse_foreign,
    unpack,
)
from wsss_dist.data.prepare.legacy import read_onehot, write_onehot
from wsss_dist.data.prepare.manifest import MISSING, Problem, file_record, gather, settle_problems, write_manifest
from wsss_dist.data.prepare.verify import unusable
from wsss_dist.data.prepare.voc_image import Places, finish_image, names_in
from wsss_dist.data.prepare.work import WorkFolder, finish_items
from wsss_dist.data.voc import VOC_CLASSES, list_rows, read_list
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
_TEST = "VOC2012test.tar"
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
    more = {} if archive_in(options.sources, _TEST) is None else {"test": _TEST}
    prepare(options, "VOC 2012", lambda work, settings: _steps(work, options, settings, console), console, more)


def _steps(work: WorkFolder, options: Options, settings: dict, console: Console) -> None:
    out = options.out
    base, lists_folder, sbd = _place_inputs(work, options, console)
    lists, of_sbd, problems = _read_lists(lists_folder, sbd)
    places = Places(out, base, sbd / "cls", VOC_CLASSES)
    for name, names in lists.items():
        check_names(base / "JPEGImages", [f"{image}.jpg" for image in names], lists_folder / f"{name}.txt")
    tested, more = _check_counts(places, lists, of_sbd, lists_folder, options.subset, console.say)
    problems += more
    images = places.names("JPEGImages", ".jpg")
    if options.subset:
        problems += _drop_absent(lists, images)
    else:  # one that only its XML tells of is missing, too
        images |= places.names("Annotations", ".xml") - tested
    imported = read_onehot(options.labels, len(VOC_CLASSES)) if options.labels else None

    official = {*lists["train"], *lists["val"], *lists["trainval"]}
    listed = official | set(lists["train_aug"])
    every = images | listed | set(lists.get("test", []))
    items = {name: (name, name in official, name in listed, name in tested) for name in sorted(every)}
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
        in_place = (out / name).parent.resolve() == lists_folder.resolve()
        files[name] = json.dumps(file_record(_write_list(out / name, content, in_place)))
    counts = {name: len([image for image in names if image not in bad]) for name, names in sorted(lists.items())}
    left_out = len(bad & set(items))
    head = {"about": _ABOUT, "settings": settings, "counts": counts, "left_out": left_out}
    write_manifest(out, head | unusable(out, problems, work.archives), files)
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    console.say(f"{out} is complete: {shown}; {len(files):,} files in manifest.json")


def _place_inputs(work: WorkFolder, options: Options, console: Console) -> tuple[Path, Path, Path]:
    """Unpack or link; returns the folders VOC2012, of the official lists, and of SBD's data."""
    base = options.out / _BASE
    voc, voc_archive = find(options, (_MEMBERS, "VOC2012", ""), _VOC, "the images of VOC 2012")
    sbd, sbd_archive = find(options, (_SBD_BASE, "dataset", ""), _SBD, "the masks of SBD")
    test = archive_in(options.sources, _TEST)
    refuse_foreign(work, [base / "SegmentationClassAug", base / _LISTS / "train_aug.txt", base / "labels.csv"])
    in_place = [] if voc is None else [voc, voc / "ImageSets", voc / _LISTS]
    for place in (base, base / "ImageSets", base / _LISTS, base / "SegmentationClassAug", options.out / "legacy"):
        own_folder(place, *in_place)
    if voc_archive is not None:
        lists = work.path / _LISTS
        for name in _LINKED:
            own_folder(base / name)
        unpack(work, voc_archive, partial(_voc_member, base, lists), options, console)
        if test is not None:
            unpack(work, test, partial(_test_member, base, lists), options, console)
    else:
        lists = voc / _LISTS
        if test is not None and not (lists / "test.txt").exists():
            raise UserError(
                f"prepare: {test} is packed and {voc} is not, so there is no place for its images; unpack it there, "
                f"or give {_VOC.name} with it and without that folder"
            )
        for name in _LINKED:
            if (voc / name).is_dir():
                link(work, voc / name, base / name)
    if sbd_archive is not None:
        sbd = work.path / "sbd"
        unpack(work, sbd_archive, partial(_sbd_member, sbd), options, console)
    for folder in (base / "JPEGImages", base / "Annotations", base / "SegmentationClass", lists, sbd / "cls"):
        if not folder.is_dir():
            what = "does not exist, though it is part of the official archives"
            raise BadFile(folder, what, f"prepare: {folder} {what}; unpack them as they are")
    return base, lists, sbd


def _voc_member(base: Path, lists: Path, name: str) -> Path | None:
    folder, _, leaf = name.removeprefix(f"{_MEMBERS}/").rpartition("/")
    if not name.startswith(f"{_MEMBERS}/") or folder not in (*_LINKED, _LISTS):
        return None
    # the lists in `base` are written anew, without the images that are left out
    return (lists if folder == _LISTS else base / folder) / leaf


def _test_member(base: Path, lists: Path, name: str) -> Path | None:
    """The XML files of the test set have boxes of some persons, for other tasks; as tags they would be wrong."""
    wanted = name.startswith(f"{_MEMBERS}/JPEGImages/") or name == f"{_MEMBERS}/{_LISTS}/test.txt"
    return _voc_member(base, lists, name) if wanted else None


def _sbd_member(sbd: Path, name: str) -> Path | None:
    inside = name.removeprefix(f"{_SBD_BASE}/")
    wanted = inside in ("train.txt", "val.txt") or (inside.startswith("cls/") and inside.endswith(".mat"))
    return sbd / inside if wanted and inside != name else None


def _read_lists(folder: Path, sbd: Path) -> tuple[dict[str, list[str]], set[str], list[Problem]]:
    """Names of the images by list, train_aug made of the others; those of SBD; and what is wrong with them."""
    problems: list[Problem] = []
    lists = {}
    for name in ("train", "val", "trainval", "test"):
        if name != "test" or (folder / "test.txt").is_file():
            lists[name] = _read_list(folder / f"{name}.txt", f"{_BASE}/{_LISTS}/{name}.txt", problems)
    of_sbd: set[str] = set()
    for name in ("train.txt", "val.txt"):
        of_sbd.update(_read_list(sbd / name, f"{_SBD_BASE}/{name}", problems))
    lists["train_aug"] = sorted((of_sbd | set(lists["train"])) - set(lists["val"]))
    return lists, of_sbd, problems


def _read_list(path: Path, shown: str, problems: list[Problem]) -> list[str]:
    times = Counter(read_list(path))
    for name, count in times.items():
        if count > 1:
            problems.append((shown, "error", f"{name} is listed more than once", "listed once"))
    return list(times)


def _drop_absent(lists: dict[str, list[str]], images: set[str]) -> list[Problem]:
    """Take the images that are not there out of the lists."""
    absent = set().union(*lists.values()) - images
    for names in lists.values():
        names[:] = [image for image in names if image not in absent]
    return [(f"{_BASE}/JPEGImages/{name}.jpg", "note", MISSING, "not in the lists") for name in absent]


def _check_counts(
    places: Places, lists: dict, of_sbd: set[str], lists_folder: Path, subset: bool, say: Callable[[str], None]
) -> tuple[set[str], list[Problem]]:
    """Hold the input to the official counts, but for files whose absence gets a row of its own in problems.csv.

    Returns:
        the images of the test set, and the rows of the missing files that no image needs.
    """
    images, masks = places.names("JPEGImages", ".jpg"), places.names("SegmentationClass", ".png")
    xml, matlab = places.names("Annotations", ".xml"), names_in(places.matlab, ".mat")
    official = {*lists["train"], *lists["val"], *lists["trainval"]}
    listed = official | set(lists["train_aug"])
    tested = _of_test(lists, lists_folder, images - xml) - listed
    every = (images | xml | listed) - tested
    found = {"images": images - tested, "XML files": xml - tested, "official masks": masks, "SBD masks": matlab}
    named = {
        "images": every - images,
        "XML files": every - xml,
        "official masks": official - masks,
        "SBD masks": of_sbd - matlab,
    }
    numbers = {name: len(names) for name, names in {**found, **lists}.items()}
    expected = {**COUNTS, **(TEST if "test" in lists else {})}
    check_counts(numbers, expected, subset, say, {name: len(names) for name, names in named.items()})
    unneeded = [] if subset else (of_sbd - matlab) & (masks | official)
    effect = "not used for an image of VOC's own lists"
    return tested, [(f"cls/{name}.mat", "note", MISSING, effect) for name in unneeded]


def _of_test(lists: dict, lists_folder: Path, without_xml: set[str]) -> set[str]:
    """The images of the test set, of which its list for segmentation names a part.

    They are those that a test.txt for any task names, and those without an XML: in the other archive each has one.
    """
    if "test" not in lists:
        return set()
    rows = (row for path in lists_folder.parent.glob("*/test.txt") for row in list_rows(path))
    return {row[0] for row in rows} | set(lists["test"]) | without_xml


def _finish_image(item: tuple[str, bool, bool, bool]) -> dict:
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


def _write_list(place: Path, content: bytes, in_place: bool) -> bytes:
    """Write a file that is ours; a list that lies in the source itself is only added, never changed.

    Returns:
        what is in the file now.
    """
    if in_place and place.is_file() and place.name != "train_aug.txt":
        if read_list(place) != content.decode().splitlines():
            raise UserError(
                f"prepare: {place} would have to leave images out, and it is the official list itself; choose an --out "
                "other than the folder of --source"
            )
        return place.read_bytes()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, content)
    return content
