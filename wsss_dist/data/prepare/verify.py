"""Are the files of a prepared folder as they were? Its manifest, or the index of its shards, holds their SHA-256.

A damaged picture mostly still decodes, without any error, to other pixels: of these the checksum alone tells. What is
missing or changed goes into one table, `verify.csv` in the folder (columns of wsss_dist/data/problems.py).
"""

from __future__ import annotations

import errno
import json
import stat
import tempfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wsss_dist.data.decode import DamagedImage, read_image
from wsss_dist.data.prepare.archives import archive_in
from wsss_dist.data.prepare.fetch import sha256_of
from wsss_dist.data.prepare.work import in_processes, stamp_of
from wsss_dist.data.problems import STAYS, Problem, write_problems
from wsss_dist.data.shard_index import INDEX, MASK, PICTURE, SAMPLES, parse_index, picture_member
from wsss_dist.errors import UserError

if TYPE_CHECKING:
    from wsss_dist.data.prepare.inputs import Console, Options

REPORT, MANIFEST = "verify.csv", "manifest.json"
AS_IT_IS = "read as it is"
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class _File(NamedTuple):
    """A file of a manifest: its folder, its path below it, what is recorded of it, and whether to read it."""

    root: Path
    name: str
    record: dict[str, Any]
    read: bool


class _Shard(NamedTuple):
    """A shard, its SHA-256, and of its members name, first byte, size and CRC-32; `shown` is its path for the table."""

    path: Path
    shown: str
    sha256: str
    members: list[tuple[str, int, int, int]]


def verify(root: Path, report: Path | None, workers: int, console: Console) -> None:
    """Compare the SHA-256 of every file of a prepared folder, or of its shards, and write the table.

    Args:
        root: a folder with a manifest.json or a shards.json, or with splits that have a shards.json.
        report: the table; None: verify.csv in `root`.
    Raises:
        UserError: `root` is no such folder, the table cannot be written, or files are missing or changed, which it
            names.
    """
    if workers < 0:
        raise UserError(f"prepare: --workers is {workers}; expected 0 (this process alone) or more")
    report = report or root / REPORT
    files = _listed(root)
    shards = list(chain.from_iterable(_shards(index.parent, root) for index in _indexes(root)))
    if not files and not shards:
        raise UserError(
            f"prepare: '{root}' has no {MANIFEST} with checksums and no {INDEX}; name a folder that prepare_data.py "
            "made, or check what the loader reads of another one with `python launch/prepare_data.py check`"
        )
    check_report(report)
    jobs = [_File(root, name, record, True) for name, record in files.items()]
    results = chain(in_processes(_of_file, jobs, workers), in_processes(_of_shard, shards, workers))
    total = len(jobs) + len(shards)
    problems = list(chain.from_iterable(console.track(results, total)))
    write_problems(report, problems)
    if problems:
        raise _changed(root, report, problems, total, f"train and evaluate without them: --set data.leave_out={report}")
    console.say(f"{root}: {total:,} files have their sha256")


def check_report(report: Path) -> None:
    """Hold that a table can be written, before hours of reading. Raises UserError."""
    try:
        if report.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        raise UserError(
            f"prepare: the table cannot be written to {report} ({error.strerror}); give a file of a folder that is "
            "there, and that you may write to, with --report"
        ) from None


def is_complete(options: Options, settings: dict, console: Console) -> bool:
    """True where `options.out` holds the finished result of these settings, False where it is not finished.

    One that leaves files out is finished for `on_problem` "continue" alone, and until its archives change.

    Raises:
        UserError: other settings, or files that are missing or changed, which verify.csv names.
    """
    out, read, workers, say = options.out, options.verify, options.workers, console.say
    path = out / MANIFEST
    if not path.is_file():
        return False
    content, files = _read(path)
    made = content.get("settings")
    if not isinstance(made, dict) or not all("size" in record for record in files.values()):
        raise _no_manifest(path)
    if not isinstance(content.get("unusable", {}), dict):
        raise _no_manifest(path)
    different = [f"{k} {made.get(k)!r} instead of {v!r}" for k, v in settings.items() if made.get(k) != v]
    if different:
        raise UserError(
            f"prepare: {out} was made with other settings ({'; '.join(different)}); remove {path} to make it again, or "
            "choose another --out"
        )
    jobs = [_File(out, name, record, read) for name, record in files.items()]
    results = console.track(in_processes(_of_file, jobs, workers), len(jobs)) if read else map(_of_file, jobs)
    problems = list(chain.from_iterable(results))
    if problems:
        write_problems(out / REPORT, problems)
        again = (
            f"remove {path} and start this command again, which unpacks anew what is not as in its archive and takes "
            "other files as they are"
        )
        raise _changed(out, out / REPORT, problems, len(files), again)
    if _has_unusable(content) and (options.on_problem == "stop" or _is_repaired(content, options)):
        say(f"{out} was made without some files that could not be used; it is made again of what is there now")
        return False
    if read:
        (out / REPORT).unlink(missing_ok=True)  # what it named is restored
    how = "have their sha256" if read else "are there in their size (--verify reads them all)"
    say(f"{out} is complete: {len(files):,} files {how}, nothing to do")
    return True


def unusable(out: Path, problems: Iterable[Problem], archives: list) -> dict[str, Any]:
    """For the manifest, where files could not be used: what would have it made again once it is repaired.

    Args:
        problems: of the preparation.
        archives: name, bytes and time of the last change of each one in use.
    """
    wrong = sorted({path for path, kind, *_ in problems if kind == "error"})
    missing = [path for path in wrong if not Path(path).is_absolute() and not _is_there(out / path)]
    return {"unusable": {"files": len(wrong), "missing": missing, "archives": archives}} if wrong else {}


