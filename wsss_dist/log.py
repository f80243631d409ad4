"""What a run says while it trains: a progress bar or plain lines, metrics.jsonl, TensorBoard.

metrics.jsonl holds no time of day and no duration, so a run that was interrupted and resumed leaves the same file as
one that was not; durations are in speed.jsonl.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wsss_dist.files import write_whole

METRICS, SPEED = "metrics.jsonl", "speed.jsonl"


class RunLog:
    """Log of one run; on ranks other than 0 (enabled False) it does nothing.

    Args:
        run_dir: the run folder.
        total: steps of the run.
        batch: images per step over all ranks.
        every: log each this many steps, and the first and the last.
        enabled: is this the rank that writes?
    """

    def __init__(self, run_dir: Path, *, total: int, batch: int, every: int, enabled: bool):
        self.run_dir, self.total, self.batch, self.every, self.enabled = run_dir, total, batch, every, enabled
        self._bar: Progress | None = None
        self._board: Any = None
        self._console = Console(stderr=False, highlight=False)
        self._evaluated: set[tuple[int, str]] = set()

    def start(self, step: int) -> None:
        """Open the files for a run that stands after `step` steps; lines past it, of a run that went on further, go."""
        self._since = (time.perf_counter(), step)
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        kept = _truncate(self.run_dir / METRICS, step)
        _truncate(self.run_dir / SPEED, step)
        self._evaluated = {(line["step"], line["split"]) for line in kept if "eval" in line}
        self._metrics = open(self.run_dir / METRICS, "a")  # noqa: SIM115  closed in close()
        self._speed = open(self.run_dir / SPEED, "a")  # noqa: SIM115
        self._board = SummaryWriter(self.run_dir / "tensorboard", purge_step=step + 1 if step else None)
        if self._console.is_terminal:
            columns = [TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")]
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=self.total, completed=step)
            self._bar.start()

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Note the metrics of the step after which `done` steps are done."""
        if not self.enabled:
            return
        if done % self.every and done not in (1, self.total):
            if self._bar:
                self._bar.update(self._task, completed=done)
            return
        now = time.perf_counter()
        seconds = (now - self._since[0]) / max(1, done - self._since[1])
        self._since = (now, done)
        _write(self._metrics, {"step": done, **metrics})
        _write(self._speed, {"step": done, "seconds_per_step": seconds, "images_per_s": self.batch / seconds})
        for name, value in metrics.items():
            self._board.add_scalar(f"train/{name}", value, done)
        self._board.add_scalar("speed/images_per_s", self.batch / seconds, done)
        text = f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {self.batch / seconds:.1f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        else:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.total - done)))
            self.message(f"step {done}/{self.total}  {text}  left {left}")

    def evaluated(self, step: int, split: str) -> bool:
        """Does the log hold an evaluation of a split after `step` steps? (Rank 0 alone knows.)"""
        return (step, split) in self._evaluated

    def evaluation(self, step: int, split: str, result: dict[str, dict]) -> None:
        """Note the evaluation of one split: kind -> metrics."""
        if not self.enabled:
            return
        _write(self._metrics, {"step": step, "split": split, "eval": result})
        self._evaluated.add((step, split))
        for kind, metrics in result.items():
            if isinstance(metrics.get("miou"), float):
                self._board.add_scalar(f"{split}/{kind}_miou", metrics["miou"], step)
                self.message(f"step {step}  {split}  {kind} mIoU {metrics['miou']:.4f}")

    def message(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self.enabled:
            (self._bar.console if self._bar else self._console).print(text, markup=False, soft_wrap=True)
            sys.stdout.flush()

    def close(self) -> None:
        """Close files and bar; safe to call twice."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._metrics.close()
            self._speed.close()
            self._board = None


def _write(file: Any, line: dict) -> None:
    file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
    file.flush()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> list[dict]:
    """Keep the whole lines up to `step`, put in place in one go; returns them."""
    lines, kept = path.read_text().splitlines(keepends=True) if path.exists() else [], []
    for line in lines:
        try:
            values = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            values = None
        if values is not None and values["step"] <= step:
            kept.append((line, values))
    if len(kept) < len(lines):
        write_whole(path, "".join(line for line, _ in kept))
    return [values for _, values in kept]
