"""Finds what the official archives of a data set hold, packed or unpacked, and puts it where the readers look."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsss_dist.data.dataset import check_images
from wsss_dist.data.prepare.archives import DamagedArchive, Target, archive_in, unpack_archive
from wsss_dist.data.prepare.fetch import sha256_of
from wsss_dist.data.prepare.verify import MANIFEST, is_complete
from wsss_dist.data.prepare.work import WorkFolder, stamp_of
from wsss_dist.data.problems import TABLE, is_problems_table, problems_of, write_problems
from wsss_dist.errors import BadFile, UserError


@dataclass(frozen=True)
class Options:
    """How to prepare, whatever the data set.

    sources     folders that hold the archives or what they unpack to, or such files and folders themselves.
    out         the folder to make.
    workers     processes; 0: this one. The result does not depend on it.
    on_problem  "stop" makes no lists where a file cannot be used, "continue" leaves such images out of them, and goes
                on with what can be unpacked of a damaged archive.
    subset      take what is there, whatever its number.
    labels      a cls_labels_onehot.npy whose tags are taken instead of the derived ones.
    legacy      write a cls_labels_onehot.npy and plain lists as well, for other repositories.
    verify      of a finished folder compare every sha256.
    """

    sources: tuple[Path, ...]
    out: Path
    workers: int
    on_problem: Literal["stop", "continue"] = "stop"
    subset: bool = False
    labels: Path | None = None
    legacy: bool = False
    verify: bool = False


@dataclass(frozen=True)
class Console:
    """say prints one line; track wraps results of known number with a progress display."""

    say: Callable[[str], None]
    track: Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class Archive:
    """An official archive: its file name, and where to get it."""

    name: str
    url: str


def prepare(
    options: Options,
    data: str,
    steps: Callable[[WorkFolder, dict], None],
    console: Console,
    more: dict | None = None,
) -> None:
    """Run `steps` in the work folder of `options.out`, unless the result is there and whole.

    Args:
        data: name of the data set.
        steps: gets the work folder, and what the result depends on besides the input, for the manifest.
        more: what else it depends on.
    """
    if options.workers < 0:
        raise UserError(f"prepare: --workers is {options.workers}; expected 0 (this process alone) or more")
    missing = [path for path in options.sources if not path.exists()]
    if missing:
        raise UserError(f"prepare: --source is '{missing[0]}', which does not exist; name the folder of the archives")
    if options.labels and not options.labels.is_file():
        raise UserError(f"prepare: --labels is '{options.labels}', which is no file; name a cls_labels_onehot.npy")
    labels = sha256_of(options.labels) if options.labels else None
    settings = {"data": data, "subset": options.subset, "legacy": options.legacy, "labels": labels}
    settings |= more or {}
    manifest = options.out / MANIFEST
    if manifest.is_file() and (options.out / ".prepare").is_dir():  # killed between the last two steps
        WorkFolder(options.out).remove()
    if is_complete(options, settings, console):
        return
    work = WorkFolder(options.out)
    try:
        if manifest.is_file():  # made again, so from here on the folder is not finished
            work.mark("begun", [])
            manifest.unlink()
        steps(work, settings)
        work.remove()
    except BadFile as error:  # a file that nothing can be made without: the table has it, too
        write_problems(options.out / TABLE, [*work.problems, *problems_of(error, "nothing was made")])
        raise
    finally:
        work.release()


def find(options: Options, folders: Iterable[str], archive: Archive, holds: str) -> tuple[Path | None, Path | None]:
    """What was unpacked already, or else the archive.

    Args:
        folders: paths below a source where the unpacked folder or file may lie; "" is the source itself.
        archive: the archive it comes in.
        holds: for the message, what it holds.
    Returns:
        (the unpacked folder or file, None) or (None, the archive). A folder of `options.out` itself may be half
        unpacked: there an archive goes first.
    Raises:
        UserError: neither is there.
    """
    leaf = next(name for name in folders if name).rpartition("/")[2]
    places = [s / name for s in options.sources for name in folders if name or s.resolve().name == leaf]
    unpacked = [place for place in places if place.exists()]
    packed = archive_in(options.sources, archive.name)
    own = [path for path in unpacked if options.out.resolve() in path.resolve().parents]
    if [path for path in unpacked if path not in own]:
        return next(path for path in unpacked if path not in own), None
    if packed is not None:
        return None, packed
    if own:
        return own[0], None
    looked = ", ".join(str(s) for s in options.sources)
    raise UserError(
        f"prepare: {holds} are missing: found neither {archive.name} nor {leaf} in {looked}; download {archive.url}, "
        "or name the folder it is in with --source"
    )


def unpack(work: WorkFolder, archive: Path, target: Target, options: Options, console: Console) -> None:
    """Unpack an archive once: what is done, and which file it was, is marked.

    One that is damaged ends the preparation, or, where `options.on_problem` is "continue", is used as far as it goes.
    """
    stamp = stamp_of([archive.resolve()])
    work.archives += [(archive.name, size, changed) for _, size, changed in stamp]
    if work.is_marked(archive.name, stamp):
        return
    goes_on, before = options.on_problem == "continue", len(work.problems)

    def skipped(name: str, reason: str) -> None:
        work.problems.append((f"{archive}:{name}", "error", reason, "not unpacked"))

    try:
        counts = unpack_archive(archive, target, console.say, skipped if goes_on else None)
    except DamagedArchive as error:
        if not goes_on:
            raise
        work.problems += problems_of(error, "used as far as it could be unpacked")
    if len(work.problems) > before:
        reason = work.problems[before][2]
        write_problems(options.out / TABLE, work.problems)  # whatever comes next
        console.say(f"{archive.name} is damaged ({reason}), going on with what could be unpacked of it")
        return  # not marked: it may be repaired
    if not counts.written + counts.kept:
        raise UserError(
            f"prepare: {archive} holds none of the files that {archive.name} has; download the official archive"
        )
    console.say(f"{archive.name}: {counts.written:,} files unpacked, {counts.kept:,} were there")
    work.mark(archive.name, stamp)


def link(work: WorkFolder, source: Path, place: Path) -> None:
    """Make `place` a link to `source`, unless it is that very file or folder. Raises UserError where it is another."""
    if place.exists() and place.samefile(source):
        return
    # a folder with our table was prepared, and its source was moved since
    if place.is_symlink() and not place.exists() and is_problems_table(work.out / TABLE):
        place.unlink()
    if place.is_symlink() or place.exists():
        raise UserError(
            f"prepare: {place} exists and is not {source}; nothing is overwritten: move it away, or choose another "
            "--out"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), place)


def own_folder(place: Path, *sources: Path) -> None:
    """Hold that `place`, where something is written, is no link into a folder of the user's, unless it is a source."""
    if place.is_symlink() and os.path.abspath(place) not in map(os.path.abspath, sources):
        raise UserError(
            f"prepare: {place} is a link, and nothing is written through it; remove the link, or name the folder it "
            "leads to with --source"
        )


