"""Checks a data set of the `folder` format and writes its manifest.json and problems.csv; nothing else is changed."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from wsss_dist.data.dataset import checked_mask
from wsss_dist.data.folder import read_classes, read_labels_csv
from wsss_dist.data.prepare.archives import of_macos
from wsss_dist.data.prepare.inputs import Console, Options, check_names, prepare
from wsss_dist.data.prepare.manifest import (
    check_picture,
    file_record,
    gather,
    picture_record,
    settle_problems,
    why_unreadable,
    write_manifest,
)
from wsss_dist.data.prepare.verify import unusable
from wsss_dist.data.prepare.work import WorkFolder, finish_items, stamp_of
from wsss_dist.data.problems import STAYS
from wsss_dist.errors import BadFile, UserError

_ABOUT = "A data set of the folder format as checked by launch/prepare_data.py folder."


def check_folder(options: Options, console: Console) -> None:
    """Check `options.out`: every image and mask of every split is decoded once.

    Raises:
        UserError: no split, a labels.csv that cannot be read, or files that cannot be used and on_problem "stop".
    """
    root = options.out
    if not any(root.glob("*/labels.csv")):
        raise UserError(
            f"prepare: '{root}' has no <split>/labels.csv; name the folder of a data set of the folder format, as "
            "wsss_dist/data/folder.py describes it"
        )
    prepare(options, "folder", lambda work, settings: _steps(work, options, settings, console), console)


def _steps(work: WorkFolder, options: Options, settings: dict, console: Console) -> None:
    root = options.out
    classes = read_classes(root / "classes.txt")
    items, counts, problems, files, unreadable = {}, {}, [], {}, []
    lists = sorted(root.glob("*/labels.csv"))
    for listed in lists:
        split = listed.parent.name
        try:
            images = _images(listed, classes)
        except BadFile as error:
            shown = str(listed.relative_to(root))
            unreadable.append(BadFile(listed, error.reason, str(error), [(shown, why) for _, why in error.rows]))
            continue
        counts[f"{split} images"] = len(images)
        masks = (listed.parent / "masks").is_dir()
        items |= {f"{split}/images/{name}": (root, split, name, len(classes) if masks else None) for name in images}
        folder = listed.parent / "images"
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        unknown = sorted(name for name in there - set(images) if not of_macos(name))
        if unknown:
            reason = f"{len(unknown)} files that labels.csv does not name (first: {unknown[0]})"
            problems.append((f"{split}/images/", "note", reason, "not used"))
        console.say(f"{split}: {len(images):,} images, {'with' if masks else 'without'} masks")
    for path in (root / "classes.txt", *lists):
        files[str(path.relative_to(root))] = json.dumps(file_record(path.read_bytes()))
    depends = {"classes": len(classes)}
    results = finish_items(work, depends, items, _check, workers=options.workers, track=console.track)
    of_items, _, problems = gather(results, problems)
    files |= of_items
    if unreadable:  # without the lists there is no manifest, whatever --on-problem says
        work.problems += problems
        first, rows = unreadable[0], [row for error in unreadable for row in error.rows]
        raise BadFile(first.path, first.reason, str(first), rows)
    settle_problems(root, problems, options.on_problem, console.say, "write the manifest all the same")
    head = {"about": _ABOUT, "settings": settings, "counts": counts}
    write_manifest(root, head | unusable(root, problems, work.archives), files)
    console.say(f"{root} is checked: {len(files):,} files in manifest.json")


def _images(listed: Path, classes: list[str]) -> list[str]:
    """The images that a labels.csv names, there or not. Raises BadFile where the reader would."""
    images, _ = read_labels_csv(listed, classes)
    check_names(listed.parent / "images", images, listed)
    return images


def _check(item: tuple[Path, str, str, int | None]) -> dict:
    """Check one image and its mask; runs in a worker."""
    root, split, name, classes = item
    shown = f"{split}/images/{name}"
    mask_shown = f"{split}/masks/{Path(name).with_suffix('')}.png"
    stamp = stamp_of([root / shown, root / mask_shown])
    record, picture, problems = check_picture(root / shown, shown)
    files = {} if record is None else {shown: record}
    if classes is not None:
        mask = root / mask_shown
        try:
            values = checked_mask(mask, classes)
            content = mask.read_bytes()
            mode = Image.open(io.BytesIO(content)).mode
            files[mask_shown] = picture_record(content, values.shape[1], values.shape[0], mode)
            if picture is not None and picture.shape != values.shape:
                reason = "{} x {} pixels (height, width), the image as the loader reads it {} x {}"
                problems.append((mask_shown, "error", reason.format(*values.shape, *picture.shape), STAYS))
        except BadFile as error:
            problems.append((mask_shown, "error", error.reason, STAYS))
        except OSError as error:
            problems.append((mask_shown, "error", why_unreadable(error), STAYS))
    # the lists of a folder are its owner's, so nothing is left out of them
    problems = [(path, kind, why, STAYS if kind == "error" else effect) for path, kind, why, effect in problems]
    return {"stamp": stamp, "files": files, "problems": problems}
