"""Unpacks zip, tar and tar.gz archives of data sets: nothing lands outside the folder, nothing grows without limit.

A member is written beside its place and renamed, so a file under its name is whole. One that is there is kept if its
bytes are those of the archive: an unpacking that was killed goes on with the others, and a file that was damaged since
is written again. An archive with a name that leads out of the folder, or with a link or
a device among the wanted members, is refused: the official ones have none, so it is not what it claims to be.
"""

from __future__ import annotations

import errno
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wsss_dist.errors import BadFile, UserError
from wsss_dist.files import whole_file

MAX_MEMBERS = 1_000_000
# Pictures hardly shrink and annotations shrink by ten: an archive that grows more than this is no data set.
MAX_RATIO = 200
# Below so many bytes the ratio says nothing: small text and the padding of tar shrink a lot.
SMALL = 2**26
# The longest header that a tar may have; names are far shorter.
_MAX_HEADER = 2**20
_COPY = 2**20

Target = Callable[[str], Path | None]
# the last two: what zipfile says to positions, names and flags that cannot be
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Counts:
    """What an unpacking did: members written, and members that were there already."""

    written: int
    kept: int


class DamagedArchive(BadFile):
    """An archive that is truncated or damaged; what was unpacked of it before that place is good."""


def unpack_archive(
    path: Path, target: Target, say: Callable[[str], None], skipped: Callable[[str, str], None] | None = None
) -> Counts:
    """Unpack the wanted regular files of an archive.

    Args:
        path: a zip, a tar or a tar.gz; the content decides, not the name.
        target: path of a member in the archive -> where to write it, or None to leave it out.
        say: prints one line.
        skipped: is told name and reason of a member of a zip that is damaged, and the others are unpacked all the
            same; None: that is an error.
    Raises:
        DamagedArchive: no archive, truncated or damaged.
        BadFile: a member that would leave the folder or is no regular file, a name that comes twice, or more bytes
            than MAX_RATIO times the archive.
        UserError: more bytes than the disk has free.
    """
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        say(f"unpacking {path} ({path.stat().st_size:,} bytes)")
        try:
            if head[:2] == b"PK":
                return _unpack_zip(path, file, target, skipped)
            return _unpack_tar(path, file, head[:2] == b"\x1f\x8b", target)
        except UserError:
            raise
        except _DAMAGE as error:
            raise _broken(path, str(error)) from None
        except OSError as error:
            if error.errno is None:  # gzip's own, not the disk's
                raise _broken(path, str(error)) from None
            if error.errno == errno.ENAMETOOLONG:
                raise _refused(path, Path(error.filename).name, "a name too long for the disk") from None
            raise


