"""A preparation that can be killed at any moment: whole files or none, and a journal of what is finished.

`<out>/.prepare` holds the lock, the journal and what is unpacked for the time of the preparation; it goes when the
preparation is complete. The journal has one line per finished item; a line that a kill cut off does not count.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsss_dist.errors import UserError
from wsss_dist.files import write_whole

_CHUNK = 16
Stamp = list[tuple[str, int, int]]


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """(path, bytes, time of the last change) of each of the files; -1 for one that is not there."""
    stamps = []
    for path in paths:
        try:
            found = path.stat()
            stamps.append((str(path), found.st_size, found.st_mtime_ns))
        except (OSError, ValueError):  # the latter: of a name that no file can have
            stamps.append((str(path), -1, -1))
    return stamps


class WorkFolder:
    """The folder `<out>/.prepare`, held by this process alone until `release`."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / ".prepare"
        # rows for problems.csv that are found on the way
        self.problems: list[tuple[str, str, str, str]] = []
        # the archives in use: name, bytes, time of the last change
        self.archives: Stamp = []
        self.path.mkdir(parents=True, exist_ok=True)
        # a POSIX lock belongs to one process: a worker that outlives it for a moment does not hold it
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock.close()
                raise UserError(f"prepare: another process is preparing {out}; wait for it, or stop it") from None
            # anything else: some network file systems have no locks
        self._journal = self.path / "journal.jsonl"

    def release(self) -> None:
        """Let others in; a folder in which nothing was begun goes."""
        if self.path.is_dir() and [entry.name for entry in self.path.iterdir()] == ["lock"]:
            self.remove()
            if not any(self.out.iterdir()):
                self.out.rmdir()
        self._lock.close()

    def remove(self) -> None:
        """The preparation is complete: remove what only served it."""
        shutil.rmtree(self.path)

    def is_marked(self, name: str, stamp: Stamp) -> bool:
        """Was step `name` finished with these input files?"""
        mark = self.path / f"{name}.done"
        return mark.is_file() and mark.read_text() == json.dumps(stamp)

    def mark(self, name: str, stamp: Stamp) -> None:
        write_whole(self.path / f"{name}.done", json.dumps(stamp).encode())

    def read_journal(self, settings: dict) -> dict[str, str]:
        """Key -> line of the finished items, none where they were finished with other settings."""
        first = json.dumps({"settings": settings}, sort_keys=True)
        lines: list[str] = []
        if self._journal.is_file():
            lines = self._journal.read_bytes().decode(errors="surrogateescape").split("\n")
        if len(lines) < 2 or lines[0] != first:
            write_whole(self._journal, (first + "\n").encode())
            return {}
        whole = lines[1:-1]  # what follows the last line break is empty, or cut off
        if lines[-1]:
            text = "".join(f"{line}\n" for line in lines[:-1])
            write_whole(self._journal, text.encode(errors="surrogateescape"))
        return {key: line for key, tab, line in (row.partition("\t") for row in whole) if tab}

    @contextmanager
    def journal(self) -> Iterator[Callable[[str, str], None]]:
        """Gives a function that adds a finished item: its key and its line."""
        # a file name need not be text
        with self._journal.open("a", encoding="utf-8", errors="surrogateescape") as file:

            def add(key: str, line: str) -> None:
                file.write(f"{key}\t{line}\n")
                file.flush()

            yield add


def finish_items(
    work: WorkFolder,
    settings: dict,
    items: dict[str, Any],
    function: Callable[[Any], dict],
    *,
    workers: int,
    track: Callable[[Iterable, int], Iterable],
) -> dict[str, str]:
    """Do what is left of `items` in several processes.

    Args:
        settings: what the results depend on besides the input files; a journal of others counts for nothing.
        items: key -> what `function` gets; an item that was finished with something else is done again.
        function: returns {"stamp": input files, "files": path below `out` -> record, ...} as JSON can hold it; runs in
            a forked process, so that what it reads from global variables is shared and not copied.
        track: wraps the results, of known number, with a progress display.
    Returns:
        key -> the result as a line of JSON, in the order of the keys.
    """
    lines = work.read_journal(settings)
    lines = {key: line for key, line in lines.items() if key in items and _holds(line, work.out, items[key])}
    todo = sorted(items.keys() - lines.keys())
    with work.journal() as add:
        results = in_processes(function, [items[key] for key in todo], workers)
        for key, result in zip(todo, track(results, len(todo)), strict=True):
            lines[key] = json.dumps({"item": repr(items[key]), **result}, separators=(",", ":"))
            add(key, lines[key])
    return {key: lines[key] for key in sorted(lines)}


def _holds(line: str, out: Path, item: Any) -> bool:
    """Was it this item that was finished, and are its input files as they were, and the files it wrote there?"""
    try:
        result = json.loads(line)
        if result["item"] != repr(item):
            return False
        if [tuple(s) for s in result["stamp"]] != stamp_of(Path(s[0]) for s in result["stamp"]):
            return False
        return all((out / name).stat().st_size == record["size"] for name, record in result["files"].items())
    except (ValueError, KeyError, TypeError, OSError):
        return False


def in_processes(function: Callable[[Any], Any], items: list, workers: int) -> Iterable:
    """function(item) for each item, in order, computed in `workers` forked processes; 0 computes in this one."""
    if workers == 0 or len(items) <= 1:
        return map(function, items)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (os.getpid(),))
    return _results(pool, pool.map(function, items, chunksize=_CHUNK), workers)


def _results(pool: ProcessPoolExecutor, results: Iterator, workers: int) -> Iterator:
    try:
        yield from results
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of the {workers} worker processes was killed, so memory may be short; lower --workers and "
            "start the same command again, which goes on from here"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
