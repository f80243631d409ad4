"""The lock of a run folder: one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from wsss_dist.errors import UserError

_locked: set[Path] = set()  # by this process: a record lock does not stop its own process


class RunLock:
    """Keeps a second run out of a folder; the file holds host and process id, and is empty when nobody runs.

    A record lock of the operating system goes with the process, so what a killed run leaves behind is recognised on the
    same host. Of another host only its file is known, which has to be removed by hand, unless it is of an earlier
    start of this job, which Slurm ended before it started the job again.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.resolve() / "lock.json"
        me = {"host": socket.gethostname(), "pid": os.getpid(), **_job()}
        if self.path in _locked:
            raise UserError(_refusal(folder, me, "give this run another run.name"))
        self._file = open(self.path, "a+")  # noqa: SIM115  held until release()
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self._owner()
            self._file.close()
            raise UserError(_refusal(folder, owner, "stop it, or give this run another run.name")) from None
        owner = self._owner()
        if owner and owner["host"] != me["host"] and not _requeued(owner):
            self._file.close()
            raise UserError(_refusal(folder, owner, f"if that run is gone, delete {self.path}"))
        if owner:
            report(f"the lock of process {owner['pid']}, which ended without removing it, is taken over")
        self._write(json.dumps(me))
        _locked.add(self.path)

    def release(self) -> None:
        """Give the folder free."""
        self._write("")
        self._file.close()
        _locked.discard(self.path)

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def _owner(self) -> dict | None:
        self._file.seek(0)
        try:
            owner = json.loads(self._file.read())
            return {**owner, "host": str(owner["host"]), "pid": int(owner["pid"])}
        except (ValueError, KeyError, TypeError):
            return None


def _job() -> dict[str, str]:
    """Number of the job of Slurm that this process belongs to, and how often it was started again."""
    job = os.environ.get("SLURM_JOB_ID")
    return {} if job is None else {"job": job, "restarts": os.environ.get("SLURM_RESTART_COUNT", "0")}


def _requeued(owner: dict) -> bool:
    """Is the owner of a lock an earlier start of this job?"""
    mine = _job()
    return bool(mine) and owner.get("job") == mine["job"] and owner.get("restarts") != mine["restarts"]


def _refusal(folder: Path, owner: dict | None, fix: str) -> str:
    who = f"process {owner['pid']} on host {owner['host']}" if owner else "another process"
    return f"run: {folder} is in use by {who}; {fix}"
