"""What the tests of the memory prediction measure: bytes that real steps and real engines hold."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.measure import peak_bytes
from tests.train.work import make_engine, steps_of
from wsss_dist import engine as engine_module
from wsss_dist.benchmark import synthetic
from wsss_dist.benchmark.contest import random_weights
from wsss_dist.benchmark.live import Live
from wsss_dist.benchmark.state import engine_state
from wsss_dist.config import parse_config
from wsss_dist.methods import load_method
from wsss_dist.methods.base import BaseMethod
from wsss_dist.models.pretrained import no_parts
from wsss_dist.precision import autocast

M_MMAP_THRESHOLD, OWN_PAGES = -3, 65536


def step_of(values: dict) -> tuple[BaseMethod, list[Tensor], Callable[[], None]]:
    """A step on the CPU with the tags that are predicted for: its method, its inputs, forward and backward."""
    cfg = parse_config(values)
    classes = len(cfg.data.classes)
    with no_parts():
        method = load_method(cfg.method_name).Method(random_weights(cfg.method), classes, cfg.train.steps).train()
    batch = synthetic.make_batch(cfg.data, classes, cfg.train.micro_batch, 0)
    batch.labels.zero_()[:, : synthetic.TAGS["voc"][1]] = 1.0

    def step() -> None:
        with autocast(cfg.train.precision == "bf16"):
            loss = method(batch, int(0.9 * cfg.train.steps))["loss"]
        loss.backward()

    return method, [batch.images, batch.labels, batch.boxes, batch.draws], step


def live_of(values: dict) -> Live:
    """What is alive in one."""
    method, inputs, step = step_of(values)
    live = Live(parameters=method.parameters())
    live.known([*method.parameters(), *method.buffers(), *inputs])
    with live:
        step()
    return live


def resident_of(values: dict) -> int | None:
    """Growth of the process in one, in a process of its own: each tensor has pages of its own there.

    Else malloc keeps what is freed, and the process holds more than its tensors.
    """
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, OWN_PAGES)
    method, _, step = step_of(values)
    step()  # what is allocated once
    method.zero_grad(set_to_none=True)
    return peak_bytes(step, torch.device("cpu"))


def engine_bytes(values: dict, ranks: int = 1) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a rank's engine, found and predicted: at rest, with the gradients of a step, more in its update.

    The optimiser is torch's fused one, as on a GPU.
    """
    build, found = engine_module.build_optimizer, {}

    def fused(*args: object) -> torch.optim.Optimizer:
        made = build(*args)
        for group in made.param_groups:
            group.update(fused=True, foreach=False)
        return made

    with pytest.MonkeyPatch.context() as patch, Live() as live:
        patch.setattr(engine_module, "build_optimizer", fused)
        engine = make_engine(values)
        steps_of(engine, 0, 1)
        gc.collect()
        found["at rest"], update = live.now, engine.update

        def watched(finite: bool) -> bool:
            gc.collect()
            found["gradients"], live.peak = live.now - found["at rest"], 0.0
            return update(finite)

        engine.update = watched
        steps_of(engine, 1, 2)
        found["update"] = int(live.peak) - found["gradients"] - found["at rest"]
        state = engine_state(engine.module, engine.cfg, ranks)
    expected = {"at rest": state.weights + state.optimiser, "gradients": state.gradients, "update": state.update}
    return found, {**expected, "buckets": state.buckets}