def refuse_foreign(work: WorkFolder, places: Iterable[Path]) -> None:
    """Hold that what is to be made in `places` was made or begun by this command, or is not there."""
    if (work.path / "begun.done").exists() or is_problems_table(work.out / TABLE):
        work.mark("begun", [])
        return
    for place in places:
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise UserError(
                f"prepare: {place} exists and was not made by this command; nothing is overwritten: move it away, or "
                "choose another --out"
            )
    work.mark("begun", [])


def check_names(folder: Path, files: list[str], listed: Path) -> None:
    """Hold that a list names files of `folder`, there or not. Raises BadFile, as the reader of the list does."""
    try:
        check_images(folder, files, listed)
    except BadFile as error:
        if any(path == str(listed) for path, _ in error.rows):
            raise


def check_counts(
    found: dict[str, int],
    official: dict[str, int],
    subset: bool,
    say: Callable[[str], None],
    named: dict[str, int] | None = None,
) -> None:
    """Say what was found of what is expected.

    Args:
        named: how many of each are missing and have a row of their own in problems.csv, which says more than a count.
    Raises:
        UserError: found and named are not what is expected, and no subset is asked for.
    """
    wrong = []
    for name, expected in official.items():
        absent = (named or {}).get(name, 0)
        text = f"{name}: found {found[name]:,}, expected {expected:,}"
        say(f"{text} ({absent:,} missing ones are in {TABLE})" if absent else text)
        if found[name] + absent != expected:
            wrong.append(text)
    if wrong and not subset:
        raise UserError(
            f"prepare: these are not the official counts: {'; '.join(wrong)}. Unpack or download the archives again; "
            "or add --subset where another number is meant"
        )
