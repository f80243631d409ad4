"""Runs over two nodes, here two launchers on one machine: the bits of one node, and one sentence for a mistake."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.data.synthetic import write_synthetic_dataset
from tests.train import tiny
from tests.train.ranks import run_ranks
from wsss_dist import agreement, dist
from wsss_dist.command import run_command
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError
from wsss_dist.launchers import adopt_slurm, first_host, launched
from wsss_dist.run_lock import RunLock
from wsss_dist.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("nodes") / "data", 12, 2, 32, 3, seed=1)


def values_of(data: Path, folder: Path, **changes: object) -> dict:
    values = tiny.values(folder, **changes)
    values["data"] = {"format": "coco", "root": str(data), "crop": 16, "num_workers": 0}
    values["train"] |= {"steps": 3, "global_batch": 4, "log_every": 1, "zero_stage": 1}
    return values


def run(values: dict) -> int:
    return Trainer(parse_config(values)).train()


def made(folder: Path) -> dict[str, bytes]:
    """What a run made, but for what has its time or its place in it."""
    names = ("metrics.jsonl", "checkpoints/ckpt-3/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def start(commands: list[list[str]], wait_s: float = 300) -> list[tuple[int, str]]:
    """Exit status and output of commands that run at the same time."""
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    keep |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{keep['PATH']}"}
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=keep,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command in commands
    ]
    try:
        return [(p.wait(), out) for p in running for out in [p.communicate(timeout=wait_s)[0]]]
    finally:
        for process in running:
            if process.poll() is None:  # a launcher does not take its ranks with it
                os.killpg(process.pid, signal.SIGKILL)


LAUNCHERS = {
    "deepspeed": (["deepspeed", "--hostfile", "hosts", "--no_ssh"], {"engine": "deepspeed", "zero_stage": 2}),
    "torchrun": (["torchrun", "--nnodes", "2", "--nproc_per_node", "1"], {"engine": "plain", "zero_stage": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_launchers_give_the_bits_of_one_node(name, data, tmp_path):
    launcher, engine = LAUNCHERS[name]
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    launcher = [str(tmp_path / word) if word == "hosts" else word for word in launcher]
    values = values_of(data, tmp_path)
    values["method"] = {"name": "classifier", "backbone": {"name": "vit_tiny_patch16_224", "weights": None}}
    values["data"]["crop"] = 32
    values["train"] |= engine
    values["run"]["name"] = "one"
    assert run_ranks(2, tmp_path, run, values) == [0, 0]
    values["run"]["name"] = "two"
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    meet = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    script = ["launch/train.py", "--config", str(tmp_path / "two.yaml")]
    for status, out in start([[*launcher, "--node_rank", str(node), *meet, *script] for node in (0, 1)]):
        assert status == 0, out[-3000:]
    assert made(tmp_path / "two") == made(tmp_path / "one")


@pytest.mark.parametrize("script", ["evaluate", "pseudo_labels"])
def test_the_torchrun_script_hands_on_options_like_its_own(script, tmp_path):
    """torchrun takes --run, behind the script too, for a part of its --run-path, unless `--` says where its own end."""
    of_node = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **of_node, "NPROC_PER_NODE": "1", "SCRIPT": f"launch/{script}.py", "PATH": path}
    command = ["launch/torchrun.sh", "--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert f"error: command line: --run is '{tmp_path}', which holds no config.yaml" in done.stderr


def slurm(rank: int, **changes: str | None) -> dict[str, str]:
    """What srun sets for a task of two nodes with one task each."""
    env = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    return {k: v for k, v in {**env, **changes}.items() if v is not None}


def test_two_tasks_of_srun_give_the_bits_of_one_node(data, tmp_path):
    values = values_of(data, tmp_path)
    values["run"]["name"] = "one"
    assert run_ranks(2, tmp_path, run, values) == [0, 0]
    values["run"]["name"] = "two"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [slurm(rank, **place) for rank in (0, 1)]
    assert run_ranks(2, tmp_path, run, values, environments=environments) == [0, 0]
    assert made(tmp_path / "two") == made(tmp_path / "one")


def test_slurm_is_the_launcher_where_there_is_no_other():
    env = slurm(1)
    assert adopt_slurm(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("1", "2", "0", "gpu007")
    assert 15000 <= int(env["MASTER_PORT"]) < 25000
    other, again = slurm(1, SLURM_STEP_ID="3"), slurm(0)
    assert adopt_slurm(other) and adopt_slurm(again)
    assert other["MASTER_PORT"] != env["MASTER_PORT"] == again["MASTER_PORT"], "two steps on one node"
    wide = slurm(6, SLURM_NODEID="1", SLURM_STEP_NUM_TASKS="11", SLURM_STEP_TASKS_PER_NODE="4(x2),3", SLURM_LOCALID="2")
    assert adopt_slurm(wide) and wide["LOCAL_RANK"] == "2" and launched(wide) == (6, 11)
    for env in (
        slurm(0, RANK="5"),  # by torchrun, started by srun
        slurm(0, SLURM_STEP_NUM_TASKS="1"),
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"},
        {},
    ):
        before = dict(env)
        assert not adopt_slurm(env) and env == before


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"SLURM_PROCID": "2"}, "SLURM_PROCID is 2 and SLURM_STEP_NUM_TASKS 2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, r"TASKS_PER_NODE is 2\(x2\) and SLURM_STEP_NUM_TASKS 2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "?"}, r"TASKS_PER_NODE is \? and"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID is 2 and .* which is 2 nodes"),
        ({"SLURM_LOCALID": "1"}, "SLURM_LOCALID is 1, and of .* node 1 has 1"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 and SLURM_STEP_NUM_TASKS 2"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is missing, and MASTER_ADDR too"),
        ({"SLURM_PROCID": "0"}, "SLURM_PROCID 0 has SLURM_NODEID 1"),
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set; expected a whole number"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'; expected a whole number"),
        ({"SLURM_STEP_NUM_TASKS": None}, "SLURM_NTASKS is 2, but srun did not start this process; write srun"),
    ],
)
def test_slurm_variables_that_contradict_each_other(changes, found):
    with pytest.raises(UserError, match=found):
        adopt_slurm(slurm(1, **changes))


def test_the_first_host_of_a_node_list():
    for nodes, first in (("a", "a"), ("a,b", "a"), ("a[03-05,9],b", "a03"), ("r[1-2]n[4,7]", "r1n4"), ("", "")):
        assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"RANK": "1"}, "RANK is set without WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2; .* another node rank"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_variables_of_a_launcher_that_make_no_rank(env, found):
    with pytest.raises(UserError, match=found):
        launched(env)


def _meet(seconds: int) -> float:
    begin = time.monotonic()
    try:
        dist.init(seconds)
    except UserError as error:
        raise UserError(f"{error} [{time.monotonic() - begin:.1f} s]") from None


@pytest.mark.parametrize(
    ("rank", "address", "found"),
    [
        (1, "127.0.0.1", r"rank 1 of 2 on \S+ cannot reach the first rank at 127.0.0.1, .*Connection refused"),
        (1, "node0.invalid", "cannot reach the first rank at node0.invalid, .*firewall"),
        (0, "127.0.0.1", "the ranks cannot meet.*look at the 2 ranks: all have to come within 2 s"),
    ],
)
def test_a_node_that_does_not_come_is_one_sentence_within_the_timeout(rank, address, found, tmp_path):
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": free_port()}
    ((kind, message),) = run_ranks(1, tmp_path, _meet, 2, fails=True, environments=[env])
    assert kind == "UserError" and "\n" not in message
    pattern = found + r".* \[(\d+\.\d) s\]"
    match = re.search(pattern, message)
    assert match, message
    # the time-out itself, what torch adds to it, and looking up a name on a machine that is busy
    assert float(match[1]) < 2 + 10


def _differently(values: list[dict], code: bool = False) -> int:
    if code and dist.rank() == 1:
        agreement._code = lambda: "digest 0"
    return run(values[dist.rank()])


def test_nodes_that_differ_are_told_apart_before_anything_is_written(data, tmp_path):
    other = write_synthetic_dataset(tmp_path / "other", 11, 2, 32, 3, seed=1)
    host = socket.gethostname()
    base = values_of(data, tmp_path / "runs")
    for changes, code, found in (
        ({"optim": {**base["optim"], "lr": 0.5}}, False, r"config 'optim.lr' is 0.5, on rank 0 0.001; give every node"),
        (
            {"data": {**base["data"], "root": str(other)}},
            False,
            "data of split 'train' is '11 images, .*, on rank 0 '12 images",
        ),
        ({}, True, "code is 'digest 0', on rank 0 'digest "),
        ({"data": {**base["data"], "root": "/nowhere"}}, False, rf"'/nowhere'.*\(found by rank 1 on {host}\)"),
    ):
        values = [base, {**base, **changes}]
        first, second = run_ranks(2, tmp_path, _differently, values, code, fails=True)
        assert first == second and first[0] == "UserError", "each rank ends with the same sentence"
        assert re.search(found, first[1]), first[1]
        assert "rank 1" in first[1] and host in first[1]
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_is_not_shared(data, tmp_path):
    values = [values_of(data, tmp_path / f"node{n}") for n in (0, 1)]
    (tmp_path / "node1/tiny").mkdir(parents=True)
    for kind, message in run_ranks(2, tmp_path, _impatient, values, fails=True):
        assert kind == "UserError" and "node0/tiny is not shared: rank 1 on" in message and "set run.dir" in message
    assert not list((tmp_path / "node0/tiny").glob(".shared-*"))


def test_the_mark_of_a_start_that_was_killed_goes(tmp_path):
    for name, age in ((".shared-old", 3700), (".shared-new", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    mine = agreement._mark(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".shared-new", mine.name}, "another start may be looking at it"


def test_the_lock_of_a_node_that_died_is_that_of_the_job_which_was_started_again(tmp_path, monkeypatch):
    lost = {"host": "lost", "pid": 1, "job": "4711", "restarts": "0"}
    (tmp_path / "lock.json").write_text(json.dumps(lost))
    for job, restarts in ((None, None), ("4712", "1"), ("4711", None)):
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"process 1 on host lost.*delete .*lock\.json"):
            RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert len(said) == 1 and "process 1" in said[0] and "taken over" in said[0]


def _left_alone() -> tuple[int, str]:
    if dist.rank() == 1:
        dist.shutdown()
        return 0, ""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        return run_command(lambda: dist.barrier() or 0), error.getvalue()


def test_a_rank_that_is_gone_is_one_sentence_on_those_that_are_left(tmp_path):
    (status, text), _ = run_ranks(2, tmp_path, _left_alone)
    assert status == 1 and text.startswith("error: launch: another rank is gone") and text.count("\n") == 1


def _impatient(values: list[dict]) -> int:
    agreement._SEEN_WITHIN_S = 1
    return _differently(values)
