"""Signals and the workers of a loader: they outlive one to the whole group, and never the process that uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
PROGRAM = """
import os, signal, sys, time, torch
from torch.utils.data import DataLoader
from wsss_dist.data.loader import _workers

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 100_000
    def __getitem__(self, i):
        time.sleep(0.01)
        return torch.zeros(3)

seen = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: seen.append(number))
items = iter(DataLoader(Images(), batch_size=2, **_workers(2, 4)))
next(items)
print(*(worker.pid for worker in items._workers), flush=True)
while sys.argv[1] == "wait":
    time.sleep(1)
for number in (signal.SIGTERM, signal.SIGINT):
    os.killpg(0, number)
    for _ in range(20):
        next(items)
assert seen == [signal.SIGTERM, signal.SIGINT]
print("went on", flush=True)
"""


def start(what: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, what], cwd=root, env=env, start_new_session=True, **pipes)


def test_a_signal_to_the_whole_group_leaves_the_workers(tmp_path):
    """And at the end, with the loader in use, nothing is waited for or said."""
    with start("go on") as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (0, "") and out.endswith("went on\n")


def test_no_worker_outlives_a_killed_process():
    with start("wait") as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        process.kill()
    end = time.monotonic() + 60  # torch looks every 5 s whether the process is there
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
