"""Write the composed data set "stampscenes" in the COCO format, complete or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
from PIL import Image

from wsss_dist.data.palette import palette_picture
from wsss_dist.data.prepare.compose import SPLITS, Material, compose, load_pictures, split_material
from wsss_dist.data.prepare.fetch import sha256_of
from wsss_dist.data.prepare.sources import Source, open_source
from wsss_dist.data.rle import rle_annotation
from wsss_dist.errors import UserError

# to be raised when the same settings would give other scenes
RECIPE = 1


@dataclass(frozen=True)
class Settings:
    """What decides the scenes: images per split, side in pixels, seed, and the source as asked for."""

    train: int
    val: int
    val_seen: int
    size: int
    seed: int
    source: str

    def counts(self) -> dict[str, int]:
        return {split: getattr(self, split) for split in SPLITS}


def prepare_stampscenes(
    out: Path,
    settings: Settings,
    cache: Path,
    *,
    say: Callable[[str], None],
    track: Callable[[Iterable, int], Iterable],
    processes: int = 2,
) -> None:
    """Make the data set in the folder `out`, unless it is there and whole.

    Args:
        out: folder to create; it appears under its name only when it is complete.
        settings: what to make.
        cache: folder of downloads.
        say: prints one line.
        track: wraps an iterable of known length with a progress display.
        processes: how many compose at once; the result does not depend on it.
    Raises:
        UserError: `out` holds something else, another process is making it, or no source can be had.
    """
    _check(settings)
    started = time.monotonic()
    if _is_finished(out, settings, say):
        return
    with _partial_folder(out) as partial:
        source, reason = open_source(settings.source, cache, say)
        say(f"stampscenes: the scenes are COMPOSED from {source.about}")
        say(f"source {source.name}: {reason}")
        files = _write_all(partial, source, settings, track, processes)
        manifest = _manifest(source, reason, settings, files)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        partial.rename(out)
    seconds = time.monotonic() - started
    say(f"{sum(settings.counts().values())} scenes in {out} ({seconds:.0f} s); licences: see {out}/manifest.json")


def _check(settings: Settings) -> None:
    few = [split for split, count in settings.counts().items() if count < 1]
    if few or not 32 <= settings.size <= 2048 or settings.seed < 0:
        raise UserError(
            f"prepare: --train {settings.train} --val {settings.val} --val-seen {settings.val_seen} --size "
            f"{settings.size} --seed {settings.seed}; expected one image or more a split, 32 to 2048 pixels, seed >= 0"
        )


def _is_finished(out: Path, settings: Settings, say: Callable[[str], None]) -> bool:
    """True where `out` holds what is asked for and every file has its checksum; False where `out` does not exist."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        made, files = manifest["settings"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"prepare: {out} exists and has no manifest.json of this command; nothing is overwritten: move it away, or "
            "choose another --out"
        ) from None
    wanted = _settings_record(settings)
    different = [f"{k} {made.get(k)!r} instead of {v!r}" for k, v in wanted.items() if made.get(k) != v]
    if settings.source not in ("auto", manifest.get("source")):
        different.append(f"source {manifest.get('source')!r} instead of {settings.source!r}")
    if different:
        raise UserError(
            f"prepare: {out} was made with other settings ({'; '.join(different)}); choose another --out, or remove it "
            f"first: rm -r {out}"
        )
    wrong = [name for name, digest in files.items() if not (out / name).is_file() or sha256_of(out / name) != digest]
    if wrong:
        raise UserError(
            f"prepare: {len(wrong)} of {len(files)} files in {out} are missing or changed (first: {wrong[0]}); "
            f"remove the folder and run this again: rm -r {out}"
        )
    say(f"{out} is complete: {len(files)} files agree with manifest.json, nothing to do")
    return True


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, locked against a second process; what a killed run left in it is removed."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"prepare: another process is making {out}; wait for it, or stop it") from None
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if out.is_dir():
            out.rmdir()  # an empty folder, else `_is_finished` had refused
        yield partial
    finally:
        os.close(lock)


