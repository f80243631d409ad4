"""Checkpoints: a resumed run is the run that never stopped, and nothing half-written or damaged is ever loaded."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist import checkpoint, dist
from wsss_dist.checkpoint import newest_good, newest_step
from wsss_dist.errors import UserError
from wsss_dist.run_lock import RunLock

SHORT = {"train__steps": 8, "train__global_batch": 4}
PLAIN = {**SHORT, "train__engine": "plain"}
SPLIT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CASES = [
    PLAIN,
    *({**SHORT, **SPLIT, "train__zero_stage": z} for z in range(4)),
    *({**SHORT, **SPLIT, "train__zero_stage": z, "train__precision": "bf16"} for z in (0, 1, 3)),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(ranks, tmp_path):
    cases = CASES if ranks == 1 else CASES[:5]
    for result in run_ranks(
        ranks, tmp_path, work.each, work.resume_both, [tiny.values(**c) for c in cases], tmp_path, 5
    ):
        for case, (whole, resumed) in zip(cases, result, strict=True):
            assert whole[0] == resumed[0], f"{case}: losses differ"
            assert whole[1] == resumed[1], f"{case}: final weights or buffers differ"


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints after steps 2 and 4, and the digest of a resume from each."""
    values, root = tiny.values(**PLAIN), tmp_path / "checkpoints"
    run_ranks(1, tmp_path, work.save, values, root, 2, 4)
    return values, root


