"""A preparation that is killed at any moment goes on, and ends with the bytes of one that never was.

WSSS_PREPARE_PART=1 WSSS_PREPARE_KILLS=20 runs the test at random times on the official counts, 40 on a fortieth
of them; -s shows when it killed.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data import official
from tests.data.preparing import contents, run
from wsss_dist.data.prepare.work import WorkFolder, finish_items
from wsss_dist.errors import UserError

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "launch" / "prepare_data.py")]
PART = int(os.environ.get("WSSS_PREPARE_PART", "0"))
KILLS = int(os.environ.get("WSSS_PREPARE_KILLS", "3"))
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink"}


def archives(data: str, folder: Path, part: int = 0) -> Path:
    if data == "coco":
        counts = (
            {s: tuple(n // part for n in c) for s, c in official.FULL_COCO.items()} if part else official.SMALL_COCO
        )
        return official.write_coco(folder, counts)
    return official.write_voc(folder, tuple(n // part for n in official.FULL_VOC) if part else official.SMALL_VOC)


def run_and_die(data: str, source: Path, out: Path, events: int, torn: bool) -> None:
    """Prepare, and die before the file operation of this number; `torn`: what was written last is not whole."""
    left, opened = [events], [out]

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in WRITES or writes) and str(out) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                for path in (opened[0], out / ".prepare" / "journal.jsonl"):
                    if torn and path.is_file():
                        os.truncate(path, max(0, path.stat().st_size - 1 - path.stat().st_size % 40))
                os.kill(os.getpid(), signal.SIGKILL)
            if writes:
                opened[0] = Path(arguments[0])

    sys.addaudithook(watch)
    run(data, source, out, legacy=True)


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_killed_before_any_file_operation(data, tmp_path):
    source = archives(data, tmp_path / "archives")
    run(data, source, tmp_path / "once", legacy=True)
    once = contents(tmp_path / "once")
    rng, kills = np.random.default_rng(0), 0
    fork = multiprocessing.get_context("fork")
    while kills < 100:
        # each run comes further than the one before, by a random number of operations
        events = 6 * kills + int(rng.integers(1, 16))
        process = fork.Process(target=run_and_die, args=(data, source, tmp_path / "often", events, kills % 2 == 0))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        # a file that has its name is whole
        there = contents(tmp_path / "often") if (tmp_path / "often").exists() else {}
        assert {k: v for k, v in there.items() if "/." not in f"/{k}"}.items() <= once.items()
    assert 3 <= kills < 100
    assert contents(tmp_path / "often") == once
    assert not (tmp_path / "often" / ".prepare").exists()


def children(pid: int) -> list[int]:
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except OSError:
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="a worker ends with its parent on Linux alone")
@pytest.mark.parametrize("data", ["coco", "voc"])
def test_killed_at_random_times(data, tmp_path):
    source, out = archives(data, tmp_path / "archives", PART or 1000), tmp_path / "often"
    command = [*COMMAND, data, "--source", str(source), "--subset", "--workers", "2", "--out"]
    _, _, duration = run_for(command, tmp_path / "once", 1e9)
    rng, kills, ends = np.random.default_rng(1), 0, 0
    while kills < KILLS:
        ended, workers, after = run_for(command, out, rng.uniform(0, duration))
        if ended:  # so that there is something left to kill: all of it, or all but the manifest
            shutil.rmtree(out) if ends % 2 == 0 else (out / "manifest.json").unlink()
            ends += 1
            continue
        kills += 1
        print(f"{data}: killed after {after:.1f} of {duration:.1f} s, ended {ends} times before", flush=True)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "workers outlived their parent"
            time.sleep(0.01)
    run_for(command, out, 1e9)
    assert contents(out) == contents(tmp_path / "once")


def run_for(command: list[str], out: Path, seconds: float) -> tuple[bool, list[int], float]:
    """Run the command and kill it that long after it has begun; whether it ended by itself, its workers, how long."""
    with subprocess.Popen(
        [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (out / ".prepare").is_dir() and process.poll() is None:
            time.sleep(0.002)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.002)
        workers, ended, took = children(process.pid), process.poll() is not None, time.monotonic() - began
        process.kill()
        message = process.stderr.read()
    assert process.returncode == (0 if ended else -signal.SIGKILL), message
    return ended, workers, took


def test_two_at_once_are_refused(tmp_path):
    source, out = archives("coco", tmp_path / "archives"), tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    begun, go_on = fork.Event(), fork.Event()

    def wait(line: str) -> None:
        begun.set()
        go_on.wait(60)

    process = fork.Process(target=_prepare, args=(source, out, wait))
    process.start()
    assert begun.wait(60)
    with pytest.raises(UserError, match="another process is preparing .*out; wait for it, or stop it"):
        run("coco", source, out)
    go_on.set()
    process.join()
    assert process.exitcode == 0 and "is complete" in run("coco", source, out)[-1]


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    source = archives("coco", tmp_path / "archives")
    monkeypatch.setattr("wsss_dist.data.prepare.work.fcntl.lockf", refuse)
    assert "is complete" in run("coco", source, tmp_path / "out")[-1]


def test_the_journal_keeps_names_that_are_no_text(tmp_path):
    work, done = WorkFolder(tmp_path / "out"), []
    key = os.fsdecode(b"caf\xe9.jpg")

    def function(item: str) -> dict:
        done.append(item)
        return {"stamp": [], "files": {}, "problems": [(item, "note", "odd", "kept")]}

    for _ in range(2):
        results = finish_items(work, {}, {key: key}, function, workers=0, track=lambda items, total: items)
    assert done == [key] and json.loads(results[key])["problems"][0][0] == key
    work.release()


def _prepare(source: Path, out: Path, say) -> None:
    from wsss_dist.data.prepare.coco import prepare_coco
    from wsss_dist.data.prepare.inputs import Console, Options

    prepare_coco(Options((source,), out, workers=0, subset=True), Console(say, lambda items, total: items))


def die(item: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_sentence(tmp_path, monkeypatch):
    from wsss_dist.data.prepare import coco

    real = coco._finish_image
    source = archives("coco", tmp_path / "archives")
    monkeypatch.setattr(coco, "_finish_image", die)
    with pytest.raises(UserError, match="one of the 2 worker processes was killed, .*lower --workers"):
        run("coco", source, tmp_path / "out", workers=2)
    monkeypatch.setattr(coco, "_finish_image", real)
    run("coco", source, tmp_path / "out", workers=2)


def test_processes_start_beside_the_threads_of_opencv():
    """A forked process has none of its parent's threads: whatever waits for one of them there waits for ever."""
    text = """
import cv2, numpy as np
from wsss_dist.data.prepare.work import in_processes
cv2.setNumThreads(4)
cv2.GaussianBlur(np.random.rand(3000, 3000).astype(np.float32), (31, 31), 5)
print(list(in_processes(abs, [-1, -2, -3], 2)))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[1, 2, 3]\n"
