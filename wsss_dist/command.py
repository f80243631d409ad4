"""What the launch scripts share: what a user can put right ends in one sentence and a status, not in a traceback."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from wsss_dist.errors import Interrupted, TrainingError, UserError, is_collective
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

    A UserError or TrainingError is printed to stderr, and so are a full disk, a file without access, a full memory, a
    missing package, the end of a loader process and that of a rank. What every rank raises is said by rank 0, what one
    rank met by that one, and as long as the ranks have not met by one rank of every node. Any other exception passes.

    Returns:
        the status of `command`, 2 a mistake in the input, 74 a full disk, 75 after a signal, or the error's own.
    """
    try:
        status = command()
        _leave()
        return status
    except Interrupted as stop:
        if _rank() == 0:
            print(stop, file=sys.stderr)
        _leave()
        return stop.exit_code
    except (UserError, TrainingError) as error:
        _say(error, str(error), first_of_node() or _have_met())
        return error.exit_code
    except Exception as error:
        known = _explained(error)
        if known is None:
            raise
        _say(error, known[0], True)
        return known[1]


def _say(error: Exception, sentence: str, here: bool) -> None:
    """Print it on rank 0, and on any other rank that is to say (`here`) what it does not share with all."""
    rank = _rank()
    if rank == 0 or (here and not is_collective(error)):
        print(f"error{f' on rank {rank}' if rank else ''}: {sentence}", file=sys.stderr)


def _rank() -> int:
    return sys.modules["wsss_dist.dist"].rank() if _have_met() else printing_rank()


def _leave() -> None:
    """Leave the process group: a process that ends inside may be aborted by threads of torch, with another status."""
    dist = sys.modules.get("wsss_dist.dist")
    if dist is not None:
        dist.shutdown()


def _have_met() -> bool:
    """Is there a process group, so that rank 0 has the same error?"""
    dist = sys.modules.get("wsss_dist.dist")
    return dist is not None and dist.world_size() > 1


def _store_lost(error: Exception) -> bool:
    dist = sys.modules.get("wsss_dist.dist")
    return dist is not None and isinstance(error, dist.STORE_LOST)


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
    if _store_lost(error) or (isinstance(error, RuntimeError) and any(words in first for words in _RANK_GONE)):
        fix = "its own message, or that of its node, says why; the same command started again goes on from a checkpoint"
        return f"launch: another rank is gone, or does not answer within train.timeout_s ({first}); {fix}", 1
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        fix = "lower train.micro_batch (the global batch stays), eval.batch or data.crop, or set train.precision: bf16"
        return f"memory: the GPU has not enough ({first}); {fix}", 1
    return None