def test_layout_keep_and_weights(saved, tmp_path):
    values, root = saved
    manifest = json.loads((root / "ckpt-4" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "engine.pt", "rank-0.pt"}
    weights = load_file(root / "ckpt-4" / "model.safetensors")
    method = tiny.Method(tiny.Config(), tiny.C, 8)
    method.load_state_dict(weights)
    assert all(w.dtype == torch.float32 for w in weights.values())
    run_ranks(1, tmp_path, work.save, values, root, 5, 6, 7)
    assert sorted(p.name for p in root.iterdir()) == ["ckpt-6", "ckpt-7"], "keep is 2"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DAMAGE = {
    "bit flip in the weights": lambda c: _flip(c / "model.safetensors"),
    "bit flip in the optimiser": lambda c: _flip(c / "engine.pt"),
    "bit flip in the manifest": lambda c: _flip(c / "manifest.json"),
    "cut file": lambda c: os.truncate(c / "rank-0.pt", 100),
    "cut manifest": lambda c: os.truncate(c / "manifest.json", 100),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "missing file": lambda c: (c / "engine.pt").unlink(),
    "manifest of another step": lambda c: (c / "manifest.json").write_text(
        (c.parent / "ckpt-2/manifest.json").read_text()
    ),
}


def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(saved, tmp_path):
    values, root = saved
    random.seed(5)
    good = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    at_2 = None
    for what, damage in DAMAGE.items():
        folder = tmp_path / what
        for name, data in good.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        damage(folder / "ckpt-4")
        (folder / ".tmp-6").mkdir()  # a save that was killed
    results = run_ranks(1, tmp_path, work.each, _resume_at, [(values, tmp_path / what) for what in DAMAGE])[0]
    for what, (start, weights, said) in zip(DAMAGE, results, strict=True):
        at_2 = at_2 or weights
        assert (start, weights) == (2, at_2), what
        assert len(said) == 1 and "ckpt-4 is not used" in said[0] and "bad-ckpt-4" in said[0], what
        assert (tmp_path / what / "bad-ckpt-4").is_dir(), f"{what}: the damaged checkpoint was deleted"


def _resume_at(case: tuple) -> tuple:
    return work.resume(*case)


def test_who_only_reads_moves_nothing(saved, capsys, monkeypatch):
    """An evaluation beside the training: the newest good checkpoint counts, and damaged ones stay where they are."""
    _, root = saved
    assert newest_good(root.parent)[0] == root / "ckpt-4" and newest_step(root.parent) == 4
    shutil.copytree(root / "ckpt-4", root / "ckpt-4.bak")
    (root / "ckpt-4/engine.pt").unlink()
    folder, manifest = newest_good(root.parent)
    assert folder == root / "ckpt-2" and manifest["step"] == 2 and newest_step(root.parent) == 4
    assert "ckpt-4 is not used (engine.pt is missing)" in capsys.readouterr().out
    there = sorted(p.name for p in root.iterdir())
    assert there == ["ckpt-2", "ckpt-4", "ckpt-4.bak"]

    def no_more_files(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(checkpoint, "_sha256", no_more_files)
    with pytest.raises(OSError, match="Too many open files"):  # says nothing about the checkpoint
        newest_good(root.parent)
    (root / "ckpt-2/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds no good checkpoint"):
        newest_good(root.parent)
    assert sorted(p.name for p in root.iterdir()) == there


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_the_next(saved, monkeypatch, capsys):
    _, root = saved
    verified = checkpoint._verified

    def rotate(folder, step):
        monkeypatch.setattr(checkpoint, "_verified", verified)
        (root / "ckpt-4").rename(root / "gone")  # as the training does once a newer one is there
        return verified(folder, step)

    monkeypatch.setattr(checkpoint, "_verified", rotate)
    assert newest_good(root.parent)[0] == root / "ckpt-2" and not capsys.readouterr().out


@pytest.mark.parametrize("stage", [None, 3])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_keeps_the_last(stage, tmp_path):
    options = PLAIN if stage is None else {**SHORT, "train__zero_stage": stage}
    values, root = tiny.values(**options), tmp_path / "checkpoints"
    # the limit is on rank 1 and below the size of any of its files
    run_ranks(2, tmp_path, _save_limited, values, root)
    assert [p.name for p in root.iterdir()] == ["ckpt-2"]
    assert [r[0] for r in run_ranks(2, tmp_path, work.resume, values, root)] == [2, 2]


def _save_limited(values: dict, root: Path) -> None:
    with pytest.raises(
        work.CheckpointError, match=r"rank 1 could not write .*tmp-4.* bytes, \d+ are free.*intact"
    ) as error:
        work.save(values, root, 2, 4, limit=600)
    assert error.value.exit_code == 74


def test_too_little_free_space_is_refused_before_anything_is_written(saved, tmp_path):
    values, root = saved
    kind, message = run_ranks(1, tmp_path, _save_on_full_disk, values, root, fails=True)[0]
    assert kind == "CheckpointError" and "no space left" in message and "needs about" in message
    assert sorted(p.name for p in root.iterdir()) == ["ckpt-2", "ckpt-4"]


def test_what_a_killed_save_left_behind_is_room(saved, tmp_path):
    values, root = saved
    (root / ".tmp-6").mkdir()
    (root / ".tmp-6/model.safetensors").write_bytes(b"0" * 1000)
    assert run_ranks(1, tmp_path, _check_space, values, root) == [None]
    assert not (root / ".tmp-6").exists()


def _check_space(values: dict, root: Path) -> None:
    import wsss_dist.checkpoint

    wsss_dist.checkpoint._free = lambda folder: 10 if (folder / ".tmp-6").exists() else 10**12
    work.check_space(values, root)


def _save_on_full_disk(values: dict, root: Path) -> None:
    import wsss_dist.checkpoint

    wsss_dist.checkpoint._free = lambda folder: 10
    work.save(values, root, 6)


def test_a_checkpoint_of_another_model_is_refused_with_the_keys_that_differ(saved, tmp_path):
    values, root = saved
    identity = {"method.name": "tiny", "method.width": 9}
    kind, message = run_ranks(1, tmp_path, _resume_other, values, root, identity, fails=True)[0]
    assert kind == "UserError" and "'method.width' is 9, there None" in message and "run.name" in message


def _resume_other(values: dict, root: Path, identity: dict) -> None:
    work.resume(values, root, identity=identity)


def test_nothing_in_a_checkpoint_can_run_code(saved, tmp_path):
    values, root = saved
    zero = tiny.values(**SHORT, train__zero_stage=1)
    run_ranks(1, tmp_path, work.save, zero, tmp_path / "zero", 2)
    for folder, name, case in ((root / "ckpt-4", "engine.pt", values), (root / "ckpt-4", "rank-0.pt", values)):
        kind = run_ranks(1, tmp_path, _resume_poisoned, case, folder, name, fails=True)[0][0]
        assert kind == "UnpicklingError", name
    for path in (tmp_path / "zero/ckpt-2/ds").glob("*.pt"):
        copy = tmp_path / path.stem
        shutil.copytree(tmp_path / "zero", copy)
        case = (_resume_poisoned, zero, copy / "ckpt-2", f"ds/{path.name}")
        assert run_ranks(1, tmp_path, *case, fails=True)[0][0] == "UnpicklingError", path.name
        # dealt to another number of ranks
        assert run_ranks(2, tmp_path, *case, fails=True)[0][0] == "UnpicklingError", path.name
    assert not (tmp_path / "ran").exists()


class _Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def _resume_poisoned(values: dict, folder: Path, name: str) -> None:
    dist.on_main(lambda: _poison(folder, name))
    work.resume(values, folder.parent)


def _poison(folder: Path, name: str) -> None:
    torch.save({"buffers": _Payload(str(folder.parent.parent / "ran"))}, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
    manifest["sha256"] = checkpoint._digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


HOLD = "import sys, time; from pathlib import Path; from wsss_dist.run_lock import RunLock; "
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_lock(tmp_path):
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on host"):
        RunLock(tmp_path)
    lock.release()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on host .*run.name"):
            RunLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    lock = RunLock(tmp_path, said.append)
    assert len(said) == 1 and f"process {other.pid}" in said[0] and "taken over" in said[0]
    lock.release()
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere-" + socket.gethostname(), "pid": 1}))
    with pytest.raises(UserError, match=r"process 1 on host elsewhere.*delete .*lock\.json"):
        RunLock(tmp_path)
