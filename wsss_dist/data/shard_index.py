"""The index of a split in shards: which bytes of which .tar file are which image, and the tags.

    <split>/shards.json   class names, number of images, and of each shard its name, size and SHA-256
    <split>/samples.npz   of each image, in the order of the split: `files` its path in the original set, `tags` [n, C],
                          `shard` [n], and `offsets`, `sizes`, `crcs` [n, 3] of its members: picture, mask, JSON
    <split>/*.tar         the shards, plain WebDataset: <key>.jpg, <key>.json and, if asked for, <key>.png, the mask

Letters: n images, C classes.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from wsss_dist.errors import UserError
from wsss_dist.files import write_whole

INDEX, SAMPLES = "shards.json", "samples.npz"
PICTURE, MASK, JSON = range(3)
# endings by which a picture cannot be told from the other members of its sample
NO_PICTURE = ("", ".json", ".cls")
_VERSION = 1
_HOW = "make it again: delete shards.json and run `python launch/prepare_data.py index FOLDER`"


@dataclass(frozen=True)
class Shard:
    """One .tar file: name within its folder, size in bytes, hex SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass
class ShardIndex:
    """n images in shards.

    classes  names of the C classes.
    shards   the .tar files.
    files    [n] str, path of each image in the original set; without its ending it is the image's id.
    tags     [n, C] uint8.
    shard    [n] int32, position in `shards`.
    offsets  [n, 3] int64, first byte of picture, mask and JSON in the shard, -1 where there is none.
    sizes    [n, 3] int64, in bytes, -1 where there is none.
    crcs     [n, 3] uint32, CRC-32 of the bytes.
    base     folder or address of the shards; None: that of the index.
    made     what the shards were made from; free words.
    """

    classes: list[str]
    shards: list[Shard]
    files: np.ndarray
    tags: np.ndarray
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    base: str | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        names = ("files", "tags", "shard", "offsets", "sizes", "crcs")
        return {name: getattr(self, name) for name in names}


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write shards.json and samples.npz; equal indices give equal bytes, and shards.json appears last."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **index.arrays)
    content = {
        "version": _VERSION,
        "images": len(index.files),
        "masks": int((index.sizes[:, MASK] >= 0).sum()),
        "classes": index.classes,
        "base": index.base,
        "made": index.made,
        "samples": {"file": SAMPLES, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "shards": [asdict(shard) for shard in index.shards],
    }
    write_whole(folder / SAMPLES, buffer.getvalue(), durable=True)
    write_whole(folder / INDEX, json.dumps(content, indent=1, ensure_ascii=False), durable=True)


def parse_index(where: str, text: bytes, samples: bytes) -> ShardIndex:
    """The index that `text` (shards.json) and `samples` (samples.npz) hold.

    Args:
        where: name of shards.json for messages.
    Raises:
        UserError: they are damaged, do not belong together, or point outside the shards.
    """
    content = read_header(where, text)
    if hashlib.sha256(samples).hexdigest() != content["samples"]["sha256"]:
        raise UserError(f"data: {SAMPLES} beside {where} belongs to another index or is damaged; {_HOW}")
    try:
        with np.load(io.BytesIO(samples), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("files", "tags", "shard", "offsets", "sizes", "crcs")}
        shards = [Shard(s["file"], s["bytes"], s["sha256"]) for s in content["shards"]]
        index = ShardIndex(content["classes"], shards, **arrays, base=content["base"], made=content["made"])
        fault = _fault(index, content["images"])
    except Exception as error:  # numpy, zipfile and missing keys raise many kinds, and all mean the same here
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(f"data: {where} is no index of shards ({fault}); {_HOW}")
    return index


def read_header(where: str, text: bytes) -> dict[str, Any]:
    """The content of shards.json. Raises UserError where it is another file or of another version."""
    try:
        content = json.loads(text)
        version = content["version"]
        str(content["samples"]["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"data: {where} is no index of shards ({type(error).__name__}: {error}); {_HOW}") from None
    if version != _VERSION:
        raise UserError(f"data: {where} has version {version}; this program reads version {_VERSION}: {_HOW}")
    return content


def _fault(index: ShardIndex, images: int) -> str | None:
    """What is wrong with an index that was read, in a few words."""
    n, count = images, len(index.shards)
    shapes = {"files": (n,), "tags": (n, len(index.classes)), "shard": (n,)}
    shapes |= {name: (n, 3) for name in ("offsets", "sizes", "crcs")}
    kinds = {"files": "U", "tags": "u", "shard": "i", "offsets": "i", "sizes": "i", "crcs": "u"}
    for name, values in index.arrays.items():
        if values.shape != shapes[name] or values.dtype.kind != kinds[name]:
            return f"`{name}` is {values.dtype} {list(values.shape)}, expected {list(shapes[name])}"
    if not n or not 1 <= len(index.classes) <= 254 or not all(isinstance(c, str) for c in index.classes):
        return f"{n} images of {len(index.classes)} classes"
    if index.base is not None and not (isinstance(index.base, str) and index.base.isprintable()):
        return f"its base is {index.base!r}"
    for shard in index.shards:
        plain = PurePosixPath(shard.file).name == shard.file and "\0" not in shard.file
        if not plain or not isinstance(shard.bytes, int):
            return f"the shard '{shard.file}' is no plain file name with a size"
    if not 0 <= int(index.shard.min()) <= int(index.shard.max()) < count:
        return f"it names shards that are not among the {count}"
    there = index.sizes >= 0
    lengths = np.array([shard.bytes for shard in index.shards])[index.shard][:, None]
    inside = (index.offsets >= 512) & (index.offsets + index.sizes <= lengths)
    if not there[:, PICTURE].all() or not inside[there].all():
        return "it has members outside their shards"
    return None


def sample_key(file: str) -> str:
    """Key of an image in a shard: its path without ending, and without dots, at which WebDataset would cut it."""
    path = PurePosixPath(file)
    return str(path.with_name(path.stem.replace(".", "%2E")))


def picture_member(file: str) -> str:
    """Name of an image in its shard."""
    return sample_key(file) + PurePosixPath(file).suffix.lower()
