"""Write a split of any format as WebDataset shards; the same set gives the same bytes, a killed run is gone on with.

    OUT/<split>/<split>-000000.tar ...   <key>.jpg, <key>.json ("tags", "name", "path") and, if asked for, <key>.png
    OUT/<split>/shards.json, samples.npz

Pictures and mask files are stored as they are, byte for byte; a mask that the format draws becomes a grey PNG of ids.
The folder appears under its name when it is complete; until then it is OUT/.<split>.partial.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from wsss_dist.data.config import DataConfig
from wsss_dist.data.dataset import Dataset, check_distinct
from wsss_dist.data.prepare.fetch import sha256_of
from wsss_dist.data.prepare.tar import scan_tar
from wsss_dist.data.readers import build_dataset
from wsss_dist.data.shard_index import (
    INDEX,
    JSON,
    MASK,
    NO_PICTURE,
    PICTURE,
    Shard,
    ShardIndex,
    picture_member,
    read_header,
    sample_key,
    write_index,
)
from wsss_dist.errors import BadFile, UserError
from wsss_dist.files import whole_file, write_whole

_PROGRESS, _LOCK = "progress.json", "lock"
# some network file systems have no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# raised when the same set would give other bytes
_RECIPE = 1
# first byte, size and CRC-32 of a member
_Where = tuple[int, int, int]


def prepare_shards(
    source: str, split: str, out: Path, *, size: int, masks: bool, classes: list[str] | None, say: Callable[[str], None]
) -> None:
    """Write the split of a data set into out/<split>, unless it is there and whole.

    Args:
        source: "<format>:<folder>".
        split: name of the split.
        out: folder to fill.
        size: most bytes of pictures in a shard; one that is larger gets a shard for itself.
        masks: store the masks too, for an evaluation.
        classes: names of the classes, where the format does not give them.
        say: prints one line.
    Raises:
        UserError: the source is wrong, has no masks, or `out` holds something else.
    """
    form, _, root = source.partition(":")
    if form not in ("coco", "voc", "folder") or not root:
        raise UserError(f"prepare: --from is '{source}'; expected coco:FOLDER, voc:FOLDER or folder:FOLDER")
    if size < 1:
        raise UserError(f"prepare: --size is {size} bytes; expected more than 0, as 256MB")
    cfg = DataConfig(format=form, root=root, train_split=split, classes=classes)
    dataset = build_dataset(cfg, split)
    files = dataset.files.tolist()
    _check_endings(dataset)
    check_distinct([sample_key(file) for file in files], "keys", dataset.name)
    if masks and not dataset.has_masks:
        raise UserError(f"prepare: '{dataset.name}' has no masks; leave --masks out, or add them")
    sizes = [(dataset.root / file).stat().st_size for file in files]
    made = {"format": form, "set": dataset.name, "split": split, "size": size, "with_masks": masks}
    made["key"] = _key(dataset, sizes, made)
    if _is_finished(out / split, made, say):
        return
    with _partial_folder(out, split, made) as (partial, done):
        if masks:
            dataset.open_masks()
        rows = _write_all(partial, dataset, made, _plan(sizes, size), done, say)
        write_index(partial, _index(dataset, rows, made))
        _note(cfg.root, out)
        (partial / _PROGRESS).unlink()
        (partial / _LOCK).unlink()
        partial.rename(out / split)
    say(f"{len(files)} images of '{dataset.name}' in {len(rows)} shards in {out / split}")


def _check_endings(dataset: Dataset) -> None:
    """Hold that each picture can be told from the other members of its sample when the shards are read again."""
    odd = [name for name in dataset.files.tolist() if PurePosixPath(name).suffix.lower() in NO_PICTURE]
    if odd:
        what = f"holds {len(odd)} images without the ending of a picture"
        rows = [(str(dataset.root / name), "its name has not the ending of a picture") for name in odd]
        message = f"prepare: {dataset.name} {what} (first: {odd[0]}); expected one, as .jpg or .png: rename them"
        raise BadFile(dataset.root, what, message, rows)


def parse_size(text: str) -> int:
    """Bytes of "256MB": kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"prepare: --size is '{text}'; expected a number with a unit, as 256MB")
    power = "kmg".find(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _key(dataset: Dataset, sizes: list[int], made: dict[str, Any]) -> str:
    """Digest of what decides the bytes of the shards, but for the contents of the files."""
    total = hashlib.sha256(json.dumps([_RECIPE, made, dataset.class_names]).encode())
    total.update(json.dumps([dataset.files.tolist(), sizes]).encode())
    total.update(dataset.tags.tobytes())
    return total.hexdigest()


def _plan(sizes: list[int], most: int) -> list[range]:
    """Consecutive images a shard, so that their bytes stay within `most`."""
    plan, begin, used = [], 0, 0
    for k, size in enumerate(sizes):
        if k > begin and used + size > most:
            plan.append(range(begin, k))
            begin, used = k, 0
        used += size
    return [*plan, range(begin, len(sizes))]


def _write_all(
    partial: Path,
    dataset: Dataset,
    made: dict[str, Any],
    plan: list[range],
    done: dict[str, str],
    say: Callable[[str], None],
) -> list[tuple[Shard, list[list[_Where | None]]]]:
    """Write the shards that `done` (name -> SHA-256) does not hold; each with its members, as `scan_tar` finds them."""
    rows = []
    for k, chosen in enumerate(plan):
        name = f"{made['split']}-{k:06d}.tar"
        if name not in done or not (partial / name).is_file() or sha256_of(partial / name) != done[name]:
            _write_shard(partial / name, dataset, chosen, made["with_masks"])
            done[name] = sha256_of(partial / name)
            write_whole(partial / _PROGRESS, json.dumps({"key": made["key"], "shards": done}), durable=True)
            say(f"{name} ({k + 1} of {len(plan)}): {len(chosen)} images, {(partial / name).stat().st_size} bytes")
        shard = Shard(name, (partial / name).stat().st_size, done[name])
        with (partial / name).open("rb") as file:
            members = {m.name: (m.offset, m.size, m.crc) for m in scan_tar(file, name)}
        rows.append((shard, [[members.get(m) for m in _members(str(dataset.files[i]))] for i in chosen]))
    return rows


def _members(file: str) -> tuple[str, str, str]:
    """Names of picture, mask and JSON of an image."""
    picture, key = picture_member(file), sample_key(file)
    return picture, f"{key}.mask.png" if picture.endswith(".png") else f"{key}.png", f"{key}.json"


def _write_shard(path: Path, dataset: Dataset, chosen: range, masks: bool) -> None:
    with (
        whole_file(path, durable=True) as partial,
        tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for i in chosen:
            for name, content in _contents(dataset, i, masks):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def _contents(dataset: Dataset, i: int, masks: bool) -> Iterator[tuple[str, bytes]]:
    file = str(dataset.files[i])
    picture, mask, about = _members(file)
    yield picture, (dataset.root / file).read_bytes()
    if masks:
        source = dataset.mask_file(i)
        if source is not None and not source.is_file():
            raise UserError(f"prepare: mask {source} is missing; add it, or leave --masks out")
        yield mask, _png(dataset.mask(i)) if source is None else source.read_bytes()
    tags = [dataset.class_names[c] for c in np.flatnonzero(dataset.tags[i])]
    yield about, json.dumps({"tags": tags, "name": dataset.id(i), "path": file}).encode()


def _png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def _index(dataset: Dataset, rows: list, made: dict[str, Any]) -> ShardIndex:
    n = len(dataset)
    found = [members for _, inside in rows for members in inside]
    none = (-1, -1, 0)
    table = np.array([[m or none for m in members] for members in found], np.int64).reshape(n, 3, 3)
    assert (table[:, [PICTURE, JSON], 1] >= 0).all() and ((table[:, MASK, 1] >= 0) == made["with_masks"]).all()
    return ShardIndex(
        classes=dataset.class_names,
        shards=[shard for shard, _ in rows],
        files=dataset.files,
        tags=dataset.tags,
        shard=np.repeat(np.arange(len(rows)), [len(inside) for _, inside in rows]).astype(np.int32),
        offsets=table[..., 0],
        sizes=table[..., 1],
        crcs=table[..., 2].astype(np.uint32),
        made=made,
    )


def _is_finished(folder: Path, made: dict[str, Any], say: Callable[[str], None]) -> bool:
    """True where `folder` holds what is asked for and every shard has its checksum; False where it does not exist."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    index = folder / INDEX
    found = read_header(str(index), index.read_bytes()) if index.is_file() else {}
    if found.get("made") != made:
        what = f"shards of {found['made']}" if "made" in found else "something else"
        raise UserError(f"prepare: {folder} holds {what}; delete the folder, or give another --out")
    for shard in found["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            raise UserError(
                f"prepare: {path} is missing or damaged (its SHA-256 differs from {INDEX}); delete {folder} and run "
                "the command again"
            )
    say(f"{folder} is complete: {found['images']} images in {len(found['shards'])} shards, checksums right")
    return True


@contextmanager
def _partial_folder(out: Path, split: str, made: dict[str, Any]) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder to fill, locked, and the shards that are in it (name -> SHA-256)."""
    folder = out / f".{split}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                message = f"prepare: another process writes {folder}; wait for it, or give another --out"
                raise UserError(message) from None
            if error.errno not in _NO_LOCKS:
                raise
        try:
            begun = json.loads((folder / _PROGRESS).read_text())
        except (OSError, ValueError):
            begun = {}
        if begun.get("key") != made["key"]:
            begun = {}
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
        yield folder, begun.get("shards", {})


def _note(root: Path, out: Path) -> None:
    """Carry over what the set says of itself, which results are reported with."""
    try:
        about = json.loads((root / "manifest.json").read_text(encoding="utf-8"))["about"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    write_whole(out / "manifest.json", json.dumps({"about": about}, indent=1), durable=True)
