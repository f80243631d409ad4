"""Opens splits as a training does and decodes every image and mask as the loader does; check.csv says what fails.

It needs no manifest, so it serves any data set that the readers take; a picture that was damaged and still decodes is
found by `verify` alone. Nothing but the table is written.
"""

from __future__ import annotations

import os
import tempfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from wsss_dist.data.config import DataConfig, is_url
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.decode import DamagedImage
from wsss_dist.data.folder import read_classes
from wsss_dist.data.prepare.verify import check_report
from wsss_dist.data.prepare.work import in_processes
from wsss_dist.data.problems import STAYS, Problem, problems_of, write_problems
from wsss_dist.data.readers import build_dataset
from wsss_dist.errors import BadFile, UserError

if TYPE_CHECKING:
    from wsss_dist.data.prepare.inputs import Console

REPORT = "check.csv"
_FORMATS = ("coco", "voc", "folder", "shards")
_NOT_OPENED = "the split cannot be opened"
# what the worker processes read; set before they are forked
_shared: dict[str, Dataset] = {}


def check(
    source: str, splits: list[str], classes: Path | None, report: Path | None, workers: int, console: Console
) -> None:
    """Check splits of a data set and write the table.

    Args:
        source: "<format>:<folder>".
        splits: their names.
        classes: file of the class names, where the format does not give them.
        report: the table; None: check.csv in the folder.
    Raises:
        UserError: there is no such folder or split, the table cannot be written, or files cannot be used, which it
            names.
    """
    form, _, root = source.partition(":")
    if form not in _FORMATS or not root:
        raise UserError(f"prepare: --from is '{source}'; expected {', '.join(f'{name}:FOLDER' for name in _FORMATS)}")
    if workers < 0:
        raise UserError(f"prepare: --workers is {workers}; expected 0 (this process alone) or more")
    if is_url(root) and report is None:
        raise UserError(f"prepare: the table of {root} needs a file of this machine; give --report")
    root = root if is_url(root) else str(Path(root).expanduser())  # as the reader does
    report = report or Path(root) / REPORT
    if is_url(root) or Path(root).is_dir():  # else the reader says what is wrong with it
        check_report(report)
    names = read_classes(classes) if classes else None
    values = {"format": form, "root": root, "classes": names, "eval_splits": splits, "train_split": splits[0]}
    problems: list[Problem] = []
    for split in splits:
        dataset = _opened(values, split, problems)
        if dataset is None:
            continue
        console.say(f"{dataset.name}: {len(dataset):,} images, {'with' if dataset.has_masks else 'without'} masks")
        if dataset.has_masks:
            dataset.open_masks()
        _shared["dataset"] = dataset
        try:
            results = in_processes(_check, list(range(len(dataset))), workers)
            problems += chain.from_iterable(console.track(results, len(dataset)))
        finally:
            _shared.clear()
    problems = [(_below(path, report.parent), *rest) for path, *rest in problems]
    write_problems(report, problems)
    if problems:
        first = f"{problems[0][0]}: {problems[0][2]}"
        raise UserError(
            f"prepare: {len(set(problems)):,} problems in {source} (first: {first}); {report} names them all. Repair "
            f"them, or train and evaluate without these files: --set data.leave_out={report}"
        )
    console.say(f"{source}: every file of {', '.join(splits)} can be used")


def _opened(values: dict, split: str, problems: list[Problem]) -> Dataset | None:
    """The split, without the files that its list names and that are missing or unreadable; these go to `problems`."""
    try:
        return build_dataset(DataConfig(**values), split)
    except BadFile as error:
        found = problems_of(error, _NOT_OPENED)
    problems += found
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "problems.csv"
        try:
            write_problems(table, [(os.path.abspath(path), *rest) for path, *rest in found])
            return build_dataset(DataConfig(**values, leave_out=table), split)
        except BadFile as error:  # the list itself is wrong, or more than one thing is
            problems += [row for row in problems_of(error, _NOT_OPENED) if row not in problems]
        except UserError:  # nothing is left
            pass
    return None


def _check(i: int) -> list[Problem]:
    """What is wrong with an image and its mask; runs in a worker."""
    dataset, found, size = _shared["dataset"], [], None
    try:
        size = dataset.image(i).shape[:2]
    except DamagedImage as error:
        found.append((error.path, "error", error.reason, STAYS))
    except UserError as error:
        found += _rows(error, str(dataset.path(i)))
    if not dataset.has_masks:
        return found
    shown = str(dataset.mask_file(i) or dataset.path(i))
    try:
        mask = dataset.mask(i)
        if size is not None and mask.shape != size:
            reason = f"its mask is {mask.shape[0]} x {mask.shape[1]} (height, width), the image {size[0]} x {size[1]}"
            found.append((shown, "error", reason, STAYS))
    except UserError as error:
        found += _rows(error, shown)
    return found


def _rows(error: UserError, path: str) -> list[Problem]:
    return problems_of(error, STAYS) if isinstance(error, BadFile) else [(path, "error", str(error), STAYS)]


def _below(path: str, folder: Path) -> str:
    """A path relative to the folder of the table where it lies below it, absolute otherwise."""
    if is_url(path):
        return path
    whole, base = os.path.abspath(path), os.path.abspath(folder)
    return os.path.relpath(whole, base) if whole.startswith(base + os.sep) else whole
