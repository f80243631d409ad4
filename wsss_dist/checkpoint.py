"""Checkpoints that are whole or absent.

checkpoints/ckpt-<step>/ is the state after <step> steps:
  model.safetensors   full weights, float32 (engine.save)
  engine.pt | ds/     optimiser and engine state, PlainEngine | DeepSpeedEngine (engine.save)
  rank-<r>.pt         of each rank: buffers, random states of torch, CUDA, numpy and Python
  manifest.json       step, world size, identity of the model, settings, size and SHA-256 of every file and of itself
All ranks write into .tmp-<step>, vote, rank 0 writes the manifest and renames. A folder without a good manifest is
not a checkpoint: it is set aside as bad-*, reported, never deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from wsss_dist import dist
from wsss_dist.buffers import fill_buffers
from wsss_dist.engine import WEIGHTS, Engine
from wsss_dist.errors import CheckpointError, UserError

_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run; every method is a collective call.

    Args:
        root: the folder; made when the first one is saved.
        keep: how many to keep, the newest ones.
        identity: dotted config key -> value that a checkpoint must share to be resumed.
        fixed: the same of keys that are no part of the model, but say what a step number means.
        settings: the same of keys that may change, which is told.
        images: the training split in words, by its number of images and the digest of their names and tags; a run does
            not go on with others.
        report: what is told of a damaged checkpoint, one sentence.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        identity: dict[str, Any],
        fixed: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        images: str | None = None,
        report: Callable[[str], None] = print,
    ):
        self.root, self.keep, self.identity, self.report = root, keep, identity, report
        self.fixed, self.settings, self.images = fixed or {}, settings or {}, images

    def save(self, engine: Engine, step: int) -> Path:
        """Commit the state after `step` steps.

        Raises:
            CheckpointError: on every rank, when any of them could not write; earlier checkpoints are untouched.
        """
        temporary, final = self.root / f".tmp-{step}", self.root / f"ckpt-{step}"
        needed = engine.checkpoint_bytes
        self._stage(temporary, needed, lambda: self._open(temporary, needed))
        self._stage(temporary, needed, lambda: engine.save(temporary), everywhere=True)
        mine = temporary / f"rank-{dist.rank()}.pt"
        self._stage(temporary, needed, lambda: _save_rank(mine, engine.module), everywhere=True)
        self._stage(temporary, needed, lambda: self._commit(temporary, final, step))
        if dist.is_main():
            for old in _numbered(self.root)[self.keep :]:
                shutil.rmtree(self.root / f"ckpt-{old}", ignore_errors=True)
        return final

    def check_space(self, engine: Engine) -> None:
        """Hold that one more checkpoint has room, before a run is trained up to it.

        Raises:
            CheckpointError: it has not.
        """
        free = dist.on_main(self._room)
        if free < engine.checkpoint_bytes:
            raise CheckpointError(
                f"checkpoint: one needs about {engine.checkpoint_bytes} bytes, {free} are free on the disk of "
                f"{self.root}; free space or set run.dir to another disk"
            )

    def resume(self, engine: Engine) -> int:
        """Load the newest checkpoint whose files are what its manifest says.

        Returns:
            the number of steps it stands after; 0 when there is none.
        Raises:
            UserError: it belongs to another model, or to a run whose steps were others; or all were damaged.
        """
        found = dist.on_main(self._newest)
        if found is None:
            dist.on_main(self._refuse_damaged)
            return 0
        folder, manifest = found
        self._check(folder, manifest)
        ranks = manifest["world_size"]
        same = ranks == dist.world_size()
        if not same:
            self.report(f"{folder} was written by {ranks} ranks, its state is dealt to {dist.world_size()}")
        engine.load(folder, ranks)
        _load_rank(folder / f"rank-{dist.rank() if same else 0}.pt", engine.module, random_state=same)
        if not same:  # running statistics of rank 0 alone are those of a part of the samples
            fill_buffers(engine.module, load_file(folder / WEIGHTS))
        return manifest["step"]

    def _room(self) -> int:
        """Free bytes, what a save that was killed left behind counted in; the run has the lock of its folder."""
        for stale in self.root.glob(".tmp-*"):
            shutil.rmtree(stale)
        return _free(self.root)

    def _stage(self, temporary: Path, needed: int, action: Callable[[], Any], everywhere: bool = False) -> None:
        """Run one part of a save on rank 0, or on every rank, and fail on all ranks when it fails on any."""
        error: Exception | None = None
        if everywhere or dist.is_main():
            try:
                action()
            except Exception as caught:  # OSError, but torch and safetensors report a full disk in classes of their own
                error = caught
        errors = dist.all_gather_object(error and f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        failed = [(r, e) for r, e in enumerate(errors) if e]
        if not failed:
            return
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: rank {failed[0][0]} could not write {temporary} ({failed[0][1]}); it needs about {needed} "
            f"bytes, {_free(self.root)} are free there. Free space or set run.dir to another disk, and start again: "
            "earlier checkpoints are intact"
        ) from error

    def _open(self, temporary: Path, needed: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self._room() < needed:
            raise OSError(f"no space left on the device of {self.root}")
        temporary.mkdir()

    def _commit(self, temporary: Path, final: Path, step: int) -> None:
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        listed = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        for path in files:
            _fsync(path)
        manifest = {"step": step, "world_size": dist.world_size(), "identity": self.identity}
        manifest |= {"fixed": self.fixed, "settings": self.settings, "images": self.images, "files": listed}
        manifest["sha256"] = _digest(manifest)
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [temporary / _MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _fsync(path)
        os.rename(temporary, final)
        _fsync(self.root)

    def _newest(self) -> tuple[Path, dict] | None:
        for step in _numbered(self.root):
            folder = self.root / f"ckpt-{step}"
            try:
                return folder, _verify(folder, step)
            except _Damaged as error:
                self._set_aside(folder, str(error))
        return None

    def _refuse_damaged(self) -> None:
        """A run that was trained before does not start from step 0 unasked."""
        if bad := sorted(p.name for p in self.root.glob("bad-*")):
            raise UserError(
                f"checkpoint: {self.root} holds damaged checkpoints alone ({', '.join(bad)}); put a good copy there as "
                "ckpt-<step>, or move these away to start from step 0"
            )

    def _set_aside(self, folder: Path, reason: str) -> None:
        number = 0
        while (bad := self.root / f"bad-{folder.name}{f'-{number}' if number else ''}").exists():
            number += 1
        os.rename(folder, bad)
        self.report(f"checkpoint {folder} is not used ({reason}); kept as {bad.name}")

    def _check(self, folder: Path, manifest: dict) -> None:
        saved = manifest["identity"]
        differ = [k for k in sorted({*saved, *self.identity}) if saved.get(k) != self.identity.get(k)]
        if differ:
            # of another method all other keys differ too
            shown = [k for k in differ if k == "method.name"] or differ[:3]
            pairs = ", ".join(f"'{k}' is {self.identity.get(k)!r}, there {saved.get(k)!r}" for k in shown)
            more = f", and {len(differ) - len(shown)} more keys differ" if len(differ) > len(shown) else ""
            raise UserError(
                f"checkpoint: {folder} is of another model: {pairs}{more}; restore these keys, "
                "give the run another run.name, or delete the folder"
            )
        for key, old, new in _changes(manifest["fixed"], self.fixed):
            raise UserError(
                f"checkpoint: {folder} is of a run in which '{key}' was {old!r}, now it is {new!r}, which would give "
                f"its steps another meaning: set {key}: {old}, or give the run another run.name"
            )
        images = manifest.get("images")
        if None not in (images, self.images) and images != self.images:
            raise UserError(
                f"checkpoint: {folder} was trained on {images}, the training split now has {self.images}, which would "
                "give its steps other images: put the data back as they were (data.root, data.leave_out, "
                "data.train_limit and data.untagged decide on them), or give the run another run.name"
            )
        changes = _changes(manifest["settings"], self.settings)
        if changes:
            pairs = ", ".join(f"'{key}' is {new!r}, was {old!r}" for key, old, new in changes)
            self.report(f"from step {manifest['step']} on, other settings than before: {pairs}")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two sets of settings differ."""
    return [(k, old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def newest_step(run_dir: Path) -> int:
    """Steps after which the newest checkpoint of a run stands, good or not; 0 where there is none."""
    return max(_numbered(Path(run_dir) / "checkpoints"), default=0)


def newest_good(run_dir: Path, report: Callable[[str], None] = print) -> tuple[Path, dict]:
    """Folder and manifest of the newest good checkpoint of a run, which may be in training; on one rank alone.

    Nothing is moved: only the run itself, which has the lock of its folder, sets damaged ones aside.

    Raises:
        UserError: there is none.
    """
    root, told = Path(run_dir) / "checkpoints", set()
    while steps := [step for step in _numbered(root) if step not in told]:
        folder = root / f"ckpt-{steps[0]}"
        try:
            return folder, _verify(folder, steps[0])
        except _Damaged as error:
            if folder.is_dir():  # else a newer one has taken its place meanwhile
                report(f"checkpoint {folder} is not used ({error})")
            told.add(steps[0])
    raise UserError(f"checkpoint: {root} holds no good checkpoint; train the run first, or name another run folder")


def _numbered(root: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the newest first."""
    names = (p.name.removeprefix("ckpt-") for p in root.glob("ckpt-*"))
    return sorted((int(n) for n in names if n.isdecimal()), reverse=True)


class _Damaged(Exception):
    """A checkpoint is not what its manifest says."""


def _verify(folder: Path, step: int) -> dict:
    """The manifest of a checkpoint whose files all match it.

    Raises:
        _Damaged: they do not.
        OSError: they cannot be read for a reason that is not theirs, such as no access or too many open files.
    """
    try:
        return _verified(folder, step)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise _Damaged(str(error)) from None
        raise


def _verified(folder: Path, step: int) -> dict:
    manifest = json.loads((folder / _MANIFEST).read_text())
    if manifest["sha256"] != _digest({k: v for k, v in manifest.items() if k != "sha256"}) or manifest["step"] != step:
        raise ValueError(f"{_MANIFEST} is damaged")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise ValueError(f"{name} has changed since it was written")
    return manifest


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _save_rank(path: Path, module: nn.Module) -> None:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "buffers": {k: b.detach().cpu().clone() for k, b in module.named_buffers()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    with open(path, "wb") as file:
        torch.save(state, file)


def _load_rank(path: Path, module: nn.Module, *, random_state: bool) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, buffer in module.named_buffers():
        buffer.data.copy_(state["buffers"][name])
    if not random_state:
        return
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
