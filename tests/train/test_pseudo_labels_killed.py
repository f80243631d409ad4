"""launch/pseudo_labels.py on two ranks, killed at random moments: it goes on, and ends with the bytes of one rank.

WSSS_PSEUDO_KILLS=20 kills each kind of file so often; -s shows when.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.ranks import _context, run_ranks
from tests.train.test_nodes import free_port
from tests.train.test_pseudo_labels import ROOT, digests, make, small_run

IMAGES = 60
RANKS = 2
KILLS = int(os.environ.get("WSSS_PSEUDO_KILLS", "2"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("killed"), IMAGES)


def launch(arguments: list[str], rank: int, port: str) -> None:
    """What a launcher starts, in a process group of its own: this process and its worker."""
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_PORT=port)
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the worker
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["pseudo_labels.py", *arguments]
    sys.exit(runpy.run_path(str(ROOT / "launch/pseudo_labels.py"))["main"]())


def start(run_dir: Path, out: Path, kind: str) -> list[multiprocessing.Process]:
    """The ranks, each with a worker process. They come from a server that has imported torch, which saves seconds."""
    arguments = ["--run", str(run_dir), "--kind", kind, "--out", str(out), "--set", "data.num_workers=1"]
    port = free_port()
    ranks = [_context.Process(target=launch, args=(arguments, rank, port)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    return ranks


def kill(ranks: list[multiprocessing.Process]) -> None:
    """All of them and their workers; returns when nothing of them is left."""
    deadline = time.monotonic() + 60
    for rank in ranks:
        rank.kill()  # at once, and those that have no group yet
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(rank.pid, signal.SIGKILL)
                assert time.monotonic() < deadline, "workers outlived the kill"
                time.sleep(0.01)
        rank.join()


def count(out: Path) -> int:
    return sum(not path.name.startswith(".") for path in out.glob("out/*/*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
@pytest.mark.parametrize("kind", ["seg_tags_crf", "maps"])
def test_killed_at_random_moments(kind, run_dir, tmp_path):
    run_ranks(1, tmp_path, make, run_dir, tmp_path / "once", kind)  # on one thread, as the ranks
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
            while count(out) < aim and None in (rank.exitcode for rank in ranks):
                time.sleep(0.02)
                if first_file is None and count(out):
                    first_file = time.monotonic() - begun
            time.sleep(moment)
        else:  # anywhere up to there, imports and the meeting of the ranks among it
            time.sleep(draw.uniform(0, first_file))
        codes = [rank.exitcode for rank in ranks]
        kill(ranks)
        assert set(codes) <= {None, 0}, "a rank failed before it was killed"
        if codes == [0] * RANKS:
            shutil.rmtree(out / "out")  # so that there is something left to kill
            continue
        there = digests(out)
        assert there.items() <= once.items(), "a file that has its name is whole"
        hits.append((before, len(there)))
        print(f"{kind}: killed with {len(there)} of {IMAGES} files, {before} of them of earlier starts", flush=True)
        if len(hits) == 1:  # what a kill in the middle of a write leaves
            missing = next(name for name in reversed(once) if name not in there)
            (out / missing).with_name(f".{Path(missing).name}.partial").write_bytes(b"half")
    assert any(0 < there < IMAGES for _, there in hits), "no kill in the middle"
    ranks = start(run_dir, out, kind)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    assert digests(out) == once
    assert not list(out.rglob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
def test_a_signal_to_ranks_and_workers_ends_them_after_the_image_in_work(run_dir, tmp_path):
    out = tmp_path / "out"
    ranks = start(run_dir, out, "seg")
    while count(out) < 3 and None in (rank.exitcode for rank in ranks):
        time.sleep(0.01)
    os.killpg(ranks[1].pid, signal.SIGTERM)  # one of them, with its worker
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [75] * RANKS
    assert 0 < count(out) < IMAGES and not list(out.rglob("*.partial"))
    ranks = start(run_dir, out, "seg")
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * RANKS and count(out) == IMAGES
