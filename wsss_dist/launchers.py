"""Which rank a process is: from RANK and the like, as torchrun and deepspeed set them, or from the variables of Slurm.

`srun` starts one process per task and sets SLURM_* alone. Its step has as many ranks as tasks; the first host of its
node list is where they meet, at a port made of the numbers of job and step, so that two jobs on a node do not collide.
MASTER_ADDR and MASTER_PORT overrule both.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from wsss_dist.errors import UserError

_FIRST_PORT, _PORTS = 15000, 10000  # below those the system gives out by itself


def adopt_slurm(env: MutableMapping[str, str] = os.environ) -> bool:
    """In a task of srun for which no launcher did, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Returns:
        whether this is such a task.
    Raises:
        UserError: the variables contradict each other, or srun was forgotten.
    """
    if "RANK" in env or "SLURM_JOB_ID" not in env:
        return False
    if "SLURM_STEP_NUM_TASKS" not in env:
        if _number(env, "SLURM_NTASKS", "1") > 1:
            raise UserError(
                f"launch: SLURM_NTASKS is {env['SLURM_NTASKS']}, but srun did not start this process; write srun "
                "before the command, or start it with torchrun or deepspeed"
            )
        return False
    tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    if tasks == 1:
        return False
    if wrong := _contradiction(env, tasks):
        raise UserError(
            f"launch: the variables of Slurm contradict each other: {wrong}; leave them as srun sets them, or start "
            "with torchrun, which needs none of them"
        )
    port = _FIRST_PORT + (7 * _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID", "0")) % _PORTS
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=env["SLURM_LOCALID"])
    env.setdefault("MASTER_ADDR", first_host(_hosts(env)))
    env.setdefault("MASTER_PORT", str(port))
    return True


def _contradiction(env: MutableMapping[str, str], tasks: int) -> str | None:
    """What is wrong with the variables of a step of so many tasks."""
    rank, local, node = (_number(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    text = env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))
    per_node = _tasks_per_node(text)
    if rank >= tasks:
        return f"SLURM_PROCID is {rank} and SLURM_STEP_NUM_TASKS {tasks}"
    if sum(per_node) != tasks:
        return f"SLURM_STEP_TASKS_PER_NODE is {text} and SLURM_STEP_NUM_TASKS {tasks}"
    if node >= len(per_node):
        return f"SLURM_NODEID is {node} and SLURM_STEP_TASKS_PER_NODE {text}, which is {len(per_node)} nodes"
    if local >= per_node[node]:
        return f"SLURM_LOCALID is {local}, and of SLURM_STEP_TASKS_PER_NODE {text} node {node} has {per_node[node]}"
    if _number(env, "WORLD_SIZE", str(tasks)) != tasks:
        return f"WORLD_SIZE is {env['WORLD_SIZE']} and SLURM_STEP_NUM_TASKS {tasks}"
    if "MASTER_ADDR" not in env and not _hosts(env):
        return "SLURM_STEP_NODELIST is missing, and MASTER_ADDR too"
    if "MASTER_ADDR" not in env and rank == 0 and node != 0:
        return f"SLURM_PROCID 0 has SLURM_NODEID {node}, so MASTER_ADDR has to name its host"
    return None


def _hosts(env: MutableMapping[str, str]) -> str:
    return env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")


def launched(env: MutableMapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Rank and number of ranks that a launcher set; None where none did, so that there is one process.

    Raises:
        UserError: RANK without WORLD_SIZE, a rank that is none of them, or no place to meet.
    """
    if "RANK" not in env:
        return None
    if "WORLD_SIZE" not in env:
        raise UserError("launch: RANK is set without WORLD_SIZE; unset it, or start with torchrun or deepspeed")
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank >= world_size:
        raise UserError(
            f"launch: RANK is {rank} and WORLD_SIZE {world_size}; expected 0 .. {world_size - 1}: give every node "
            "another node rank, and all of them the same number of nodes"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UserError(
                f"launch: {name} is not set, so the ranks cannot meet; start with torchrun or deepspeed, which set it, "
                "or set it to the same on every node"
            )
    _number(env, "MASTER_PORT")
    return rank, world_size


def printing_rank(env: MutableMapping[str, str] = os.environ) -> int:
    """Rank of this process, as far as it can be told before the ranks have met; 0 without a launcher."""
    return _first_number(env, "RANK", "SLURM_PROCID")


def first_of_node(env: MutableMapping[str, str] = os.environ) -> bool:
    """Is this the first rank of its node, as far as it can be told before the ranks have met?"""
    return _first_number(env, "LOCAL_RANK", "SLURM_LOCALID") == 0


def _first_number(env: MutableMapping[str, str], *names: str) -> int:
    text = next((env[name] for name in names if name in env), "0")
    return int(text) if text.isdecimal() else 0


def first_host(nodes: str) -> str:
    """First host of a node list of Slurm: "gpu[007-010,12],cpu1" -> "gpu007"."""
    depth, first = 0, ""
    for letter in nodes:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            break
        first += letter
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_per_node(text: str) -> list[int]:
    """ "4(x2),3" -> [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _number(env: MutableMapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.isdecimal():
        found = "not set" if text is None else repr(text)
        raise UserError(f"launch: {name} is {found}; expected a whole number: leave it to srun, torchrun or deepspeed")
    return int(text)