def member_path(name: str, archive: Path) -> str:
    """The path of a member as below a folder. Raises UserError for one that could leave it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    absolute = name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":")
    if absolute or ".." in parts or "\\" in name or "\0" in name or not parts:
        raise _refused(archive, name, "which leads out of the folder to unpack to")
    return "/".join(parts)


def _broken(path: Path, reason: str) -> DamagedArchive:
    what = f"truncated or damaged ({reason or 'no more data'})"
    message = (
        f"prepare: {path} ({path.stat().st_size:,} bytes) is {what}; download it again, `wget -c` goes on where a "
        "download stopped, and start the same command again"
    )
    return DamagedArchive(path, what, message)


def _refused(archive: Path, name: str, why: str) -> BadFile:
    what = f"holds '{name[:200]}', {why}"
    message = (
        f"prepare: {archive} {what}; it is not the official archive and was not unpacked further: download it again "
        "from the official place"
    )
    return BadFile(archive, what, message)


def of_macos(name: str) -> bool:
    """Is it what macOS adds to folders and archives of others: `._<file>`, or anything below __MACOSX?"""
    parts = name.split("/")
    return parts[-1].startswith("._") or "__MACOSX" in parts


def archive_in(sources: Iterable[Path], name: str) -> Path | None:
    """The archive of this file name that is, or lies in, one of the sources."""
    packed = (path for source in sources for path in (source / name, source) if path.name == name)
    return next((path for path in packed if path.is_file()), None)


class _Budget:
    """Counts what an archive unpacks to, before it is written."""

    def __init__(self, archive: Path, folder_of: Target) -> None:
        self.archive, self.target = archive, folder_of
        self.limit = max(SMALL, MAX_RATIO * archive.stat().st_size)
        self.bytes = self.members = 0
        self.seen: set[str] = set()

    def admit(self, name: str, size: int, special: str | None) -> Path | None:
        """Where member `name` of `size` bytes goes; None for nowhere. `special` says why a member cannot be written."""
        clean = member_path(name, self.archive)
        self.bytes += size
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise _refused(self.archive, name, f"which is one file more than the {MAX_MEMBERS:,} that are accepted")
        if size < 0 or self.bytes > self.limit:
            raise _refused(
                self.archive,
                name,
                f"with which it unpacks to {self.bytes:,} bytes, more than {MAX_RATIO} times its size",
            )
        place = None if of_macos(clean) else self.target(clean)
        if place is not None and special is not None:
            raise _refused(self.archive, name, special)
        if place is not None and clean in self.seen:
            raise _refused(self.archive, name, "which it holds twice")
        self.seen.add(clean)
        return place


def _unpack_zip(path: Path, file: IO[bytes], target: Target, skipped: Callable[[str, str], None] | None) -> Counts:
    with zipfile.ZipFile(file) as archive:
        members, budget, wanted = archive.infolist(), _Budget(path, target), []
        for member in members:
            if member.is_dir():
                member_path(member.filename, path)
                continue
            place = budget.admit(member.filename, member.file_size, _special(member))
            if place is not None:
                wanted.append((member, place))
        if sum(m.compress_size for m in members) > path.stat().st_size:
            raise _refused(path, members[-1].filename, "which lies on top of another file")
        todo = [(member, place) for member, place in wanted if not _has_content(place, member)]
        _check_space(path, [(place, member.file_size) for member, place in todo])
        written = 0
        for member, place in todo:
            try:
                with archive.open(member) as source:
                    _write(source, member.file_size, place, path)
                written += 1
            except (*_DAMAGE, DamagedArchive) as error:
                if skipped is None:
                    raise
                skipped(member.filename, error.reason if isinstance(error, DamagedArchive) else str(error))
        return Counts(written, len(wanted) - len(todo))


def _special(member: zipfile.ZipInfo) -> str | None:
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "which is a link or a device"
    if member.flag_bits & 1:
        return "which is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "which is neither stored nor deflated"
    return None


def _unpack_tar(path: Path, file: IO[bytes], packed: bool, target: Target) -> Counts:
    import gzip

    stream = _Watched(gzip.GzipFile(fileobj=file) if packed else file, path)
    budget, written, kept = _Budget(path, target), 0, 0
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in _members(archive):
            if member.isdir():
                member_path(member.name, path)
                continue
            plain = member.isreg() and not member.issparse()
            special = None if plain else "which is a link, a device or a sparse file"
            place = budget.admit(member.name, member.size, special)
            if place is None:
                continue
            if _write(archive.extractfile(member), member.size, place, path):
                written += 1
            else:
                kept += 1
    # tarfile takes a stop between two members, and a broken header, for the end
    if stream.last.strip(b"\0") or len(stream.last) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end mark")
    while stream.read(_COPY):  # to the checksum of gzip
        pass
    return Counts(written, kept)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in turn; tarfile itself would keep every one in memory."""
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()


class _Watched:
    """A file for tarfile that remembers the last block it gave out, and gives out no more than a header at a time."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.last = file, path, b""
        self._bytes, self._limit = 0, max(2 * SMALL, 2 * MAX_RATIO * path.stat().st_size)

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        self.last = self.file.read(count)
        return self.last

    def seek(self, position: int, whence: int = 0) -> int:
        if position > self._limit:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size")
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()


def _has_content(place: Path, member: zipfile.ZipInfo) -> bool:
    """Is there a file with the size and the checksum of a member of a zip?"""
    if not _has_size(place, member.file_size):
        return False
    checksum = 0
    with place.open("rb") as file:
        while block := file.read(_COPY):
            checksum = zlib.crc32(block, checksum)
    return checksum == member.CRC


def _has_size(place: Path, size: int) -> bool:
    try:
        found = place.stat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _check_space(archive: Path, files: list[tuple[Path, int]]) -> None:
    if not files:
        return
    folder = files[0][0].parent
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(size for _, size in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"prepare: {archive} needs {needed:,} bytes more to unpack, and {free:,} are free on the disk of {folder}; "
            "free space, or choose another --out, and start the same command again"
        )


def _write(source: IO[bytes], size: int, place: Path, archive: Path) -> bool:
    """Write a member, unless a file of the same bytes is there; whether it was written."""
    blocks, same, other = _blocks(source, size, place, archive), 0, b""
    if _has_size(place, size):
        with place.open("rb") as there:
            for block in blocks:
                if there.read(len(block)) != block:
                    other = block
                    break
                same += len(block)
            else:
                return False
    _check_space(archive, [(place, size)])
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(place) as partial, partial.open("wb") as out:
        # a tar.gz that goes back is unpacked from its beginning, so what was compared comes from the file
        if same:
            with place.open("rb") as there:
                for at in range(0, same, _COPY):
                    out.write(there.read(min(_COPY, same - at)))
        out.write(other)
        out.writelines(blocks)
    return True


def _blocks(source: IO[bytes], size: int, place: Path, archive: Path) -> Iterator[bytes]:
    """The `size` bytes of a member, piece by piece."""
    while size > 0 and (block := source.read(min(_COPY, size))):
        yield block
        size -= len(block)
    if size:
        raise _broken(archive, f"{place.name} lacks {size:,} of the bytes that it declares")
