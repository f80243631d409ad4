"""The members of a .tar file with the places of their bytes, in one pass from front to back."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from wsss_dist.errors import UserError

# of these kinds of files the content is kept, up to this size: tags are small
_KEPT, _SMALL = (".json", ".cls"), 2**20


class Member(NamedTuple):
    """One file in a .tar: name, first byte, size in bytes, CRC-32, and its content where it may hold tags."""

    name: str
    offset: int
    size: int
    crc: int
    content: bytes | None


def scan_tar(file: IO[bytes], where: str) -> Iterator[Member]:
    """The plain files of an uncompressed .tar, in order.

    Args:
        file: open at its first byte; need not be able to seek.
        where: its name for messages.
    Raises:
        UserError: it is no plain .tar file, or it is truncated.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=2**20) as archive:
            for entry in archive:
                if not entry.isreg() or entry.issparse():
                    continue
                content = archive.extractfile(entry).read()
                kept = content if entry.name.lower().endswith(_KEPT) and entry.size <= _SMALL else None
                yield Member(entry.name.removeprefix("./"), entry.offset_data, entry.size, zlib.crc32(content), kept)
    except tarfile.TarError as error:
        raise UserError(
            f"prepare: {where} is no plain .tar file, or is truncated ({error}); copy it again; unpack a .tar.gz to a "
            ".tar: pictures are read by their places in the file"
        ) from None


class HashingReader:
    """An open file that is read once: what was read is counted and hashed. `rest()` reads to the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self.bytes, self._tail = 0, b""

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(size)
        self._sha256.update(part)
        self.bytes += len(part)
        self._tail = (self._tail + part[-1024:])[-1024:]
        return part

    def rest(self) -> str:
        """Hex SHA-256 of the whole file."""
        while self.read(2**20):
            pass
        return self._sha256.hexdigest()

    @property
    def ended(self) -> bool:
        """Do the bytes so far end as every whole .tar file does, in 1024 zeros?"""
        return self._tail == b"\0" * 1024
