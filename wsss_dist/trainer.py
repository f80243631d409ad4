"""The training loop. It names no method and no data set; every rank takes the same branches."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from wsss_dist import dist
from wsss_dist.agreement import check_same, check_shared, facts_of_config, facts_of_data, flat, package_versions
from wsss_dist.checkpoint import Checkpoints
from wsss_dist.config import RunConfig, check_sizes, check_world
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data.batch import Batch
from wsss_dist.data.problems import REPLACED, TABLE, add_problems, noted, start_problems
from wsss_dist.engine import build_engine
from wsss_dist.errors import Interrupted, TrainingError, UserError, collective, raised_alike
from wsss_dist.evaluate import evaluate_splits, open_splits
from wsss_dist.files import write_whole
from wsss_dist.keys import changes_no_step, changes_nothing, is_weights
from wsss_dist.log import RunLog
from wsss_dist.methods import load_method
from wsss_dist.report import build_report
from wsss_dist.run_lock import RunLock
from wsss_dist.signals import interruptible, received
from wsss_dist.trained import check_classes

DONE, INTERRUPTED = 0, 75
# keys that the meaning of a step number depends on
_FIXED = ("train.steps", "train.global_batch", "run.seed")


class Trainer:
    """Builds all parts of a run; `train()` runs it.

    Raises:
        UserError: the config does not fit the data, the ranks or this machine.
    """

    def __init__(self, cfg: RunConfig):
        train = cfg.train
        dist.init(train.timeout_s)
        self.cfg, self.run_dir = cfg, cfg.run_dir
        check_same(self._open_data)
        classes = self.dataset.class_names
        open_splits(cfg, cfg.data.eval_splits, classes)
        check_same(self._build_method)
        self.engine = build_engine(self._method, cfg)
        self.log = RunLog(
            self.run_dir, total=train.steps, batch=train.global_batch, every=train.log_every, enabled=dist.is_main()
        )
        settings = _settings(cfg)
        self.checkpoints = Checkpoints(
            self.run_dir / "checkpoints",
            keep=train.keep,
            identity=_identity(cfg, classes),
            fixed={k: v for k, v in settings.items() if k in _FIXED},
            settings={k: v for k, v in settings.items() if k not in _FIXED},
            images=self._images,
            report=self.log.message,
        )
        self._damaged: set[str] = set()
        self._lock: RunLock | None = None

    def _open_data(self) -> dict[str, Any]:
        """Open the training split; what has to be the same on every rank."""
        cfg = self.cfg
        check_world(cfg, dist.world_size())
        configure_kernels(cfg.kernels)
        self.dataset = build_dataset(cfg.data, cfg.data.train_split)
        self._loader(0)  # says now if the images do not fill one step
        values = {**cfg.model_dump(mode="json"), "method.name": cfg.method_name}
        facts = facts_of_data(cfg.data.train_split, self.dataset)
        self._images = facts[f"data of split '{cfg.data.train_split}'"]
        return {**facts_of_config(values), **facts}

    def _build_method(self) -> dict[str, Any]:
        """Make the method; nothing of it has to be the same, rank 0 gives the others its weights."""
        cfg, classes = self.cfg, self.dataset.class_names
        torch.manual_seed(cfg.run.seed)
        self._method = load_method(cfg.method_name).Method(cfg.method, len(classes), cfg.train.steps)
        for path in self._method.trained_weights():
            check_classes(path, classes)
        check_sizes(cfg, getattr(self._method, "patch_size", 1))
        return {}

    def train(self) -> int:
        """Run, or go on with, the training and the final evaluation.

        Returns:
            DONE, also after train.stop_after; INTERRUPTED when a signal ended it, with a checkpoint to go on from.
        Raises:
            UserError, TrainingError: on every rank, with the reason in one sentence.
        """
        try:
            dist.on_main(self._open_run_dir)
            check_shared(self.run_dir)
            with interruptible(), noted(self.run_dir):
                return self._run(self._begin())
        except Interrupted as stop:  # in an evaluation
            self.log.message(f"{stop}, from a checkpoint")
            return INTERRUPTED
        finally:
            self.log.close()
            if self._lock is not None:
                self._lock.release()

    def _begin(self) -> int:
        """Say what is left out, load the checkpoint and write down what is run; the number of steps that are done."""
        with raised_alike():
            self.checkpoints.check_space(self.engine)
        if self.dataset.unusable:
            names = f"{self.dataset.unusable} images of '{self.dataset.name}'"
            self.log.message(f"{names} are left out: {self.cfg.data.leave_out} names them")
        if self.dataset.left_out:
            self.log.message(f"{self.dataset.left_out} images of '{self.dataset.name}' have no tag: left out")
        start = self._resume()
        dist.on_main(partial(self._describe, start))  # now that the checkpoint fits what is asked for
        return start

    def _run(self, start: int) -> int:
        train = self.cfg.train
        self.log.start(start)
        if start and _due(train.eval_every, start) and start < train.steps:
            self._evaluate(start, saved=True)
        if train.stop_after is not None and start >= train.stop_after:
            self.log.message(f"nothing to do: {start} steps are done and train.stop_after is {train.stop_after}")
            return DONE
        batches_of = self._loader(start)
        for done in range(start + 1, train.steps + 1):
            batches = next(batches_of)
            with raised_alike(TrainingError):
                metrics = self.engine.train_step(batches, done - 1)
            self.log.step(done, metrics)
            interrupted = self._exchange(batches)
            stop = interrupted or done == train.stop_after
            save = stop or done == train.steps or _due(train.save_every, done)
            if save:
                self._save(done)
            if stop:
                self.log.message(f"stopped after step {done} with a checkpoint; the same command goes on from it")
                return INTERRUPTED if interrupted else DONE
            if done < train.steps and _due(train.eval_every, done):
                self._evaluate(done, saved=save)
        self._finish()
        return DONE

    def _loader(self, start: int) -> Iterator[list[Batch]]:
        train = self.cfg.train
        return iter(
            build_train_loader(
                self.dataset,
                self.cfg.data,
                seed=self.cfg.run.seed,
                global_batch=train.global_batch,
                micro_batch=train.micro_batch,
                rank=dist.rank(),
                world_size=dist.world_size(),
                start_step=start,
                num_steps=train.steps - start,
            )
        )

    def _resume(self) -> int:
        if not self.cfg.train.resume:
            return 0
        with raised_alike():
            start = self.checkpoints.resume(self.engine)
        if start:
            with self.engine.evaluation() as whole:
                self.engine.module.after_load(whole)
            self.log.message(f"resumed after step {start}")
        return start

    def _save(self, step: int) -> None:
        with raised_alike():
            self.checkpoints.save(self.engine, step)

    def _evaluate(self, step: int, saved: bool) -> None:
        """Quick evaluation of the splits that the log does not hold yet for this step.

        Raises:
            Interrupted: by a signal, with a checkpoint; the next start repeats it.
        """
        splits = [s for s in self.cfg.data.eval_splits if not self.log.evaluated(step, s)]
        splits = dist.broadcast_object(splits)
        if not splits:
            return
        try:
            with self.engine.evaluation() as method:
                results = evaluate_splits(method, self.cfg, splits, self.run_dir, step, final=False)
        except Interrupted:
            if not saved:
                self._save(step)
            raise
        for split, result in results.items():
            self.log.evaluation(step, split, result)

    def _finish(self) -> None:
        """Full evaluation, result.json and the report, of a run that has splits to evaluate on."""
        splits, steps = self.cfg.data.eval_splits, self.cfg.train.steps
        if not splits:
            return
        with self.engine.evaluation() as method:
            results = evaluate_splits(method, self.cfg, splits, self.run_dir, None, final=True)
        for split, result in results.items():
            self.log.evaluation(steps, split, result)
        report = dist.on_main(lambda: build_report(self.run_dir))
        self.log.message(f"report: {report}")

    def _exchange(self, batches: list[Batch]) -> bool:
        """Tell the other ranks of damaged images and of a signal; is the run to stop?

        Raises:
            UserError: more images are damaged than data.max_damaged.
        """
        new = sorted({d for b in batches for d in b.damaged if d[0] not in self._damaged})
        signalled, num_new = dist.all_reduce_sum(torch.tensor([received() is not None, len(new)]).long()).tolist()
        if num_new:
            rows = []
            for path, reason in (d for found in dist.all_gather_object(new) for d in found):
                if path not in self._damaged:
                    self._damaged.add(path)
                    self.log.message(f"damaged image replaced by another: {path} ({reason})")
                    rows.append((path, "error", reason, REPLACED))
            if dist.is_main():
                add_problems(self.run_dir / TABLE, rows)
            if len(self._damaged) > self.cfg.data.max_damaged:
                raise collective(
                    UserError(
                        f"data: {len(self._damaged)} images cannot be read, the last is {path} ({reason}); "
                        f"'data.max_damaged' is {self.cfg.data.max_damaged}: repair the files or raise the limit; "
                        f"{self.run_dir / TABLE} names them"
                    )
                )
        return signalled > 0

    def _open_run_dir(self) -> None:
        """On rank 0, before anything is written: take the lock, keep an earlier run."""
        try:
            self._lock = RunLock(self.run_dir, report=self.log.message)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"run: the run folder {self.run_dir} cannot be made or written ({error.strerror}: {error.filename}); "
                "set run.dir to a folder you can write to"
            ) from None
        if not self.cfg.train.resume and any(self.run_dir.glob("checkpoints/ckpt-*")):
            raise UserError(
                f"run: {self.run_dir} holds checkpoints of an earlier run and 'train.resume' is false; "
                "give the run another run.name, or delete the folder"
            )

    def _describe(self, start: int) -> None:
        """On rank 0, before the first step of this start: write down what is run and on what."""
        start_problems(self.run_dir / TABLE, keep=start > 0)
        write_whole(self.run_dir / "config.yaml", self.cfg.to_yaml(), durable=True)
        write_whole(self.run_dir / "environment.json", json.dumps(_environment(), indent=1), durable=True)


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def configure_kernels(settings: dict[str, str]) -> None:
    """Set the backends of the operators from the `kernels:` section.

    Raises:
        UserError: an unknown operator or backend, or one that cannot run on this machine.
    """
    try:
        kernels.configure(**settings)
        kernels.check_backends(dist.device())
    except (ValueError, TypeError) as error:
        raise UserError(f"config: 'kernels': {error}; choose one of these, or auto") from None


def _identity(cfg: RunConfig, classes: list[str]) -> dict[str, Any]:
    """What a checkpoint must share with the run: method and backbone, classes, form of the optimiser state."""
    values = flat("method", cfg.method.model_dump(mode="json"))
    method = {k: v for k, v in values.items() if not (is_weights(k) or changes_nothing(k))}
    train = {f"train.{k}": getattr(cfg.train, k) for k in ("engine", "zero_stage", "precision")}
    return {"method.name": cfg.method_name, "data classes": classes, **method, **train}


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What else the training depends on: length, batch, seed, learning rate and samples."""
    sections = {**flat("optim", cfg.optim.model_dump(mode="json")), **flat("data", cfg.data.model_dump(mode="json"))}
    fixed = {"train.steps": cfg.train.steps, "train.global_batch": cfg.train.global_batch, "run.seed": cfg.run.seed}
    return {**fixed, **{k: v for k, v in sections.items() if not changes_no_step(k)}}


def commit() -> str | None:
    """The commit of this code; None where it is no checkout."""
    return _git("rev-parse", "HEAD")


def _environment() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu, "cuda": torch.version.cuda},
        "world_size": dist.world_size(),
    }


def _git(*args: str) -> str | None:
    """Output of git in the folder of this file; None where it is no checkout or git is missing."""
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603, S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
