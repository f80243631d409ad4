"""SIGTERM and SIGINT as a flag, which is looked at where work can be left: between two steps, between two images."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_received: int | None = None
_noting = False


def received() -> int | None:
    """Number of the signal that came inside of `interruptible`; None: none."""
    return _received


def signal_name(number: int) -> str:
    """As "SIGTERM"."""
    return signal.Signals(number).name


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT only set a flag; a second one acts as usual. Inside of another one it does nothing.

    `dist.shared` hands out no more then and raises Interrupted on every rank; the trainer saves a checkpoint.
    """
    global _received, _noting
    if _noting:
        yield
        return

    def note(number: int, _: Any) -> None:
        global _received
        _received = number
        signal.signal(number, before[number])

    # None: a handler that is not of Python
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    _noting = True
    try:
        yield
    finally:
        _received, _noting = None, False
        for number, handler in before.items():
            signal.signal(number, handler)
