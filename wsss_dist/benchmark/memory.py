"""How much device memory a training step will need: predicted, so that neither the device nor the memory is needed.

One step of one rank runs on fake tensors (`fake`), whose live bytes are counted (`live`); what the engine keeps beside
them follows from the numbers of weights (`state`). Not seen and therefore allowed for are what CUDA and its libraries
take (`CONTEXT`) and what the allocator cannot use (`FRAGMENTATION`); both are assumptions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels import backend
from wsss_dist.benchmark import synthetic
from wsss_dist.benchmark.contest import random_weights
from wsss_dist.benchmark.fake import Fake, backward, fake_batch
from wsss_dist.benchmark.live import Live
from wsss_dist.benchmark.scratch import scratch
from wsss_dist.benchmark.state import engine_state
from wsss_dist.config import RunConfig, check_sizes, check_world
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.models.pretrained import no_parts

GIB = 2**30
CONTEXT = 1.5 * GIB  # CUDA context, cuBLAS and cuDNN workspaces, NCCL: an assumption
FRAGMENTATION = 0.08  # of what the step allocates and frees: an assumption


@dataclass(frozen=True)
class Options:
    """What is predicted.

    gib    memory of the device.
    ranks  that train together, one device each.
    at     fraction of the run that the step stands at: the schedules of the method decide what a step computes.
    """

    gib: float = 80.0
    ranks: int = 1
    at: float = 0.9


class Prediction:
    """The step of a config on fake tensors.

    Args:
        cfg: the run.
        options: the device.
        cuda: predict a GPU; else what the CPU does, for the comparison with a step that is measured.
    Raises:
        UserError: the config does not fit the ranks, or its operators are not the native ones.
    """

    def __init__(self, cfg: RunConfig, options: Options, cuda: bool = True):
        check_world(cfg, options.ranks)
        _check_kernels(cfg)
        self.cfg, self.options, self.cuda = cfg, options, cuda
        self.classes = synthetic.num_classes(cfg.data)
        self.tags = min(self.classes, synthetic.TAGS.get(cfg.data.format, synthetic.TAGS["voc"])[1])
        self.index = min(int(options.at * cfg.train.steps), cfg.train.steps - 1)
        self._one = synthetic.make_batch(cfg.data, self.classes, 1, 0)
        self.images = cfg.train.global_batch // options.ranks  # of a rank and step
        self.limit = options.gib * GIB
        self.fake = Fake(self.tags, cuda)
        with self.fake.entered(), no_parts():
            section = random_weights(cfg.method)
            self.method = load_method(cfg.method_name).Method(section, self.classes, cfg.train.steps).train()
            check_sizes(cfg, getattr(self.method, "patch_size", 1))
            if cfg.train.precision == "bf16" and cfg.train.engine == "deepspeed":
                _cast(self.method)

    def run(self) -> dict[str, Any]:
        """The parts of the memory, whether they fit, and the largest micro batch that does."""
        micro = self.cfg.train.micro_batch
        parts = self.parts(micro)
        total = sum(parts.values())
        return {
            "config": self.cfg.run.name,
            "method": self.cfg.method_name,
            "shape": {
                "crop": self.cfg.data.crop,
                "classes": self.classes,
                "tags": self.tags,
                "micro_batch": micro,
                "micro_batches": self.images // micro,
                "ranks": self.options.ranks,
                "precision": self.cfg.train.precision,
                "engine": self.cfg.train.engine,
                "zero_stage": self.cfg.train.zero_stage,
            },
            "step": self.index,
            "steps_of_run": self.cfg.train.steps,
            "gib": self.options.gib,
            "parts": parts,
            "total": total,
            "fits": total <= self.limit,
            "largest": self.largest(micro, total <= self.limit),
        }

    def parts(self, micro: int) -> dict[str, int]:
        """Bytes at the peak of a step with `micro` images a micro batch, by what they hold.

        The peak is that of forward and backward, or that of the update where it is higher.
        """
        state = engine_state(self.method, self.cfg, self.options.ranks)
        kept = state.gradients if micro < self.images else 0
        live, inputs = self.activations(micro, state.share, kept)
        gradients = round(live.peak_grads) if state.share else state.gradients
        activations, update = round(live.peak - live.peak_grads), 0
        if state.gradients + state.update > gradients + activations:
            gradients, activations, update = state.gradients, 0, state.update
        return {
            "weights": state.weights,
            "gradients": gradients,
            "optimiser": state.optimiser,
            "inputs": inputs,
            "activations": activations,
            "buckets": state.buckets,
            "update": update,
            "fragmentation": round(FRAGMENTATION * (gradients + activations + update)),
            "context": int(CONTEXT),
        }

    def activations(self, micro: int, share: float = 1.0, kept: int = 0) -> tuple[Live, int]:
        """Live bytes beside weights and inputs over forward and backward, and the bytes of the inputs.

        Args:
            micro: images of the micro batch.
            share: of the gradients that counts.
            kept: bytes of gradients from the micro batches before.
        """
        with self.fake.entered():
            batch = fake_batch(self._one, micro)
            live = Live(scratch if self.cuda else None, self.method.parameters(), share, kept)
            live.known([*self.method.parameters(), *self.method.buffers()])
            inputs = live.known([batch.images, batch.labels, batch.boxes, batch.draws, *batch.maps.values()])
            with live:
                with torch.autocast("cpu", torch.bfloat16, self.cfg.train.precision == "bf16", cache_enabled=False):
                    loss = self.method(batch, self.index)["loss"]
                backward(loss)
                del loss
            self.method.zero_grad(set_to_none=True)
            self.method.after_step(-1)  # a step that was skipped: what is kept for it is dropped
        return live, inputs

    def largest(self, micro: int, fits: bool) -> int | None:
        """The largest micro batch that fits, of those that divide a rank's images; None: not even the smallest does.

        Args:
            micro: where to start, up if it fits, else down.
            fits: does it?
        """
        sizes = [n for n in range(1, self.images + 1) if self.images % n == 0]
        if fits:
            larger = itertools.takewhile(self._fits, (n for n in sizes if n > micro))
            return max(larger, default=micro)
        return next((n for n in reversed(sizes) if n < micro and self._fits(n)), None)

    def _fits(self, micro: int) -> bool:
        if micro > 1 and self.cfg.data.augment == "native":  # images of many sizes
            return False
        try:
            return sum(self.parts(micro).values()) <= self.limit
        except UserError:  # norms over one number
            return False


def _check_kernels(cfg: RunConfig) -> None:
    """The native operators say what they return without values; the plain torch of the references looks at them."""
    if backend.NATIVE_PROBLEM is not None:
        raise UserError(f"benchmark: memory is predicted with the native operators, but {backend.NATIVE_PROBLEM}")
    for key, name in cfg.kernels.items():
        if name == "reference":
            raise UserError(f"config: 'kernels.{key}' is reference, whose memory is not predicted; set it to auto")


def _cast(method: nn.Module) -> None:
    """Weights in bf16 and buffers as they are, as under DeepSpeed."""
    for module in method.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            half = nn.Parameter(parameter.detach().bfloat16(), requires_grad=parameter.requires_grad)
            module.register_parameter(name, half)
