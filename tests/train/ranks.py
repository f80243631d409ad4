"""Runs a function on N processes that meet through a file, without a launcher."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 600  # a run takes seconds, but on a machine that is busy with other things
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_context = mp.get_context("forkserver")
# Imported once for all ranks. Without the third line each rank with ZeRO spends two seconds on imports of its own (the
# optimiser in it asks for torch.compile), without the fourth each trainer one. A module that is not there is left out.
_context.set_forkserver_preload(
    [
        "deepspeed",
        "wsss_dist.trainer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        *("torch.utils.tensorboard", "wsss_dist.report_plots"),
        *("tests.train.tiny", "tests.methods.pcre_runs", "tests.methods.stage_runs"),
        "tests.train.warm",
    ]
)


def install() -> None:
    """Let configs name the method of the tests."""
    import wsss_dist.config
    import wsss_dist.trained
    import wsss_dist.trainer
    from tests.train import tiny

    for module in (wsss_dist.config, wsss_dist.trained, wsss_dist.trainer):
        original = module.load_method
        module.load_method = lambda name, original=original: tiny if name == "tiny" else original(name)


def _child(
    queue: Any, rendezvous: str, rank: int, world_size: int, environment: dict | None, function: Callable, args: tuple
) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    meets = world_size > 1 and environment is None
    if environment is not None:
        os.environ.update(environment)
    elif world_size > 1:
        os.environ["LOCAL_RANK"] = str(rank)
    import torch

    from wsss_dist import dist

    torch.set_num_threads(1)
    install()
    try:
        if meets:
            dist.init(60, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        queue.put((rank, function(*args), None))
    except BaseException as error:
        queue.put((rank, (type(error).__name__, str(error)), traceback.format_exc()))
    finally:
        sys.stdout.flush()
        queue.close()
        queue.join_thread()
        dist.shutdown()


def run_ranks(
    world_size: int,
    tmp_path: Path,
    function: Callable,
    *args: Any,
    fails: bool = False,
    environments: list[dict] | None = None,
) -> list[Any]:
    """`function(*args)` on every rank.

    With `environments` each process has those variables more, and the ranks do not meet before `function` makes them.

    Returns:
        what each rank returned, in the order of the ranks; with fails=True (type name, message) of what each raised.
    """
    queue, name = _context.Queue(), f"meet-{os.urandom(4).hex()}"
    children = [
        _context.Process(target=_child, args=(queue, str(tmp_path / name), r, world_size, extra, function, args))
        for r, extra in enumerate(environments or [None] * world_size)
    ]
    for child in children:
        child.start()
    try:
        got = sorted((queue.get(timeout=TIMEOUT_S) for _ in children), key=lambda g: g[0])
    finally:
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
    for rank, _, trace in got:
        assert (trace is not None) == fails, f"rank {rank}: {trace}"
    return [value for _, value, _ in got]
