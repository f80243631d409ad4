"""What a prepared folder records of itself: manifest.json, problems.csv, and whether its files are still as they were.

manifest.json  about, settings and counts; then per file, sorted by path below the folder: sha256, size in bytes, and
               of a picture width and height in pixels and Pillow's mode, as stored
problems.csv   path, kind, reason, effect; sorted. Kind "error": the file cannot be used. Kind "note": it is
               unusual, and the effect says how the loader (wsss_dist/data/decode.py) reads it
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wsss_dist.data.decode import DamagedImage, Picture, inspect_image
from wsss_dist.data.prepare.fetch import sha256_of
from wsss_dist.data.prepare.work import in_processes
from wsss_dist.errors import UserError
from wsss_dist.files import whole_file, write_whole

Problem = tuple[str, str, str, str]
LEFT_OUT = "left out of the lists"
_COLUMNS = ("path", "kind", "reason", "effect")


def file_record(content: bytes) -> dict[str, Any]:
    """The manifest's record of a file with this content."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def picture_record(content: bytes, width: int, height: int, mode: str) -> dict[str, Any]:
    """The manifest's record of a picture with this content."""
    return {**file_record(content), "width": width, "height": height, "mode": mode}


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
    except OSError as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        return None, None, [(name, "error", reason, LEFT_OUT)]
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


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems.csv: sorted, each once; without one it has the header alone."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    rows.writerows(sorted(set(problems)))
    write_whole(path, text.getvalue().encode())


def has_problems_table(out: Path) -> bool:
    """Is there a problems.csv of ours? It outlives a manifest that is removed to have everything made again."""
    path = out / "problems.csv"
    return path.is_file() and path.read_bytes().startswith(",".join(_COLUMNS).encode() + b"\n")


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
    write_problems(out / "problems.csv", problems)
    errors = sorted({problem for problem in problems if problem[1] == "error"})
    notes = Counter(reason.split(" (")[0] for _, kind, reason, _ in set(problems) if kind == "note")
    if notes:
        listed = ", ".join(f"{count:,} x {reason}" for reason, count in notes.most_common(5))
        say(f"{notes.total():,} remarks in {out / 'problems.csv'}: {listed}{', ...' if len(notes) > 5 else ''}")
    if not errors:
        return
    first = f"{errors[0][0]}: {errors[0][2]}"
    if on_problem == "stop":
        raise UserError(
            f"prepare: {len(errors):,} files cannot be used (first: {first}); {out / 'problems.csv'} names them all. "
            "Repair them and start the same command again, which goes on from here, or add --on-problem continue to "
            f"{otherwise}"
        )
    say(f"{len(errors):,} files cannot be used (first: {first}); see {out / 'problems.csv'}")


def write_manifest(out: Path, head: dict[str, Any], files: dict[str, str]) -> None:
    """Write manifest.json: `head`, then `files` (path -> record as JSON) sorted, a line each."""
    with whole_file(out / "manifest.json") as partial, partial.open("w") as file:
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "files": {\n')
        file.write(",\n".join(f"  {json.dumps(name)}: {files[name]}" for name in sorted(files)))
        file.write("\n }\n}\n")


def is_complete(out: Path, settings: dict, verify: bool, workers: int, track, say: Callable[[str], None]) -> bool:
    """True where `out` holds the finished result of these settings, False where it is not finished.

    Args:
        verify: compare the sha256 of every file, not only its size.
    Raises:
        UserError: other settings, or files that are missing or changed.
    """
    path = out / "manifest.json"
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
        made, files = content["settings"], content["files"]
        sizes = {name: record["size"] for name, record in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"prepare: {path} is no manifest of this command; nothing is overwritten: move it away, or choose another "
            "--out"
        ) from None
    different = [f"{k} {made.get(k)!r} instead of {v!r}" for k, v in settings.items() if made.get(k) != v]
    if different:
        raise UserError(
            f"prepare: {out} was made with other settings ({'; '.join(different)}); remove {path} to make it again, or "
            "choose another --out"
        )
    wrong = [name for name, size in sizes.items() if not _has_size(out / name, size)]
    if verify and not wrong:
        jobs = [(out / name, record["sha256"]) for name, record in files.items()]
        good = track(in_processes(_is_unchanged, jobs, workers), len(jobs))
        wrong = [name for name, same in zip(files, good, strict=True) if not same]
    if wrong:
        raise UserError(
            f"prepare: {len(wrong):,} of {len(files):,} files in {out} are missing or changed since they were prepared "
            f"(first: {wrong[0]}); restore them, or remove {path} and start this command again"
        )
    how = "have their sha256" if verify else "are there in their size (--verify reads them all)"
    say(f"{out} is complete: {len(files):,} files {how}, nothing to do")
    return True


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _is_unchanged(job: tuple[Path, str]) -> bool:
    path, digest = job
    try:
        return sha256_of(path) == digest
    except OSError:
        return False
