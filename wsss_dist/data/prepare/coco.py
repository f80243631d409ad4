"""COCO 2014 from its official archives, or from what they unpack to, to a folder that the reader `coco` takes.

    out/train2014/, out/val2014/         images: unpacked, or a link to the folder they lie in
    out/annotations/instances_*.json     the official annotations, unpacked or a link
    out/annotations/<list>.json          tags, in the COCO format without outlines: what training reads
    out/masks/<split>/<image>.png        index masks with a palette: 0 background, 1..80, 255 ignore; for evaluation
    out/legacy/                          with `legacy`: cls_labels_onehot.npy, train.txt, val.txt
    out/manifest.json, out/problems.csv  see manifest.py

Two families of lists are in use, and their results do not compare: `train-81k`, `val-81k` have the images with at least
one annotation (82,081 and 40,137; crowds count), `train-82k`, `val-82k` all images (82,783 and 40,504). `train2014` and
`val2014` name the latter too. Raw category ids 1..90, which have holes, become 1..80 in ascending order. How outlines
become masks, overlaps and crowds above all, says `wsss_dist/data/coco_masks.py`.
"""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np

from wsss_dist.data.coco_masks import draw_mask
from wsss_dist.data.dataset import missing_files
from wsss_dist.data.palette import palette_picture
from wsss_dist.data.prepare.archives import of_macos
from wsss_dist.data.prepare.coco_index import AnnotationIndex
from wsss_dist.data.prepare.coco_lists import SPLITS, families, legacy_files, list_names, split_lists, tags_of
from wsss_dist.data.prepare.fetch import sha256_of
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
from wsss_dist.data.prepare.legacy import read_onehot
from wsss_dist.data.prepare.manifest import (
    LEFT_OUT,
    MISSING,
    Problem,
    check_picture,
    file_record,
    gather,
    picture_record,
    settle_problems,
    write_manifest,
)
from wsss_dist.data.prepare.verify import unusable
from wsss_dist.data.prepare.work import WorkFolder, finish_items, stamp_of
from wsss_dist.errors import BadFile, UserError
from wsss_dist.files import write_whole

COUNTS = {
    "train2014 images": 82783,
    "train2014 annotated images": 82081,
    "val2014 images": 40504,
    "val2014 annotated images": 40137,
    "classes": 80,
}
_HOST = "http://images.cocodataset.org"
_IMAGES = {split: Archive(f"{split}.zip", f"{_HOST}/zips/{split}.zip") for split in SPLITS}
_ANNOTATIONS = Archive("annotations_trainval2014.zip", f"{_HOST}/annotations/annotations_trainval2014.zip")

# What the worker processes read; set before they are forked, so that the index is in memory once.
_shared: dict = {}


def prepare_coco(options: Options, console: Console) -> None:
    """Make the folder.

    Raises:
        UserError: an archive is missing or broken, there are other counts than the official ones, or problems.
    """
    prepare(options, "COCO 2014", lambda work, settings: _steps(work, options, settings, console), console)


def _steps(work: WorkFolder, options: Options, settings: dict, console: Console) -> None:
    _place_inputs(work, options, console)
    out = options.out
    indexes = {}
    for split in SPLITS:
        console.say(f"reading instances_{split}.json")
        path = out / "annotations" / f"instances_{split}.json"
        if not path.is_file():  # its archive is damaged, and that was no reason to stop
            raise BadFile(path, "the file is missing", f"prepare: {path} is missing; download {_ANNOTATIONS.url} again")
        indexes[split] = AnnotationIndex(path)
    _check_classes(indexes)
    rows, problems = _rows(out, indexes, options.subset)
    check_counts(_found(indexes, rows), COUNTS, options.subset, console.say)
    imported = read_onehot(options.labels, len(indexes["train2014"].categories)) if options.labels else None

    items = {f"{split}/{indexes[split].images[row].file_name}": (split, row) for split in SPLITS for row in rows[split]}
    depends = stamp_of(index.path.resolve() for index in indexes.values())
    _shared.update(out=out, indexes=indexes)
    try:
        results = finish_items(
            work, {"annotations": depends}, items, _finish_image, workers=options.workers, track=console.track
        )
    finally:
        _shared.clear()
    files, bad, problems = gather(results, [*work.problems, *problems])
    settle_problems(out, problems, options.on_problem, console.say)
    used = {split: np.zeros(len(index.images), bool) for split, index in indexes.items()}
    for name, (split, row) in items.items():
        used[split][row] = name not in bad

    tags = {split: tags_of(split, index, rows[split], imported, console.say) for split, index in indexes.items()}
    made = split_lists(indexes, used, tags)
    if options.legacy:
        made |= legacy_files(indexes, used, tags)
    for name, content in made.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, content)
        files[name] = json.dumps(file_record(content))
    for index in indexes.values():
        size = index.path.stat().st_size
        files[f"annotations/{index.path.name}"] = json.dumps({"sha256": sha256_of(index.path), "size": size})
    counts = {f"{name} images": int(mask.sum()) for name, _, mask in families(indexes, used)}
    left_out = sum(len(rows[split]) - int(used[split].sum()) for split in SPLITS)
    head = {"about": _ABOUT, "settings": settings, "counts": counts, "left_out": left_out}
    write_manifest(out, head | unusable(out, problems, work.archives), files)
    listed = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    console.say(f"{out} is complete: {listed}; {len(files):,} files in manifest.json")


