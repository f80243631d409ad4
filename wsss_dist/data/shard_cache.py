"""Whole shards on the node's own disk, shared by the workers and ranks of the node.

    DIR/<sha256>.tar    a shard that was copied and has that checksum; the file times say which was used last
    DIR/<sha256>.part   a copy under way: its writer holds a lock on it, so one without a lock is left from a crash
    DIR/lock            held while bytes are counted and room is made

Whoever first needs a shard copies it; others read their byte ranges from the origin until the copy is whole. What does
not fit takes the place of the shards that were used least recently, but never of those that a running process has open:
samples come in random order, so shards of one run that push each other out would be copied for every image. What finds
no room is read from the origin.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsss_dist.data.shard_files import DISK_FULL, Handles, Place, pread
from wsss_dist.data.shard_index import Shard
from wsss_dist.errors import UserError

# seconds until room is looked for again
_WAIT = 60.0


class ShardCache:
    """At most `most` bytes of shards in `folder`. One object serves the processes that are forked from its own."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._handles = Handles(most=256)
        self._no_room: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError as error:
            raise self._mistake(error) from None

    def read(self, shard: Shard, offset: int, size: int, place: Place) -> bytes | None:
        """A byte range of a shard, which is copied first if need be; None where it has to be read from `place`.

        Raises:
            UserError: the shard is missing or another one than the index says, or the folder cannot be written.
        """
        handle = self._handles.get(shard.sha256)
        if handle is None:
            try:
                handle = self._opened(shard)
                if handle is None:
                    handle = self._copied(shard, place)
            except OSError as error:
                raise self._mistake(error) from None
            if handle is None:
                return None
            self._handles.put(shard.sha256, handle)
        return pread(handle, offset, size)

    def forget(self, shard: Shard) -> None:
        """Delete a shard whose copy turned out to be damaged."""
        self._handles.drop(shard.sha256)
        self._tar(shard).unlink(missing_ok=True)

    def _tar(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _opened(self, shard: Shard) -> int | None:
        """The whole copy, which stays while its handle is open; None where there is none."""
        handle = _open(self._tar(shard), os.O_RDONLY)
        if handle is None:
            return None
        # a shared lock keeps the file; who holds the other kind is about to delete it
        if _locked(handle, fcntl.LOCK_SH, self._tar(shard)) and os.fstat(handle).st_size == shard.bytes:
            os.utime(handle)
            return handle
        os.close(handle)
        return None

    def _copied(self, shard: Shard, place: Place) -> int | None:
        """Copy a shard; None where another process does so at the moment, or where there is no room."""
        if time.monotonic() < self._no_room.get(shard.sha256, 0.0):
            return None
        part = self._tar(shard).with_suffix(".part")
        handle = _open(part, os.O_RDWR | os.O_CREAT)
        try:
            if not _locked(handle, fcntl.LOCK_EX, part):
                os.close(handle)
                return None
            if self._tar(shard).exists():
                raise _NotNeeded  # another process was faster
            if not self._make_room(shard, handle):
                self._no_room[shard.sha256] = time.monotonic() + _WAIT
                raise _NotNeeded
            self._fill(shard, place, handle)
            with self._alone():  # who counts the bytes sees it under one of its names
                os.rename(part, self._tar(shard))
            fcntl.flock(handle, fcntl.LOCK_SH)
            return handle
        except _NotNeeded:
            part.unlink(missing_ok=True)
            os.close(handle)
            return None
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(handle)
            raise

    def _fill(self, shard: Shard, place: Place, handle: int) -> None:
        with os.fdopen(os.dup(handle), "r+b") as file:
            place.copy(shard.file, file)
            file.truncate()
            file.flush()
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"data: {place.name(shard.file)} has SHA-256 {found[:16]}...; its index says {shard.sha256[:16]}...: "
                "it is damaged or another one; copy it again, or delete shards.json and run "
                "`python launch/prepare_data.py index FOLDER`"
            )

    def _make_room(self, shard: Shard, handle: int) -> bool:
        """Reserve the bytes of a shard for the open copy; False where shards in use leave no room."""
        with self._alone():
            used, kept = 0, []
            for path in self._folder.iterdir():
                if path.suffix not in (".tar", ".part") or path.stem == shard.sha256:
                    continue
                with suppress(FileNotFoundError):
                    state = path.stat()
                    if path.suffix == ".tar":
                        kept.append((state.st_mtime_ns, state.st_size, path))
                    elif _delete_unlocked(path):
                        continue
                    used += state.st_size
            for _, size, path in sorted(kept):
                if used + shard.bytes <= self._most:
                    break
                if shard.bytes <= self._most and _delete_unlocked(path):
                    used -= size
            if used + shard.bytes > self._most:
                return False
            os.ftruncate(handle, shard.bytes)
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _mistake(self, error: OSError) -> UserError:
        fix = "free space or lower data.cache.gb" if error.errno in DISK_FULL else "give yourself access"
        return UserError(
            f"data: data.cache.dir is '{self._folder}', which cannot be used ({error.strerror}); {fix}, name another "
            "folder, or leave data.cache out"
        )


class _NotNeeded(Exception):
    """Leave the copy that was begun."""


def _open(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None


def _locked(handle: int, kind: int, path: Path) -> bool:
    """Take a lock without waiting; False where it is taken, or `path` is another file by now."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _delete_unlocked(path: Path) -> bool:
    """Delete a file that no process has locked; True where it is gone."""
    handle = _open(path, os.O_RDONLY)
    if handle is None:
        return True
    try:
        if not _locked(handle, fcntl.LOCK_EX, path):
            return False
        path.unlink()
        return True
    finally:
        os.close(handle)
