"""What the launch scripts share: what a user can put right ends in one sentence and a status, not in a traceback."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from wsss_dist.errors import TrainingError, UserError
from wsss_dist.launchers import first_of_node, printing_rank

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)

# what gloo and NCCL say on the ranks that are left
_RANK_GONE = (
    "closed by peer",
    "reset by peer",
    "Timed out waiting",
    "remote process exited",
    "collective operation timeout",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors, and which takes no abbreviations."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; `python launch/{self.prog} --help` lists what is expected")


def run_command(command: Callable[[], int]) -> int:
    """Run the body of a launch script.

    A UserError or TrainingError is printed to stderr on rank 0 and, as long as the ranks have not met, by one rank of
    every node; a full disk, a file without access, a full memory, a missing package and the end of a loader process on
    the rank that met them. Any other exception passes.

    Returns:
        the status of `command`, 2 a mistake in the input, 74 a full disk, or the error's own.
    """
    try:
        status = command()
        _leave()
        return status
    except (UserError, TrainingError) as error:
        rank = printing_rank()
        if rank == 0 or (not _have_met() and first_of_node()):
            print(f"error{_of_rank(rank)}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        known = _explained(error)
        if known is None:
            raise
        print(f"error{_of_rank(printing_rank())}: {known[0]}", file=sys.stderr)
        return known[1]


def _of_rank(rank: int) -> str:
    return f" on rank {rank}" if rank else ""


def _leave() -> None:
    """Leave the process group: a process that ends inside may be aborted by threads of torch, with another status."""
    dist = sys.modules.get("wsss_dist.dist")
    if dist is not None:
        dist.shutdown()


def _have_met() -> bool:
    """Is there a process group, so that rank 0 has the same error?"""
    dist = sys.modules.get("wsss_dist.dist")
    return dist is not None and dist.world_size() > 1


def _explained(error: Exception) -> tuple[str, int] | None:
    """Sentence and exit status of an exception that does not come from our own checks; None for any other."""
    if isinstance(error, OSError) and error.errno in (*_DISK_FULL, *_NO_ACCESS):
        place = error.filename or "a file of this run"
        if error.errno in _DISK_FULL:
            fix = "free space there and start the same command again: finished checkpoints are intact"
            return f"disk: {place} cannot be written ({error.strerror}); {fix}", 74
        return f"files: {place} cannot be used ({error.strerror}); give yourself access, or name another path", 2
    if isinstance(error, ModuleNotFoundError) and error.name.split(".")[0] not in ("wsss_dist", "kernels"):
        return f"install: '{error.name}' is missing in {sys.executable}; run `make setup`, or `pip install -e .`", 2
    first = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and "DataLoader worker" in first:
        fix = (
            "lower data.num_workers (0: the training process loads), or give a container more shared memory "
            "(docker run --shm-size=8g)"
        )
        return f"memory: {first.rstrip('. ')}, so memory or shared memory may be short; {fix}", 1
    if isinstance(error, RuntimeError) and any(words in first for words in _RANK_GONE):
        fix = "its own message, or that of its node, says why; the same command started again goes on from a checkpoint"
        return f"launch: another rank is gone, or does not answer within train.timeout_s ({first}); {fix}", 1
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        fix = "lower train.micro_batch (the global batch stays), eval.batch or data.crop, or set train.precision: bf16"
        return f"memory: the GPU has not enough ({first}); {fix}", 1
    return None
