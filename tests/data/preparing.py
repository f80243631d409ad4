"""What the tests of `prepare_data.py coco|voc|folder` share."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

from PIL import Image

from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.prepare.coco import prepare_coco
from wsss_dist.data.prepare.folder import check_folder
from wsss_dist.data.prepare.inputs import Console, Options
from wsss_dist.data.prepare.voc import prepare_voc

COMMANDS = {"coco": prepare_coco, "voc": prepare_voc, "folder": check_folder}


def run(data: str, source: Path | None, out: Path, **changes) -> list[str]:
    """Prepare in this process; returns the lines it says."""
    said: list[str] = []
    sources = () if source is None else (source,)
    options = {"sources": sources, "out": out, "workers": 0, "subset": data != "folder", **changes}
    COMMANDS[data](Options(**options), Console(said.append, lambda items, total: items))
    return said


def contents(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file in a folder, links followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        # rglob does not enter links to folders
        inside = sorted(path.rglob("*")) if path.is_symlink() and path.is_dir() else [path]
        for file in (file for file in inside if file.is_file()):
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def problems(out: Path) -> list[tuple[str, str, str, str]]:
    """The rows of problems.csv below its header."""
    with (out / "problems.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "kind", "reason", "effect"] and rows == sorted(rows)
    return [tuple(row) for row in rows]


def coco_split(root: Path, split: str, **changes):
    """A split of a prepared COCO."""
    return build_dataset(DataConfig(format="coco", root=root, **changes), split)


def change(folders: Path, edit, split: str = "train2014") -> dict:
    """Edit an annotation file."""
    path = folders / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return content


def picture(form: str, mode: str, size: tuple[int, int] = (32, 24), **options) -> bytes:
    """A picture of size (width, height)."""
    out = io.BytesIO()
    Image.new(mode, size, 1).save(out, form, **options)
    return out.getvalue()
