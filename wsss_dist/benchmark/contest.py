"""Training steps of a config on this machine, timed in turn with those of a peer where one is asked for.

Before the turns each contestant runs forward and backward once on the same weights and the same micro batch: that gives
its memory and its operations, before the engine is there, so neither compiled nor in channels_last, and shows whether
the peer computes the same loss and the same gradient of the backbone.
Then both train the same weights on one engine, step about; every round has a step with the phases off, which gives the
time, and one with the phases on.

Weights are random. That is nothing to the dense layers, but a trained CRME can have more candidates and larger regions,
whose selection, masks and gradient then take longer than here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import kernels
from kernels.measure import peak_bytes, seconds
from wsss_dist import dist, peers
from wsss_dist.benchmark import flops, phases, synthetic
from wsss_dist.benchmark.figures import OURS, PEER, figures, resident
from wsss_dist.config import RunConfig, check_sizes, check_world
from wsss_dist.data import build_dataset, build_train_loader
from wsss_dist.data.batch import Batch
from wsss_dist.data.loader import PREFETCH
from wsss_dist.engine import Engine, build_engine
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.methods.base import BaseMethod
from wsss_dist.models.pretrained import no_parts
from wsss_dist.peers import operators
from wsss_dist.precision import autocast
from wsss_dist.schema import StrictModel

TOLERANCE = 1e-4  # of the peer's loss and gradient, relative: a pixel at a threshold may take another label
SETS = 3  # different synthetic batches


@dataclass(frozen=True)
class Options:
    """What is measured.

    steps   rounds, each with one step without and one with phases per contestant.
    warmup  steps before, per contestant; None: 2, with `data` as many as its workers load before the first one.
    at      fraction of the run that the steps stand at: the schedules of the method decide what a step computes.
    peer    measure the peer of the method too.
    data    the config's own data and loader instead of synthetic batches.
    clock   "wall", or "cpu": CPU time of the process, which other jobs on the machine do not stretch.
    """

    steps: int = 5
    warmup: int | None = None
    at: float = 0.9
    peer: bool = False
    data: bool = False
    clock: str = "wall"


@dataclass
class Contestant:
    """One implementation of the training step: its step, what its first pass showed, the times of its steps."""

    step: Callable | None  # None: the method's own
    memory: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)


def random_weights(section: StrictModel) -> StrictModel:
    """A method's config whose backbones start at random, and keep no tokens of images that nobody has seen."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, StrictModel):
            changes[name] = random_weights(value)
        elif name == "token_cache" or (name == "weights" and isinstance(value, str)):
            changes[name] = None
    return section.model_copy(update=changes)


