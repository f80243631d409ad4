"""Byte ranges of files in a folder, or at an address that fsspec knows (s3://, gs://, https://, memory://, file://)."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from wsss_dist.data.config import is_url
from wsss_dist.errors import BadFile, UserError

# open files of each process
MAX_HANDLES = 128
# seconds before a request to a remote place is made again
PAUSES = (0.2, 1.0, 4.0)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Place(Protocol):
    """Where files lie. Every method raises a UserError that names the file and what to do."""

    def name(self, file: str) -> str:
        """The file, as messages name it."""

    def sizes(self, files: list[str]) -> dict[str, int]:
        """Size in bytes of each file that is there, those of `files` surely among them if they are."""

    def whole(self, file: str) -> bytes:
        """All of a small file."""

    def read(self, file: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the file ends."""

    def copy(self, file: str, into: IO[bytes]) -> None:
        """Write all of a file into an open one."""

    def stream(self, file: str) -> IO[bytes]:
        """A file, open at its first byte, to be read once from front to back."""


def open_place(root: Path | str) -> Place:
    """The folder, or the address, `root`."""
    return RemoteFolder(str(root)) if is_url(root) else LocalFolder(Path(root))


class Handles:
    """Open files by name, at most `most`, the least recently used closed first.

    A forked process may use those of its parent: os.pread has no position that they would share.
    """

    def __init__(self, most: int = MAX_HANDLES) -> None:
        self._most, self._open = most, OrderedDict()

    def get(self, name: str) -> int | None:
        if name in self._open:
            self._open.move_to_end(name)
        return self._open.get(name)

    def put(self, name: str, handle: int) -> int:
        self._open[name] = handle
        if len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def drop(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name))

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most, "_open": OrderedDict()}


class LocalFolder:
    """Files of a folder on a disk or a network drive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles = Handles()

    def name(self, file: str) -> str:
        return str(self.folder / file)

    def sizes(self, files: list[str]) -> dict[str, int]:
        try:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise UserError(
                f"data: the folder {self.folder} of the shards cannot be read ({error.strerror}); correct data.root"
            ) from None

    def whole(self, file: str) -> bytes:
        try:
            return (self.folder / file).read_bytes()
        except OSError as error:
            raise self._mistake(file, error) from None

    def read(self, file: str, offset: int, size: int) -> bytes:
        try:
            handle = self._handles.get(file)
            if handle is None:
                handle = self._handles.put(file, os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC))
            return pread(handle, offset, size)
        except OSError as error:
            raise self._mistake(file, error) from None

    def copy(self, file: str, into: IO[bytes]) -> None:
        with self.stream(file) as source:
            shutil.copyfileobj(source, into, 2**22)

    def stream(self, file: str) -> IO[bytes]:
        try:
            return (self.folder / file).open("rb")
        except OSError as error:
            raise self._mistake(file, error) from None

    def _mistake(self, file: str, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return missing(self.name(file))
        return UserError(
            f"data: {self.name(file)} cannot be read ({error.strerror}); check the disk and the access rights, or copy "
            "the file again"
        )


def pread(handle: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset` on; fewer where the file ends."""
    parts = []
    while size > 0 and (part := os.pread(handle, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class RemoteFolder:
    """Files below an address; a request that fails is made again, three times."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def sizes(self, files: list[str]) -> dict[str, int]:
        found = self._ask("", _listed)
        for file in files:
            # not every server lists its folders
            if found.get(file) is None and (size := self._ask(file, _size)) is not None:
                found[file] = size
        return found

    def whole(self, file: str) -> bytes:
        return self._ask(file, lambda fs, path: fs.cat_file(path))

    def read(self, file: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        return self._ask(file, lambda fs, path: fs.cat_file(path, start=offset, end=offset + size))

    def copy(self, file: str, into: IO[bytes]) -> None:
        def fetched(fs: Any, path: str) -> None:
            into.seek(0)
            with _opened(fs, path) as source:
                shutil.copyfileobj(source, into, 2**22)

        self._ask(file, fetched)

    def stream(self, file: str) -> IO[bytes]:
        return self._ask(file, _opened)

    def _ask(self, file: str, request: Callable[[Any, str], Any]) -> Any:
        for pause in (*PAUSES, None):
            # asked for each time: fsspec keeps one object a process, for a connection does not outlive a fork
            fs, path = _file_system(self.url)
            try:
                return request(fs, f"{path.rstrip('/')}/{file}" if file else path)
            except FileNotFoundError:
                raise missing(self.name(file)) from None
            except UserError:
                raise
            except Exception as error:  # each kind of storage raises its own kinds
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise  # it is the disk that `copy` writes to
                if pause is None or isinstance(error, PermissionError):
                    raise _unreachable(self.name(file), error) from None
                time.sleep(pause)


def _opened(fs: Any, path: str) -> IO[bytes]:
    return fs.open(path, "rb", block_size=2**24, cache_type="readahead")


def _listed(fs: Any, path: str) -> dict[str, int]:
    try:
        return {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in fs.ls(path, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _size(fs: Any, path: str) -> int | None:
    try:
        return fs.size(path)
    except FileNotFoundError:
        return None


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise UserError(
            f"data: reading {url} needs the package fsspec, which is not installed; run `pip install -e '.[remote]'`, "
            "or copy the shards to a disk"
        ) from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"data: reading {url} needs one more package ({error}); install it (for s3:// s3fs, for gs:// gcsfs), or "
            "copy the shards to a disk"
        ) from None
    except ValueError as error:
        raise UserError(f"data: {url} is no address that fsspec knows ({error}); correct data.root") from None
    except Exception as error:
        raise _unreachable(url, error) from None


def _unreachable(name: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return UserError(
        f"data: {name} cannot be reached ({reason}); check data.root, the network and your credentials, or copy the "
        "shards to a disk"
    )


def missing(name: str) -> UserError:
    """The mistake that a file of a set of shards is not there."""
    message = (
        f"data: {name} is missing; copy it there from where the shards were made, correct data.root, or make the "
        "shards again (`python launch/prepare_data.py shards`)"
    )
    return BadFile(name, "the file is missing", message)
