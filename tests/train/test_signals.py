"""A signal in a stage that is no training: it ends with status 75, and the same config goes on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
import types
from pathlib import Path

from tests.train.ranks import run_ranks
from wsss_dist import dist, pipeline
from wsss_dist.command import run_command
from wsss_dist.pipeline import Pipeline
from wsss_dist.stages.base import Stage, StageConfig


def _stage(made: Path, signalled: bool) -> types.SimpleNamespace:
    """A kind that makes 30 files; the last rank gets a SIGTERM at its third one."""

    def run(stage: Stage) -> dict:
        mine = 0
        missing = dist.on_main(lambda: [k for k in range(30) if not (made / str(k)).exists()])
        with dist.shared(len(missing), block=1) as numbers:
            for k in numbers:
                mine += 1
                if signalled and mine == 3 and dist.rank() == dist.world_size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                (made / str(missing[k])).touch()
                time.sleep(0.02)
        return {}

    return types.SimpleNamespace(Config=StageConfig, run=run, picture=None)


def _run(folder: Path, signalled: bool) -> tuple[int, str, str]:
    """Status of the command, what it prints, and of its errors the last line."""
    kind = _stage(folder / "made", signalled)
    pipeline.load_kind = lambda name: kind
    pipeline.Pipeline._data_of = lambda self, entry: {}
    pipeline.build_pipeline_report = lambda folder, *_: folder / "report.html"
    pipeline.scores_text = lambda folder: "scores"
    values = {"run": {"name": "p", "dir": str(folder)}, "stages": {"one": {"kind": "cams"}, "two": {"kind": "cams"}}}
    for section in values["stages"].values():
        section["data"] = {"format": "folder", "root": "unused", "crop": 8}
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = run_command(lambda: Pipeline(values).start())
    return status, said.getvalue(), errors.getvalue()


def test_a_stage_ends_with_75_on_every_rank_and_goes_on(tmp_path):
    (tmp_path / "made").mkdir()
    ends = run_ranks(2, tmp_path, _run, tmp_path, True)
    assert [status for status, *_ in ends] == [75, 75]
    assert [errors for *_, errors in ends] == ["stopped by SIGTERM; the same command goes on from here\n", ""]
    assert "stage two" not in ends[0][1] and 3 <= len(list((tmp_path / "made").iterdir())) < 30
    assert not (tmp_path / "p/one/stage.json").exists() and (tmp_path / "p/lock.json").read_text() == ""
    ends = run_ranks(2, tmp_path, _run, tmp_path, False)
    assert [status for status, *_ in ends] == [0, 0], ends
    assert "stage two: done" in ends[0][1] and len(list((tmp_path / "made").iterdir())) == 30
