"""problems.csv, the summary that every command writes of the files it could not use, and the key data.leave_out.

    path, kind, reason, effect        a row each, sorted

Kind "error": the file cannot be used. Kind "note": it is unusual, and the effect says how it is read. Paths are
absolute, or relative to the folder of the table.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from wsss_dist.errors import BadFile, UserError
from wsss_dist.files import locked, write_whole

Problem = tuple[str, str, str, str]
TABLE = "problems.csv"
_LONGEST = 4096
COLUMNS = ("path", "kind", "reason", "effect")
# effects: of a file in training, of one at which a command ended, of one in a list that is its owner's
REPLACED = "another image took its place"
STOPPED = "the command stopped here"
STAYS = "stays in the list: training replaces it, an evaluation stops there"


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write the table: sorted, each row once; without any it has the header alone."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    # the reason may quote a damaged file, and a reader of CSV takes no cell of any length
    rows.writerows(sorted({tuple(cell[:_LONGEST] for cell in problem) for problem in problems}))
    # a name that is no text stays legible, and a NUL would end the table for its reader
    write_whole(path, text.getvalue().replace("\0", "\\x00").encode("utf-8", "backslashreplace"), contested=True)


def read_problems(path: Path) -> list[Problem]:
    """The rows of a table. Raises UserError where it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        if tuple(head) == COLUMNS and all(len(row) == len(COLUMNS) for row in rows):
            return [tuple(row) for row in rows]
        reason = f"its first line is '{','.join(head)[:60]}'"
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error)
    raise UserError(
        f"data: {path} is no table of problems ({reason}); expected the problems.csv of prepare_data.py, of its "
        "`check` or `verify`, or of a run, with the columns path, kind, reason, effect"
    )


def is_problems_table(path: Path) -> bool:
    """Is there such a table?"""
    return path.is_file() and path.read_bytes().startswith(",".join(COLUMNS).encode() + b"\n")


def problems_of(error: BadFile, effect: str) -> list[Problem]:
    """The rows of an error about files of the input."""
    return [(path, "error", reason, effect) for path, reason in error.rows]


def start_problems(path: Path, keep: bool) -> None:
    """Begin the table of a run; with `keep`, of one that goes on, the images replaced so far stay in it."""
    rows = read_problems(path) if keep and is_problems_table(path) else []
    write_problems(path, [row for row in rows if row[3] == REPLACED])


def add_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Add rows to a table, which other ranks may do at the same time; paths become absolute."""
    with locked(path.parent):
        rows = read_problems(path) if is_problems_table(path) else []
        write_problems(path, [*rows, *((_absolute(place), *rest) for place, *rest in problems)])


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """The files of a BadFile that is raised inside are added to `folder`/problems.csv, where there is that folder.

    A table that cannot be added to is left as it is, and the error says so.
    """
    try:
        yield
    except BadFile as error:
        if folder.is_dir():
            try:
                add_problems(folder / TABLE, problems_of(error, STOPPED))
            except (UserError, OSError) as reason:  # what stopped the command is what the user has to know
                error.message = f"{error.message} [not noted in {folder / TABLE}: {reason}]"
        raise


class LeftOut:
    """Files that data.leave_out takes out of the splits: `path in left_out`.

    Args:
        table: the problems.csv whose errors they are; None: none.
    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, table: Path | None = None) -> None:
        self._files: set[str] = set()
        if table is not None:
            folder = str(table.parent)
            errors = (row[0] for row in read_problems(table) if row[1] == "error" and row[0])
            self._files = {name for path in errors for name in {path, _resolved(os.path.join(folder, path))}}

    def __bool__(self) -> bool:
        return bool(self._files)

    def __contains__(self, path: Path | str) -> bool:
        return bool(self._files) and (str(path) in self._files or _resolved(str(path)) in self._files)


def _resolved(path: str) -> str:
    """The path with its folder as it is on the disk; a link to a single file stays one."""
    folder, leaf = os.path.split(path)
    return os.path.join(_real_folder(folder), leaf)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
