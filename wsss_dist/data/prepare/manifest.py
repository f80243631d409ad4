"""What a prepared folder records of itself: manifest.json, problems.csv, and whether its files are still as they were.

manifest.json  about, settings and counts; then per file, sorted by path below the folder: sha256, size in bytes, and
               of a picture width and height in pixels and Pillow's mode, as stored
problems.csv   see wsss_dist/data/problems.py
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wsss_dist.data.decode import DamagedImage, Picture, inspect_image
from wsss_dist.data.problems import TABLE, Problem, write_problems
from wsss_dist.errors import UserError
from wsss_dist.files import whole_file

LEFT_OUT = "left out of the lists"
MISSING = "the file is missing"


def file_record(content: bytes) -> dict[str, Any]:
    """The manifest's record of a file with this content."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def picture_record(content: bytes, width: int, height: int, mode: str) -> dict[str, Any]:
    """The manifest's record of a picture with this content."""
    return {**file_record(content), "width": width, "height": height, "mode": mode}


def why_unreadable(error: OSError | ValueError) -> str:
    """The reason, for the table, why a file could not be read."""
    return MISSING if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)


def check_picture(path: Path, name: str) -> tuple[dict | None, Picture | None, list[Problem]]:
    """Read and decode one picture, once.

    Args:
        path: the file.
        name: its path below the prepared folder.
    Returns:
        the manifest's record (None: there is no such file), what it holds (None: it cannot be decoded), and problems.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter: of a name that no file can have
        return None, None, [(name, "error", why_unreadable(error), LEFT_OUT)]
    try:
        picture = inspect_image(path, content)
    except DamagedImage as error:
        return file_record(content), None, [(name, "error", error.reason, LEFT_OUT)]
    record = picture_record(content, picture.width, picture.height, picture.mode)
    return record, picture, [(name, "note", *remark) for remark in _remarks(picture)]


def _remarks(picture: Picture) -> Iterator[tuple[str, str]]:
    """(reason, effect) of what is unusual."""
    mode = picture.mode
    if mode.startswith("I"):
        yield f"16-bit grey (mode {mode})", "read as RGB, scaled to 8 bits"
    elif "A" in mode or mode in ("La", "RGBa"):
        yield f"with transparency (mode {mode})", "read as RGB, transparent pixels on black"
    elif mode not in ("RGB", "L"):
        yield f"mode {mode}", "read as RGB"
    if picture.orientation != 1:
        yield f"turned by EXIF (orientation {picture.orientation})", "read upright"
    if picture.frames > 1:
        yield f"{picture.frames} frames", "the first is read"


def gather(results: dict[str, str], problems: Iterable[Problem]) -> tuple[dict[str, str], set[str], list[Problem]]:
    """What `finish_items` found, put together; `results` is emptied, to have its memory back.

    Returns:
        path -> record as JSON of all files; the keys of the items to leave out, and the paths of the given problems
        that leave one out; the problems, those given included.
    """
    files, every = {}, list(problems)
    bad = {problem[0] for problem in every if _leaves_out(problem)}
    for key in list(results):
        result = json.loads(results.pop(key))
        found = [tuple(problem) for problem in result["problems"]]
        every += found
        if any(map(_leaves_out, found)):
            bad.add(key)
        files.update((name, json.dumps(record)) for name, record in result["files"].items())
    return files, bad, every


def _leaves_out(problem: Problem) -> bool:
    return problem[1] == "error" and problem[3] == LEFT_OUT


def settle_problems(
    out: Path,
    problems: list[Problem],
    on_problem: str,
    say: Callable[[str], None],
    otherwise: str = "leave them out of the lists",
) -> None:
    """Write problems.csv and say what is in it.

    Args:
        otherwise: for the message, what "continue" does with the files.
    Raises:
        UserError: there are errors, and `on_problem` is "stop".
    """
    table = out / TABLE
    write_problems(table, problems)
    errors = sorted({problem for problem in problems if problem[1] == "error"})
    notes = Counter(reason.split(" (")[0] for _, kind, reason, _ in set(problems) if kind == "note")
    if notes:
        listed = ", ".join(f"{count:,} x {reason}" for reason, count in notes.most_common(5))
        say(f"{notes.total():,} remarks in {table}: {listed}{', ...' if len(notes) > 5 else ''}")
    if not errors:
        return
    first = f"{errors[0][0]}: {errors[0][2]}"
    if on_problem == "stop":
        raise UserError(
            f"prepare: {len(errors):,} files cannot be used (first: {first}); {table} names them all. "
            "Repair them and start the same command again, which goes on from here, or add --on-problem continue to "
            f"{otherwise}"
        )
    say(f"{len(errors):,} files cannot be used (first: {first}); see {table}")


def write_manifest(out: Path, head: dict[str, Any], files: dict[str, str]) -> None:
    """Write manifest.json: `head`, then `files` (path -> record as JSON) sorted, a line each."""
    with whole_file(out / "manifest.json") as partial, partial.open("w") as file:
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "files": {\n')
        file.write(",\n".join(f"  {json.dumps(name)}: {files[name]}" for name in sorted(files)))
        file.write("\n }\n}\n")