# What the worker processes read; set before they are forked, so that the pictures are in memory once.
_shared: dict = {}


def _write_all(
    folder: Path, source: Source, settings: Settings, track: Callable[[Iterable, int], Iterable], processes: int
) -> dict[str, str]:
    """Write images, masks and annotations of all splits; returns path -> sha256."""
    material = split_material(source, settings.seed)
    _shared.update(
        folder=folder,
        material=material,
        pictures=load_pictures(source),
        any_angle=source.any_angle,
        settings=settings,
    )
    for split in SPLITS:
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
    jobs = [(split, k) for split, count in settings.counts().items() for k in range(count)]
    context = multiprocessing.get_context("fork")
    cv2.setNumThreads(1)
    try:
        with context.Pool(processes) as pool:
            results = list(track(pool.imap(_write_scene, jobs, chunksize=8), len(jobs)))
    finally:
        _shared.clear()
    files: dict[str, str] = {}
    (folder / "annotations").mkdir()
    for split in SPLITS:
        of_split = [result for (name, _), result in zip(jobs, results, strict=True) if name == split]
        for _, _, written in of_split:
            files.update(written)
        name = f"annotations/{split}.json"
        content = _coco(split, material[split], of_split, settings.seed)
        (folder / name).write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()
    return dict(sorted(files.items()))


def _write_scene(job: tuple[str, int]) -> tuple[dict, list[dict], dict[str, str]]:
    """Compose and write one scene: its COCO image entry, its annotations (ids relative), path -> sha256."""
    split, number = job
    settings: Settings = _shared["settings"]
    material: Material = _shared["material"][split]
    key = (settings.seed, 11, SPLITS.index(split), number)
    scene = compose(material, _shared["pictures"], _shared["any_angle"], size=settings.size, key=key)
    classes = list(material.objects)
    stem = f"{split}_{number:05d}"
    mask = palette_picture(scene.mask)
    written = {}
    for name, picture, options in (
        (f"images/{split}/{stem}.jpg", Image.fromarray(scene.image), {"format": "JPEG", "quality": scene.quality}),
        (f"masks/{split}/{stem}.png", mask, {"format": "PNG"}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        (_shared["folder"] / name).write_bytes(buffer.getvalue())
        written[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    entry = {
        "id": number + 1,
        "file_name": f"{stem}.jpg",
        "height": settings.size,
        "width": settings.size,
        "labels": sorted({classes[i.label] for i in scene.instances}, key=classes.index),
        "background": scene.background,
    }
    annotations = [{**rle_annotation(0, number + 1, i.label + 1, i.region), "object": i.name} for i in scene.instances]
    return entry, annotations, written


def _coco(split: str, material: Material, results: list[tuple[dict, list[dict], dict]], seed: int) -> bytes:
    annotations = [annotation for _, of_image, _ in results for annotation in of_image]
    for k, annotation in enumerate(annotations):
        annotation["id"] = k + 1
    content = {
        "info": {"description": f"stampscenes {split}: COMPOSED scenes, recipe {RECIPE}, seed {seed}"},
        "images": [entry for entry, _, _ in results],
        "categories": [{"id": c + 1, "name": name} for c, name in enumerate(material.objects)],
        "annotations": annotations,
    }
    return json.dumps(content, separators=(",", ":")).encode()


def _settings_record(settings: Settings) -> dict:
    return {"recipe": RECIPE, **settings.counts(), "size": settings.size, "seed": settings.seed}


def _manifest(source: Source, reason: str, settings: Settings, files: dict[str, str]) -> dict:
    return {
        "about": f"These scenes are COMPOSED from {source.about}; they are no photographs of real scenes.",
        "settings": _settings_record(settings),
        "source": source.name,
        "source_reason": reason,
        "packages": source.packages,
        "licences": sorted({package["licence"] for package in source.packages}),
        "files": files,
    }