_ABOUT = "COCO 2014 as prepared by launch/prepare_data.py coco; sizes and modes are those of the files as stored."


def _place_inputs(work: WorkFolder, options: Options, console: Console) -> None:
    """Unpack or link images and annotations to where the reader looks for them."""
    out, places = options.out, {}
    for split in SPLITS:
        places[out / split] = find(options, (split, f"images/{split}", ""), _IMAGES[split], f"the images of {split}")
        name = f"instances_{split}.json"
        folders = (f"annotations/{name}", name, "")
        places[out / "annotations" / name] = find(options, folders, _ANNOTATIONS, f"the annotations of {split}")
    refuse_foreign(work, [out / "masks", *(out / "annotations" / f"{name}.json" for name in list_names())])
    own_folder(out / "annotations", *(path.parent for path, _ in places.values() if path is not None))
    for place in (out / "masks", *(out / "masks" / split for split in SPLITS), out / "legacy"):
        own_folder(place)
    for place, (unpacked, archive) in places.items():
        if unpacked is not None:
            link(work, unpacked, place)
            continue
        own_folder(place)
        if archive.name == _ANNOTATIONS.name:
            wanted = {f"annotations/{p.name}": p for p, (_, packed) in places.items() if packed == archive}
            unpack(work, archive, wanted.get, options, console)
        else:
            unpack(work, archive, partial(_below, place), options, console)


def _below(place: Path, name: str) -> Path | None:
    """Where member `name` of an archive of one folder goes."""
    folder, _, leaf = name.partition("/")
    return place / leaf if folder == place.name and leaf and "/" not in leaf else None


def _check_classes(indexes: dict[str, AnnotationIndex]) -> None:
    train, val = indexes.values()
    if train.categories != val.categories:
        raise UserError(
            f"prepare: the categories of {val.path} are not those of {train.path}; give the two files of one release"
        )


def _rows(out: Path, indexes: dict[str, AnnotationIndex], subset: bool) -> tuple[dict[str, list[int]], list[Problem]]:
    """The images to prepare, as rows of each index, and what is wrong with the lists."""
    rows, problems = {}, []
    for split, index in indexes.items():
        names = [image.file_name for image in index.images]
        twice = {defect.row for defect in index.defects if defect.again}
        for row, kind, reason, effect, _ in index.defects:
            name = f"annotations/{index.path.name}" if row is None or row in twice else f"{split}/{names[row]}"
            problems.append((name, kind, reason, effect))
        absent = set(missing_files(out / split, names))
        if len(absent) == len(set(names)):
            what = f"none of the {len(names):,} images that {index.path} names is in {out / split}"
            message = f"prepare: {what} (first: {names[0]}); name the folder or the archive that has them with --source"
            raise BadFile(out / split, what, message)
        rows[split] = [row for row in range(len(names)) if row not in twice and not (subset and names[row] in absent)]
        if subset:
            problems += [(f"{split}/{name}", "note", MISSING, "not in the lists") for name in absent]
        there = {entry.name for entry in (out / split).iterdir() if not of_macos(entry.name)}
        unknown = sorted(there - set(names))
        if unknown:
            reason = f"{len(unknown)} files that the annotations do not name (first: {unknown[0]})"
            problems.append((f"{split}/", "note", reason, "not used"))
    return rows, problems


def _found(indexes: dict[str, AnnotationIndex], rows: dict[str, list[int]]) -> dict[str, int]:
    found = {"classes": len(indexes["train2014"].categories)}
    for split, index in indexes.items():
        found[f"{split} images"] = len(rows[split])
        found[f"{split} annotated images"] = int((index.counts[rows[split]] > 0).sum())
    return found


def _finish_image(item: tuple[str, int]) -> dict:
    """Check one image and draw its mask; runs in a worker."""
    split, row = item
    out, index = _shared["out"], _shared["indexes"][split]
    image = index.images[row]
    name, mask_name = f"{split}/{image.file_name}", f"masks/{split}/{Path(image.file_name).stem}.png"
    stamp = stamp_of([out / name])
    record, picture, problems = check_picture(out / name, name)
    files = {} if record is None else {name: record}
    size = (image.height, image.width)
    if picture is not None and picture.shape != size:
        reason = "{} x {} pixels (height, width) as the loader reads it, {} x {} in the annotations"
        problems.append((name, "error", reason.format(*picture.shape, *size), LEFT_OUT))
    elif picture is not None:
        try:
            content = _mask(index, row, out / name)
        except BadFile as error:
            problems.append((name, "error", error.reason, LEFT_OUT))
        else:
            (out / mask_name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out / mask_name, content)
            files[mask_name] = picture_record(content, image.width, image.height, "P")
    if mask_name not in files:
        (out / mask_name).unlink(missing_ok=True)
    return {"stamp": stamp, "files": files, "problems": problems}


def _mask(index: AnnotationIndex, row: int, path: Path) -> bytes:
    image, class_of = index.images[row], index.class_of
    known = [a for a in index.annotations(row) if a["category_id"] in class_of]
    return encode_mask(draw_mask(known, image.height, image.width, class_of, where=index.path, name=path.name))


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask uint8 [H, W] as a PNG with the palette of VOC."""
    out = io.BytesIO()
    palette_picture(mask).save(out, format="PNG")
    return out.getvalue()
