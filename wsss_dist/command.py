"""What the launch scripts share: what a user can put right ends in one sentence and a status, not in a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from wsss_dist.errors import TrainingError, UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors, and which takes no abbreviations."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; `python launch/{self.prog} --help` lists what is expected")


def run_command(command: Callable[[], int]) -> int:
    """Run the body of a launch script.

    A UserError or TrainingError is printed to stderr on rank 0; a full disk, a file without access, a full memory, a
    missing package and the end of a loader process on the rank that met them. Any other exception passes.

    Returns:
        the status of `command`, 2 a mistake in the input, 74 a full disk, or the error's own.
    """
    rank = os.environ.get("RANK", "0")
    try:
        return command()
    except (UserError, TrainingError) as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        known = _explained(error)
        if known is None:
            raise
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {known[0]}", file=sys.stderr)
        return known[1]


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
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        fix = "lower train.micro_batch (the global batch stays), eval.batch or data.crop, or set train.precision: bf16"
        return f"memory: the GPU has not enough ({first}); {fix}", 1
    return None
