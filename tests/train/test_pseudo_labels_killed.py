"""launch/pseudo_labels.py on two ranks, killed at random moments: it goes on, and ends with the bytes of one rank.

WSSS_PSEUDO_KILLS=20 kills each kind of file so often; -s shows when.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.test_nodes import free_port
from tests.train.test_pseudo_labels import ROOT, digests, make, small_run

IMAGES = 60
RANKS = 2
KILLS = int(os.environ.get("WSSS_PSEUDO_KILLS", "2"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("killed"), IMAGES)


def start(run_dir: Path, out: Path, kind: str) -> list[subprocess.Popen]:
    """The ranks, in a process group of their own, with a worker process each."""
    command = [sys.executable, str(ROOT / "launch/pseudo_labels.py"), "--run", str(run_dir), "--kind", kind]
    command += ["--out", str(out), "--set", "data.num_workers=1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(RANKS)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks: list[subprocess.Popen] = []
    for rank in range(RANKS):
        group, place = ranks[0].pid if ranks else 0, {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env={**env, **place}, process_group=group, stdout=subprocess.DEVNULL))
    return ranks


def kill(ranks: list[subprocess.Popen]) -> None:
    """The whole group; returns when nothing of it is left."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(ranks[0].pid, signal.SIGKILL)
            for rank in ranks:
                rank.wait()
            assert time.monotonic() < deadline, "workers outlived the kill"
            time.sleep(0.01)


def count(out: Path) -> int:
    return sum(not path.name.startswith(".") for path in out.glob("out/*/*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
@pytest.mark.parametrize("kind", ["seg_tags_crf", "maps"])
def test_killed_at_random_moments(kind, run_dir, tmp_path):
    make(run_dir, tmp_path / "once", kind)
    once, out = digests(tmp_path / "once"), tmp_path / "often"
    assert len(once) == IMAGES
    draw, hits, first_file = random.Random(kind), [], None
    while len(hits) < KILLS:
        before, begun = count(out), time.monotonic()
        if before > IMAGES * 3 // 4:
            shutil.rmtree(out / "out")
            before = 0
        ranks = start(run_dir, out, kind)
        if first_file is None or len(hits) % 4 != 1:  # once some more files are there
            aim, moment = before + draw.randint(1, (IMAGES - before) // 2), draw.uniform(0, 0.05)
            while count(out) < aim and None in (rank.poll() for rank in ranks):
                time.sleep(0.02)
                if first_file is None and count(out):
                    first_file = time.monotonic() - begun
            time.sleep(moment)
        else:  # anywhere up to there, imports and the meeting of the ranks among it
            time.sleep(draw.uniform(0, first_file))
        ended = [rank.poll() for rank in ranks] == [0] * RANKS
        kill(ranks)
        if ended:
            shutil.rmtree(out / "out")  # so that there is something left to kill
            continue
        there = digests(out)
        assert there.items() <= once.items(), "a file that has its name is whole"
        hits.append((before, len(there)))
        if len(hits) == 1:  # what a kill in the middle of a write leaves
            missing = next(name for name in reversed(once) if name not in there)
            (out / missing).with_name(f".{Path(missing).name}.partial").write_bytes(b"half")
    print(f"\n{kind}: files of {IMAGES} that were there at each start and kill: {hits}")
    assert any(0 < there < IMAGES for _, there in hits), "no kill in the middle"
    assert [rank.wait() for rank in start(run_dir, out, kind)] == [0] * RANKS
    assert digests(out) == once
    assert not list(out.rglob("*.partial"))