class Contest:
    """A config's method on an engine, its batches and the contestants. Collective on all ranks.

    Raises:
        UserError: the config does not fit the ranks or its data, or there is no peer for it.
    """

    def __init__(self, cfg: RunConfig, options: Options):
        self.start = resident()
        dist.init(cfg.train.timeout_s)
        check_world(cfg, dist.world_size())
        if options.peer:
            _check_peer(cfg, options)
        self.cfg, self.device = cfg, dist.device()
        self.index = min(int(options.at * cfg.train.steps), cfg.train.steps - 1)
        self.num_micro = cfg.train.global_batch // (cfg.train.micro_batch * dist.world_size())
        self.options = replace(options, warmup=_warmup(cfg, options, self.num_micro))
        self.dataset = build_dataset(cfg.data, cfg.data.train_split) if options.data else None
        if self.dataset is None:
            self.classes = synthetic.num_classes(cfg.data)
        else:
            self.classes = len(self.dataset.class_names)
        torch.manual_seed(cfg.run.seed)
        section = random_weights(cfg.method)
        with no_parts():  # of networks that an earlier stage would have trained
            method = load_method(cfg.method_name).Method(section, self.classes, cfg.train.steps)
        check_sizes(cfg, getattr(method, "patch_size", 1))
        self.convolutions = flops.mostly_convolutions(method)  # asked now: under ZeRO 3 the weights are elsewhere later
        self.method: BaseMethod = method.to(self.device).train()
        self.contestants = {OURS: Contestant(None)}
        if options.peer:
            self.contestants[PEER] = Contestant(peers.load_peer(cfg.method_name).Peer(method).training_step)
        self.batches = self._batches()

    def run(self) -> dict[str, Any]:
        """Measure everything; the figures, the same keys on every rank, of rank 0's clock."""
        with phases.Watch() as watch:
            watch.operators(kernels)
            watch.operators(operators)
            watch.method(self.method)
            agreement = self._first_passes(watch)
            engine = build_engine(self.method, self.cfg)
            watch.engine(engine)
            self._turns(engine, watch)
        return figures(self, agreement)

    def _batches(self) -> Iterator[list[Batch]]:
        """The micro batches of this rank, a step an item."""
        cfg, train = self.cfg, self.cfg.train
        if self.dataset is None:
            first = [1000 * dist.rank() + 100 * s for s in range(SETS)]
            sizes = cfg.data, self.classes, train.micro_batch
            sets = [[synthetic.make_batch(*sizes, seed + m) for m in range(self.num_micro)] for seed in first]
            return itertools.cycle(sets)
        loader = build_train_loader(
            self.dataset,
            cfg.data,
            seed=cfg.run.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=dist.rank(),
            world_size=dist.world_size(),
            start_step=self.index,
            num_steps=1 + self.options.warmup + 2 * self.options.steps,
        )
        return iter(loader)

    # ---- one pass each --------------------------------------------------------------------------------------------

    def _first_passes(self, watch: phases.Watch) -> dict[str, float] | None:
        """Memory and operations of forward and backward; how far the peer's loss and gradient are off, relative."""
        batch, found = next(self.batches)[0].to(self.device), {}
        for name, contestant in self.contestants.items():
            found[name] = self._first_pass(contestant, batch, watch)
        if PEER not in found:
            return None
        (loss, grad), (other_loss, other_grad) = found[OURS], found[PEER]
        off = {
            "loss": abs(other_loss - loss) / max(abs(loss), 1e-12),
            "gradient": ((other_grad - grad).norm() / grad.norm().clamp_min(1e-12)).item(),
        }
        all_off = dist.all_gather_object(off)  # every rank has a batch of its own
        off = {name: max(o[name] for o in all_off) for name in off}
        if max(off.values()) > TOLERANCE:
            raise UserError(
                f"benchmark: the peer is off by {off['loss']:.1e} in the loss and by {off['gradient']:.1e} in the "
                f"gradient of the backbone, more than {TOLERANCE}: a ratio would compare different things. Report it "
                "with this config"
            )
        return off

    def _first_pass(
        self, contestant: Contestant, batch: Batch, watch: phases.Watch
    ) -> tuple[float, torch.Tensor | None]:
        """Loss and gradient of the backbone (kept for a contest alone), which are cleared afterwards."""
        kept: list[float] = []
        # not the step that is trained: what a method puts by for its after_step is then not taken for that one's
        probe = self.index - 1 if self.index else 1

        def both() -> None:
            with self._playing(contestant):
                with watch.phase(phases.HEADS), autocast(self.cfg.train.precision == "bf16"):
                    loss = self.method(batch, probe)["loss"]
                with watch.phase(phases.BACKWARD):
                    loss.backward()
            kept.append(loss.item())

        def counting() -> None:
            with flops.counted() as counter:
                recorder = watch.recorder = phases.Recorder(lambda: float(counter.get_total_flops()))
                recorder.start()
                both()
                recorder.stop()
            contestant.flops, watch.recorder = recorder.totals(), None

        if self.options.warmup:  # what is allocated once, in the first pass of all, is nobody's
            both()
            self.method.zero_grad(set_to_none=True)
        contestant.memory = peak_bytes(counting, self.device)
        grad = None
        if self.options.peer:
            grads = (p.grad for n, p in self.method.named_parameters() if n.startswith("backbone."))
            grad = torch.cat([g.flatten() for g in grads if g is not None])
        self.method.zero_grad(set_to_none=True)
        return kept[0], grad

    @contextmanager
    def _playing(self, contestant: Contestant) -> Iterator[None]:
        """The method's step is that of a contestant."""
        if contestant.step is not None:
            self.method.training_step = contestant.step
        try:
            yield
        finally:
            self.method.__dict__.pop("training_step", None)

    # ---- turns ----------------------------------------------------------------------------------------------------

    def _turns(self, engine: Engine, watch: phases.Watch) -> None:
        players = list(self.contestants.values())
        source = self.batches
        for _ in range(self.options.warmup):
            batches = next(source)
            for player in players:
                with self._playing(player):
                    engine.train_step(batches, self.index)
        for turn in range(self.options.steps):
            order = players if turn % 2 == 0 else players[::-1]
            if self.options.peer:  # the same batches for both: no loader in it
                batches = next(source)
                source_of = itertools.repeat(batches)
            else:
                source_of = source
            for player in order:
                with self._playing(player):
                    self._timed(player, engine, source_of, watch, turn)

    def _timed(self, player: Contestant, engine: Engine, source: Iterator, watch: phases.Watch, turn: int) -> None:
        """A step without and one with phases, in turn the other way round."""

        def step() -> None:
            if watch.recorder is not None:
                watch.recorder.start()
            with watch.phase(phases.LOADER):
                batches = next(source)
            engine.train_step(batches, self.index)
            if watch.recorder is not None:
                watch.recorder.stop()

        for watched in (False, True) if turn % 2 == 0 else (True, False):
            if not watched:
                player.plain.append(seconds(step, self.device)[self.options.clock])
                continue
            recorder = watch.recorder = phases.stopwatch(self.device, self.options.clock)
            player.watched.append(seconds(step, self.device)[self.options.clock])
            player.phases.append(recorder.totals())
            watch.recorder = None


def _warmup(cfg: RunConfig, options: Options, num_micro: int) -> int:
    """Steps before the timed ones: those whose batches were there before the first step say nothing of the loader.

    Raises:
        UserError: too few were asked for.
    """
    ahead = PREFETCH * cfg.data.num_workers if options.data else 0  # micro batches
    least = max(0, -(-ahead // num_micro) - 1)  # the first pass takes those of a step too
    if options.warmup is None:
        return max(2, least)
    if options.warmup < least:
        raise UserError(
            f"command line: --warmup is {options.warmup}, but {cfg.data.num_workers} workers load {ahead} micro "
            f"batches before the first step, which takes {num_micro}; give --warmup {least} or more, or leave it out"
        )
    return options.warmup


def _check_peer(cfg: RunConfig, options: Options) -> None:
    if options.data:
        raise UserError("command line: --peer and --data exclude each other: the turns need the same batches")
    module = peers.load_peer(cfg.method_name)
    if cfg.train.precision != "fp32" or cfg.train.zero_stage == 3:
        raise UserError(
            f"config: the peer runs as published, in fp32 and with whole weights, but 'train.precision' is "
            f"{cfg.train.precision!r} and 'train.zero_stage' is {cfg.train.zero_stage}; add --set train.precision=fp32 "
            "--set train.zero_stage=0"
        )
    module.check(cfg.method)
