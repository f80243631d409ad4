"""Make the index of shards that exist: WebDataset files of others, or our own whose index was lost. Each is read once.

A sample is the members of one key that lie side by side: a picture, its tags, and where there is one a mask: .mask.png
or .seg.png, or .png beside a picture of another kind. The picture has the ending of "path" in <key>.json, as our shards
have it, else it is the .jpg, .jpeg, .webp or .png. Tags are in <key>.json under "tags", "labels", "classes", "label" or
"cls", or in <key>.cls: names, or whole numbers that count the classes from 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from wsss_dist.data.config import is_url
from wsss_dist.data.dataset import check_names
from wsss_dist.data.prepare.tar import HashingReader, Member, scan_tar
from wsss_dist.data.shard_files import Place, open_place
from wsss_dist.data.shard_index import INDEX, NO_PICTURE, SAMPLES, Shard, ShardIndex, parse_index, write_index
from wsss_dist.errors import UserError

# a .png beside one of the others is its mask
_PICTURES = ("jpg", "jpeg", "webp", "png")
_MASKS = ("mask.png", "seg.png", "png")
_TAGS = ("tags", "labels", "classes", "label", "cls")


def index_shards(
    folder: Path | str, split: str | None, out: Path | None, classes: list[str] | None, say: Callable[[str], None]
) -> None:
    """Write shards.json and samples.npz for the .tar files of a folder or an address, or check those that are there.

    Args:
        folder: where the .tar files lie.
        split: name of the split; None: the folder's own name.
        out: the index goes to out/<split> and the shards stay where they are; None: it goes beside them.
        classes: names of the classes; None: the names that occur as tags, sorted.
        say: prints one line.
    Raises:
        UserError: a shard cannot be used, or is not the one that an index, which is there already, was made of.
    """
    name = folder.rstrip("/").rsplit("/", 1)[-1] if is_url(folder) else Path(folder).resolve().name
    split = split or name
    place = open_place(folder)
    if out is None and is_url(folder):
        raise UserError(f"prepare: the index of {folder} needs a folder of this machine; give --out")
    if out is None and split != name:
        raise UserError(
            f"prepare: beside the shards the split is called as the folder, '{name}'; leave --split out, or give --out"
        )
    target = Path(folder) if out is None else out / split
    found = place.sizes([])
    if (target / INDEX).is_file():
        _check(target, place, say)
        return
    tars = sorted(file for file in found if file.endswith(".tar"))
    if not tars:
        packed = [file for file in found if file.endswith((".tar.gz", ".tgz", ".tar.zst"))]
        hint = f"; {packed[0]} is packed: unpack it to a .tar" if packed else ""
        raise UserError(f"prepare: {folder} has no .tar file{hint}; expected WebDataset shards: name their folder")
    index = _index(place, tars, classes, say)
    if out is not None:
        index.base = str(folder) if is_url(folder) else str(Path(folder).resolve())
    target.mkdir(parents=True, exist_ok=True)
    write_index(target, index)
    masks = int((index.sizes[:, 1] >= 0).sum())
    say(f"{len(index.files)} images of {len(index.classes)} classes, {masks} masks, in {len(tars)} shards: {target}")
    _say_gap(tars, say)


def _say_gap(tars: list[str], say: Callable[[str], None]) -> None:
    """Say that shards numbered one after another have a gap; they may be a choice, so it is no error."""
    numbers = {int(match[0]) for file in tars if (match := re.search(r"\d+(?=\.tar$)", file))}
    gap = next((n for n in sorted(numbers)[:-1] if n + 1 not in numbers), None)
    if gap is not None:
        say(
            f"between the shards {gap} and {min(n for n in numbers if n > gap)} others may be missing: compare with "
            "where they come from, then delete the index and make it again"
        )


def _check(target: Path, place: Place, say: Callable[[str], None]) -> None:
    """Read every shard of an index that exists and compare the checksums."""
    samples = (target / SAMPLES).read_bytes() if (target / SAMPLES).is_file() else b""
    index = parse_index(str(target / INDEX), (target / INDEX).read_bytes(), samples)
    for shard in index.shards:
        with place.stream(shard.file) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"prepare: {place.name(shard.file)} is damaged or another shard: its SHA-256 differs from "
                f"{target / INDEX}; copy it again, or delete {INDEX} and run this command again"
            )
        say(f"{shard.file}: checksum right")
    say(f"{target} has its index: {len(index.files)} images in {len(index.shards)} shards, checksums right")


def _index(place: Place, tars: list[str], classes: list[str] | None, say: Callable[[str], None]) -> ShardIndex:
    shards, samples, of_shard = [], [], []
    seen: dict[str, str] = {}
    for k, file in enumerate(tars):
        where = place.name(file)
        with place.stream(file) as stream:
            reader = HashingReader(stream)
            members = list(scan_tar(reader, where))
            sha256 = reader.rest()
        if not reader.ended:
            raise UserError(f"prepare: {where} is truncated: no .tar file ends as it does; copy it again")
        inside = list(_samples(members, where, seen))
        shards.append(Shard(file, reader.bytes, sha256))
        samples += inside
        of_shard += [k] * len(inside)
        say(f"{file} ({k + 1} of {len(tars)}): {len(inside)} images")
    if not samples:
        raise UserError(f"prepare: {place.name('')} has shards without a picture; expected {', '.join(_PICTURES)}")
    names, tags = _tag_matrix(samples, classes)
    files = [sample.file for sample in samples]
    check_names(files, place.name(""))
    table = np.array([sample.places for sample in samples], np.int64)
    return ShardIndex(
        classes=names,
        shards=shards,
        files=np.array(files, np.str_),
        tags=tags,
        shard=np.array(of_shard, np.int32),
        offsets=table[..., 0],
        sizes=table[..., 1],
        crcs=table[..., 2].astype(np.uint32),
        made={"format": "WebDataset"},
    )


class _Sample:
    """A picture with its tags and the places (offset, size, CRC-32) of picture, mask and JSON."""

    def __init__(self, where: str, file: str, kind: str, parts: dict[str, Member], about: dict[str, Any]) -> None:
        mask = next((k for k in _MASKS if k in parts and k != kind), None)
        chosen = [parts.get(kind), parts.get(mask), parts.get("json")]
        self.places = [(-1, -1, 0) if m is None else (m.offset, m.size, m.crc) for m in chosen]
        self.where, self.file = where, file
        self.tags = _tags(about, parts.get("cls"), where)


def _samples(members: list[Member], where: str, seen: dict[str, str]) -> Iterator[_Sample]:
    """The samples of a shard; `seen` holds the keys of the shards so far, with their shards."""

    def whole(key: str, parts: dict[str, Member]) -> Iterator[_Sample]:
        about = _json(parts["json"], f"{where}:{key}") if "json" in parts and len(parts) > 1 else {}
        path = about.get("path") if isinstance(about.get("path"), str) else ""
        kind = _picture(parts, path, f"{where}:{key}")
        if kind is not None:
            if key in seen:
                raise UserError(
                    f"prepare: the key '{key}' is in {seen[key]} and again in {where}; expected each key once: give "
                    "the samples different keys, or take one of the shards away"
                )
            seen[key] = where
            yield _Sample(f"{where}:{key}", path or f"{key}.{kind}", kind, parts, about)

    key, parts = None, {}
    for member in members:
        path = PurePosixPath(member.name)
        stem, _, kind = path.name.partition(".")
        new = str(path.with_name(stem)) if stem else member.name
        if new != key:
            yield from whole(key, parts)
            key, parts = new, {}
        if kind.lower() in parts:
            raise UserError(f"prepare: {where} holds '{member.name}' twice; expected each member once: make it again")
        parts[kind.lower()] = member
    yield from whole(key, parts)


def _picture(parts: dict[str, Member], path: str, where: str) -> str | None:
    """Ending of the picture of a sample, whose JSON says `path`; None where there is no picture."""
    ending = PurePosixPath(path).suffix.lower()
    if ending not in NO_PICTURE and ending.removeprefix(".") in parts:
        return ending.removeprefix(".")
    known = next((kind for kind in _PICTURES if kind in parts), None)
    # what only looks like the picture may be the mask of one that is not known
    endings = Image.registered_extensions()
    other = next((kind for kind in parts if f".{kind}" in endings and kind not in _PICTURES), None)
    if other is not None and known in (None, "png"):
        raise UserError(
            f"prepare: {where} holds a picture '.{other}'; expected {', '.join(_PICTURES)}, or that its .json names it "
            "under 'path': convert it, or add that"
        )
    return known


def _json(member: Member, where: str) -> dict[str, Any]:
    try:
        about = json.loads(member.content)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"prepare: the .json of {where} is not readable JSON ({error}); correct it") from None
    return about if isinstance(about, dict) else {"tags": about}


def _tags(about: dict[str, Any], cls: Member | None, where: str) -> list[str | int]:
    value = next((about[name] for name in _TAGS if about.get(name) is not None), None)
    if value is None and cls is not None:
        text = (cls.content or b"").decode("utf-8", "replace").replace(",", " ").split()
        value = [int(word) if word.lstrip("-").isdigit() else word for word in text]
    if isinstance(value, str | int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in value):
        raise UserError(
            f"prepare: {where} has no tags; expected <key>.json with a list of names or numbers under 'tags' (empty "
            "where there is none), or <key>.cls: add it to the shard"
        )
    return value


def _tag_matrix(samples: list[_Sample], classes: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Class names, and tags uint8 [n, C]."""
    if classes is None:
        number = next((s for s in samples for tag in s.tags if isinstance(tag, int)), None)
        if number is not None:
            raise UserError(
                f"prepare: the tags of {number.where} are numbers ({number.tags}); give --classes, a file with the "
                "name of each class in a line of its own, in that order"
            )
        classes = sorted({tag for sample in samples for tag in sample.tags})
    if not 1 <= len(classes) <= 254:
        raise UserError(f"prepare: the tags name {len(classes)} classes; expected 1 to 254: give --classes")
    row_of = {name: c for c, name in enumerate(classes)}
    tags = np.zeros((len(samples), len(classes)), np.uint8)
    for row, sample in zip(tags, samples, strict=True):
        for tag in sample.tags:
            c = tag if isinstance(tag, int) else row_of.get(tag, -1)
            if not 0 <= c < len(classes):
                raise UserError(
                    f"prepare: {sample.where} has the unknown tag {tag!r}; expected one of {len(classes)} classes "
                    f"({', '.join(classes[:5])}, ...) or 0..{len(classes) - 1}: correct it, or correct --classes"
                )
            row[c] = 1
    return classes, tags