def _has_unusable(content: dict) -> bool:
    return bool(content.get("unusable") or content.get("left_out"))  # older manifests have the latter alone


def _is_repaired(content: dict, options: Options) -> bool:
    """Is a file there that was missing, or an archive another one than it was?"""
    then = content.get("unusable") or {}
    if any(_is_there(options.out / path) for path in then.get("missing", [])):
        return True
    for name, *stamp in then.get("archives", []):
        archive = archive_in(options.sources, name)
        if archive is not None and list(stamp_of([archive])[0][1:]) != stamp:
            return True
    return False


def _is_there(path: Path) -> bool:
    return stamp_of([path])[0][1] >= 0


def _changed(root: Path, report: Path, problems: Iterable[Problem], total: int, otherwise: str) -> UserError:
    first = min(path for path, *_ in problems)
    paths = len({path for path, *_ in problems})
    return UserError(
        f"prepare: {paths:,} of {total:,} files in {root} are missing or changed since they were prepared "
        f"(first: {first}); restore them, or {otherwise}; {report} names them all"
    )


# ------------------------------------------------------------------------------------------------------- a manifest


def _listed(root: Path) -> dict[str, dict]:
    path = root / MANIFEST
    return _read(path)[1] if path.is_file() else {}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict]]:
    """A manifest, and path -> record of its files; of some the record is the sha256 alone."""
    try:
        content = json.loads(path.read_bytes())
        # that of the weights is nothing but files, that of shards has none
        files = content["files"] if "files" in content else {k: v for k, v in content.items() if isinstance(v, dict)}
        files = {name: record if isinstance(record, dict) else {"sha256": record} for name, record in files.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise _no_manifest(path) from None
    whole = all(
        isinstance(record.get("sha256"), str) and isinstance(record.get("size", 0), int) for record in files.values()
    )
    if not whole:
        raise _no_manifest(path)
    return content, files


def _no_manifest(path: Path) -> UserError:
    return UserError(
        f"prepare: {path} is no manifest of this command; nothing is overwritten: move it away, or choose another --out"
    )


def _of_file(job: _File) -> list[Problem]:
    """What is wrong with a file; runs in a worker."""
    path, record = job.root / job.name, job.record
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return [(job.name, "error", "it is no file", STAYS)]
        same = found.st_size == record.get("size", found.st_size)
        if same and not job.read:
            return []
        digest = sha256_of(path) if same else ""
    except (OSError, ValueError) as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
        return [(job.name, "error", reason, STAYS)]
    if digest == record["sha256"]:
        return []
    how = f"sha256 {digest[:12]}... instead of {record['sha256'][:12]}..."
    if not same:
        how = f"{found.st_size:,} bytes instead of {record['size']:,}"
    reason, effect = _decoded(path, f"changed since it was prepared ({how})")
    return [(job.name, "error", reason, effect)]


def _decoded(path: Path, reason: str) -> tuple[str, str]:
    """Reason and effect, with what a decoder finds in a changed file."""
    if path.suffix.lower() not in _PICTURES:
        return reason, AS_IT_IS
    try:
        read_image(path)
    except DamagedImage as error:
        return f"{reason}; {error.reason}", STAYS
    return f"{reason}; it decodes without an error", AS_IT_IS


# ------------------------------------------------------------------------------------------------------------ shards


def _indexes(root: Path) -> list[Path]:
    return [root / INDEX] if (root / INDEX).is_file() else sorted(root.glob(f"*/{INDEX}"))


def _shards(folder: Path, root: Path) -> list[_Shard]:
    samples = (folder / SAMPLES).read_bytes() if (folder / SAMPLES).is_file() else b""
    index = parse_index(str(folder / INDEX), (folder / INDEX).read_bytes(), samples)
    base = folder if index.base is None else Path(index.base)
    if "://" in str(index.base):
        raise UserError(
            f"prepare: the shards of {folder / INDEX} lie at {index.base}; check them with "
            f"`python launch/prepare_data.py index {index.base}`"
        )
    shards = [_Shard(base / s.file, _shown(base / s.file, root), s.sha256, []) for s in index.shards]
    for i, (of, file) in enumerate(zip(index.shard, index.files, strict=True)):
        for part, note in ((PICTURE, ""), (MASK, " (its mask)")):
            if index.sizes[i, part] >= 0:
                place = (int(array[i, part]) for array in (index.offsets, index.sizes, index.crcs))
                shards[of].members.append((picture_member(str(file)) + note, *place))
    return shards


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _of_shard(shard: _Shard) -> list[Problem]:
    """What is wrong with a shard, and which pictures and masks of it are hurt; runs in a worker."""
    try:
        digest = sha256_of(shard.path)
        if digest == shard.sha256:
            return []
        reason = f"changed since its index was made (sha256 {digest[:12]}... instead of {shard.sha256[:12]}...)"
        problems = [(shard.shown, "error", reason, "what it holds is compared one by one")]
        with shard.path.open("rb") as file:
            for name, offset, size, crc in shard.members:
                file.seek(offset)
                if zlib.crc32(file.read(size)) != crc:
                    reason = "its bytes are not those that the index was made of (CRC-32)"
                    problems.append((f"{shard.shown}:{name}", "error", reason, STAYS))
        return problems
    except OSError as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
        return [(shard.shown, "error", reason, "the split cannot be opened")]
