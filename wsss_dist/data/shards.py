"""Data sets in WebDataset shards: few large .tar files instead of many small ones, on a disk or in object storage.

    <data.root>/<split>/shards.json, samples.npz, *.tar        `wsss_dist/data/shard_index.py` says what they hold

`python launch/prepare_data.py shards` makes them from the other formats, `... index` the index of those that exist. The
loader asks for samples by position, so a picture is read by its byte range: the order of the samples, the
augmentation and an exact resume are those of the set that the shards were made from. `data.root` may be an address that
fsspec knows; `data.cache` keeps the shards that are read on the node's own disk.

Training reads the pictures alone; masks, where the shards have any, are read for the evaluation.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np

from wsss_dist.data.config import ShardCacheConfig, is_url
from wsss_dist.data.dataset import Dataset, check_names, checked_ids
from wsss_dist.data.decode import DamagedImage, read_image, read_mask
from wsss_dist.data.shard_cache import ShardCache
from wsss_dist.data.shard_files import Place, missing, open_place
from wsss_dist.data.shard_index import (
    INDEX,
    JSON,
    MASK,
    PICTURE,
    SAMPLES,
    Shard,
    ShardIndex,
    parse_index,
    picture_member,
)
from wsss_dist.errors import BadFile, UserError

# shards of which one header is read when a data set is opened
_SPOT_CHECKS = 8


class ShardDataset(Dataset):
    """One split of such a folder or address."""

    def __init__(
        self, root: Path | str, split: str, classes: list[str] | None, cache: ShardCacheConfig | None = None
    ) -> None:
        folder = f"{root.rstrip('/')}/{split}" if is_url(root) else Path(root) / split
        index, self._place = open_index(folder)
        if classes is not None and classes != index.classes:
            raise UserError(
                f"data.classes is {', '.join(classes)}, but {open_place(folder).name(INDEX)} was made with "
                f"{', '.join(index.classes)}; leave data.classes out, or make the shards with these classes"
            )
        self._cache = ShardCache(cache.dir, int(cache.gb * 1e9)) if cache else None
        self._shards = index.shards
        self._shard, self._offsets, self._sizes, self._crcs = index.shard, index.offsets, index.sizes, index.crcs
        name = str(root).rstrip("/").rsplit("/", 1)[-1]
        super().__init__(f"{name}/{split}", index.classes, Path(split), index.files.tolist(), index.tags)

    def _select(self, rows: np.ndarray) -> None:
        super()._select(rows)
        for name in ("_shard", "_offsets", "_sizes", "_crcs"):
            setattr(self, name, getattr(self, name)[rows])

    def path(self, i: int) -> str:
        """Shard and member of image i."""
        return f"{self._place.name(self._shards[self._shard[i]].file)}:{picture_member(str(self.files[i]))}"

    def image(self, i: int) -> np.ndarray:
        """Image i, uint8 [H, W, 3] RGB, turned upright.

        Raises:
            DamagedImage: it cannot be decoded, or its bytes are not those that the index was made of.
            UserError: its shard is missing, truncated or cannot be reached.
        """
        return read_image(self.path(i), self._member(i, PICTURE))

    @property
    def has_masks(self) -> bool:
        return bool((self._sizes[:, MASK] >= 0).any())

    def mask_file(self, i: int) -> str | None:
        return f"{self.path(i)} (its mask)" if self.has_masks else None

    def mask(self, i: int) -> np.ndarray:
        path = self.mask_file(i)
        if path is None:
            return super().mask(i)
        if self._sizes[i, MASK] < 0:
            raise UserError(
                f"data: {path} is missing, though other images of '{self.name}' have one; make the shards again with "
                "--masks, or take the split out of data.eval_splits"
            )
        try:
            content = self._member(i, MASK)
        except DamagedImage as error:
            raise BadFile(path, error.reason, f"data: mask {path} cannot be read: {error.reason}") from None
        return checked_ids(read_mask(path, content), path, len(self.class_names))

    def _member(self, i: int, part: int) -> bytes:
        """The bytes of a member of sample i, held to the checksum of the index."""
        shard = self._shards[self._shard[i]]
        offset, size = int(self._offsets[i, part]), int(self._sizes[i, part])
        kept = self._cache and self._cache.read(shard, offset, size, self._place)
        if kept is not None and zlib.crc32(kept) == self._crcs[i, part]:
            return kept
        if kept is not None:
            self._cache.forget(shard)
        content = self._place.read(shard.file, offset, size)
        if len(content) != size:
            raise _truncated(self._place.name(shard.file), f"ends before byte {offset + size}", shard)
        if zlib.crc32(content) != self._crcs[i, part]:
            raise DamagedImage(
                self.path(i),
                "its bytes are not those that the index was made of (CRC-32); copy the shard again, or make "
                "shards.json again",
            )
        return content


def open_index(folder: Path | str) -> tuple[ShardIndex, Place]:
    """The index in a folder or at an address, and the place of its shards, which are all there in the right size.

    Raises:
        UserError: there is no index, it is damaged, or does not fit the shards.
    """
    place = open_place(folder)
    found = place.sizes([INDEX, SAMPLES]) if is_url(folder) or Path(folder).is_dir() else {}
    if INDEX not in found:
        raise _no_index(folder, found)
    index = parse_index(place.name(INDEX), place.whole(INDEX), place.whole(SAMPLES) if SAMPLES in found else b"")
    check_names(index.files.tolist(), place.name(INDEX))
    if index.base is not None:
        place = open_place(index.base if is_url(index.base) else Path(index.base))
    check_shards(index, place)
    return index, place


def check_shards(index: ShardIndex, place: Place) -> None:
    """Hold that every shard is there in the size of the index, and that a few headers lie where it says.

    Raises:
        UserError: names the first shard that is missing, truncated or another one.
    """
    found = place.sizes([shard.file for shard in index.shards])
    for shard in index.shards:
        if shard.file not in found:
            raise missing(place.name(shard.file))
        if found[shard.file] != shard.bytes:
            raise _truncated(place.name(shard.file), f"has {found[shard.file]} bytes", shard)
    used, first = np.unique(index.shard, return_index=True)
    for k in range(min(_SPOT_CHECKS, len(used))):
        row = first[k * len(used) // min(_SPOT_CHECKS, len(used))]
        part = JSON if index.sizes[row, JSON] >= 0 else PICTURE
        shard, offset = index.shards[index.shard[row]], int(index.offsets[row, part])
        try:
            header = tarfile.TarInfo.frombuf(place.read(shard.file, offset - 512, 512), "utf-8", "surrogateescape")
        except tarfile.TarError:
            header = None
        if header is None or header.size != index.sizes[row, part]:
            raise UserError(
                f"data: {place.name(shard.file)} is not the shard that its index was made of: no member of "
                f"{index.sizes[row, part]} bytes begins at byte {offset}; copy the shard again, or delete "
                f"{INDEX} and run `python launch/prepare_data.py index FOLDER`"
            )


def _truncated(name: str, found: str, shard: Shard) -> UserError:
    message = (
        f"data: {name} {found}; expected {shard.bytes} bytes with SHA-256 {shard.sha256[:16]}...: it is truncated or "
        f"another file; copy it again, or delete {INDEX} and run `python launch/prepare_data.py index FOLDER`"
    )
    return BadFile(name, f"{found}, not {shard.bytes} bytes: it is truncated or another file", message)


def _no_index(folder: Path | str, found: dict[str, int]) -> UserError:
    tars = [name for name in found if name.endswith(".tar")]
    if tars:
        return UserError(
            f"data: {folder} holds {len(tars)} .tar files and no {INDEX}; make one with "
            f"`python launch/prepare_data.py index {folder}`"
        )
    known = [] if is_url(folder) else sorted(p.parent.name for p in Path(folder).parent.glob(f"*/{INDEX}"))
    return UserError(
        f"data: there is no {folder}/{INDEX}; splits found: {', '.join(known) or 'none'}. Correct data.root, "
        "data.train_split or data.eval_splits, or make the shards (`python launch/prepare_data.py shards`)"
    )
