"""Where the time of a training step goes. The step is not changed: a few functions are wrapped while it is watched.

A moment belongs to the innermost phase that is open:

    loader            the next batches, and their copy to the device
    backbone          modules called `backbone`, with gradient
    heads and losses  the rest of the forward pass with gradient
    CAM backbone      modules called `backbone`, without gradient: the passes that pseudo labels are made from
    CAM and labels    the rest of what the forward pass does under torch.no_grad
    PAR, region selection, region masks, contrast, dense energy
                      the operators of `OPERATORS`, forward, with or without gradient
    backward          all gradients, those of the operators too
    optimiser         clipping, update, clearing of the gradients, the method's after_step
    communication     collectives, the wait for other ranks included. On a GPU what the compute stream waits for: what
                      runs beside the computation counts as that
    other             the rest: seeds, logged scalars, the check that the loss is finite

So the phases of a step add up to the time from its first to its last moment. On a GPU a moment is an event in the
compute stream: nothing waits, and a phase is the time the GPU took for it, or waited for the CPU in it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch

from wsss_dist import dist
from wsss_dist.data.batch import Batch
from wsss_dist.engine import Engine
from wsss_dist.methods.base import BaseMethod

LOADER, BACKBONE, HEADS, CAM_BACKBONE, LABELS = (
    "loader",
    "backbone",
    "heads and losses",
    "CAM backbone",
    "CAM and labels",
)
BACKWARD, OPTIMISER, COMMUNICATION, OTHER = "backward", "optimiser", "communication", "other"
OPERATORS = {
    "par": "PAR",
    "select_regions": "region selection",
    "max_upsampled_masks": "region masks",
    "patch_token_contrast": "contrast",
    "class_patch_contrast": "contrast",
    "dense_energy": "dense energy",
}
ORDER = [
    *(LOADER, BACKBONE, HEADS, CAM_BACKBONE, LABELS),
    *dict.fromkeys(OPERATORS.values()),
    *(BACKWARD, OPTIMISER, COMMUNICATION, OTHER),
]


class Recorder:
    """Adds up what passes in each phase, by a counter that is read at every change of phase.

    Args:
        read: the counter: seconds of a clock, operations done, or an event of a GPU stream.
        between: what passed between two readings; default: their difference.
    """

    def __init__(self, read: Callable[[], Any], between: Callable[[Any, Any], float] | None = None):
        self._read, self._between = read, between or (lambda a, b: b - a)
        self._open = [OTHER]
        self._readings: list[tuple[str, Any]] = []

    def start(self) -> None:
        """The first moment."""
        self._readings = [(OTHER, self._read())]

    def push(self, phase: str) -> None:
        """Open a phase."""
        self._open.append(phase)
        self._readings.append((phase, self._read()))

    def pop(self) -> None:
        """Close the phase opened last."""
        self._open.pop()
        self._readings.append((self.phase, self._read()))

    @property
    def phase(self) -> str:
        """The innermost open phase."""
        return self._open[-1]

    def stop(self) -> None:
        """The last moment."""
        self._readings.append((OTHER, self._read()))

    def totals(self) -> dict[str, float]:
        """What passed in each phase, in the order of `ORDER`. On a GPU it waits for the events."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        totals = dict.fromkeys(ORDER, 0.0)
        for (phase, begin), (_, end) in zip(self._readings, self._readings[1:], strict=False):
            totals[phase] += self._between(begin, end)
        return totals


def stopwatch(device: torch.device, clock: str) -> Recorder:
    """A recorder of seconds: events of the current stream on a GPU, else the "wall" or the "cpu" clock."""
    if device.type != "cuda":
        return Recorder(time.process_time if clock == "cpu" else time.perf_counter)
    stream = torch.cuda.current_stream(device)

    def read() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    return Recorder(read, lambda a, b: a.elapsed_time(b) / 1e3)


class Watch:
    """Wraps the functions whose time is told apart; `recorder` is who is told, None between the steps that are watched.

    Leaving the context puts everything back.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Watch:
        owner, names = dist.collectives()
        for name in names:
            self.function(owner, name, COMMUNICATION)
        self.function(Batch, "to", LOADER)
        self._no_grad()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside belongs to a phase."""
        recorder = self.recorder
        if recorder is None:
            yield
            return
        recorder.push(name)
        try:
            yield
        finally:
            recorder.pop()

    def function(self, owner: Any, name: str, phase: str | Callable[[], str]) -> None:
        """Let the calls of `owner.name` belong to a phase, or to the one that `phase` says at the time."""
        original, own = getattr(owner, name), name in vars(owner)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.recorder is None:
                return original(*args, **kwargs)
            with self.phase(phase if isinstance(phase, str) else phase()):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        self._undo.callback(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def operators(self, module: ModuleType) -> None:
        """Watch those functions of a module that `OPERATORS` names, and its `backbone` where it has one."""
        for name, phase in OPERATORS.items():
            if hasattr(module, name):
                self.function(module, name, phase)
        if hasattr(module, "backbone"):
            self.function(module, "backbone", _backbone_phase)

    def method(self, method: BaseMethod) -> None:
        """Watch the modules called `backbone`, or `network` where there are none, and after_step."""
        found = {last: [m for n, m in method.named_modules() if n.rpartition(".")[2] == last] for last in NETWORKS}
        for module in found[NETWORKS[0]] or found[NETWORKS[1]]:
            for handle in (
                module.register_forward_pre_hook(lambda *_: self._enter(_backbone_phase())),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ):
                self._undo.callback(handle.remove)
        self.function(method, "after_step", OPTIMISER)

    def engine(self, engine: Engine) -> None:
        """Watch the three parts of a step."""
        for name, phase in (("forward", HEADS), ("backward", BACKWARD), ("update", OPTIMISER)):
            self.function(engine, name, phase)

    def _enter(self, phase: str) -> None:
        if self.recorder is not None:
            self.recorder.push(phase)

    def _leave(self) -> None:
        if self.recorder is not None:
            self.recorder.pop()

    def _no_grad(self) -> None:
        """Tell when the forward pass does something without gradient."""
        enter, leave, main = torch.no_grad.__enter__, torch.no_grad.__exit__, threading.get_ident()

        def timed_enter(context: Any) -> None:
            enter(context)
            recorder = self.recorder
            context.opened = recorder is not None and recorder.phase == HEADS and threading.get_ident() == main
            if context.opened:
                recorder.push(LABELS)

        def timed_leave(context: Any, *error: Any) -> None:
            if getattr(context, "opened", False):
                self._leave()
            leave(context, *error)

        torch.no_grad.__enter__, torch.no_grad.__exit__ = timed_enter, timed_leave

        def restore() -> None:
            torch.no_grad.__enter__, torch.no_grad.__exit__ = enter, leave

        self._undo.callback(restore)


NETWORKS = ("backbone", "network")


def _backbone_phase() -> str:
    return BACKBONE if torch.is_grad_enabled() else CAM_BACKBONE
