"""Files that are there whole or not at all, however the process that writes them ends."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST_NAME = 255  # bytes, on every file system in use


@contextmanager
def whole_file(path: Path, *, contested: bool = False, durable: bool = False) -> Iterator[Path]:
    """The path to write instead of `path`, which it becomes at the end of the block; it goes where the block fails.

    Args:
        path: in a folder that is there.
        contested: several processes may write this file at once; each gets a path of its own. Otherwise it is always
            the same one, so that what a kill left of it is overwritten by the next attempt.
        durable: on the disk before it gets its name, so that not even a power cut leaves a part of it under that name.
    """
    partial = path.with_name(_partial_name(path.name, f".{os.getpid()}.partial" if contested else ".partial"))
    try:
        yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str, *, contested: bool = False, durable: bool = False) -> None:
    """Write a file (text as UTF-8); see `whole_file`."""
    with whole_file(path, contested=contested, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _partial_name(name: str, ending: str) -> str:
    """`.<name><ending>`; of a name that leaves no room for them, as much as fits with a digest of all of it."""
    if len(os.fsencode(name)) + len(ending) + 1 <= _LONGEST_NAME:
        return f".{name}{ending}"
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    kept = os.fsencode(name)[: _LONGEST_NAME - len(ending) - len(digest) - 2].decode("utf-8", "ignore")
    return f".{kept}.{digest}{ending}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time is inside with this folder; where the file system has no locks, any number."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            pass
        yield
    finally:
        os.close(handle)
