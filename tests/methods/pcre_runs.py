"""What the ranks of the PCRE tests do: a few steps of a small PCRE, with batches dealt like the loader's."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.methods.tiny import BACKBONE, NUM_CLASSES, random_batch
from tests.train.work import checkpoints, digest
from wsss_dist import dist
from wsss_dist.config import parse_config
from wsss_dist.data.batch import Batch
from wsss_dist.engine import Engine, build_engine
from wsss_dist.methods import load_method


def values(**train: object) -> dict:
    """The YAML of a run; keywords go to its train section. Twenty steps, so every phase of the schedule is met."""
    return {
        "run": {"name": "pcre", "dir": "unused", "seed": 1},
        "method": {
            "name": "pcre",
            "backbone": BACKBONE | {"depth": 4},
            "cam": {"scales": [1.0, 0.5]},
            "crme": {"query_grid": 4, "heads": 4, "ffn": 64},
        },
        "data": {"format": "folder", "root": "unused", "crop": 64, "num_workers": 0},
        "optim": {"lr": 1e-4, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch": 4, "micro_batch": 2, **train},
        "eval": {"crf": None},
    }


def engine_of(config: dict) -> Engine:
    cfg = parse_config(config)
    dist.init(60)
    torch.manual_seed(cfg.run.seed)
    method = load_method("pcre").Method(cfg.method, NUM_CLASSES, cfg.train.steps)
    return build_engine(method, cfg)


def batches(config: dict, step: int) -> list[Batch]:
    """This rank's micro batches of the global batch of a step, dealt like the loader's; contrast grows by the image."""
    size, micro = config["train"]["global_batch"], config["train"]["micro_batch"]
    whole = random_batch(size, side=config["data"]["crop"], seed=step)
    whole.images *= torch.linspace(0.2, 3, size).view(-1, 1, 1, 1)
    out = []
    for i in range(dist.rank() * micro, size, dist.world_size() * micro):
        part = random_batch(micro)
        for name in ("images", "labels", "boxes", "flipped", "draws", "ids"):
            setattr(part, name, getattr(whole, name)[i : i + micro])
        out.append(part)
    return out


def steps_of(engine: Engine, config: dict, first: int, last: int) -> list[dict[str, float]]:
    """Metrics of steps first .. last - 1."""
    return [engine.train_step(batches(config, s), s) for s in range(first, last)]


def train(config: dict, first: int, last: int) -> tuple[list[dict[str, float]], str]:
    """Metrics of steps first .. last - 1, and the digest of weights and buffers."""
    engine = engine_of(config)
    return steps_of(engine, config, first, last), digest(engine)


def interrupted(config: dict, root: Path, first: int, stop: int, last: int) -> tuple[list[dict[str, float]], str, bool]:
    """Like `train`, but saved before step `stop` and gone on with by a second engine, its prototypes spoilt.

    The last value: did the prototypes come back bit for bit?
    """
    engine = engine_of(config)
    metrics = steps_of(engine, config, first, stop)
    checkpoints(config, root).save(engine, stop)
    second = engine_of(config)
    second.module.memory.prototypes.add_(7)
    assert checkpoints(config, root).resume(second) == stop
    same = torch.equal(second.module.memory.prototypes, engine.module.memory.prototypes)
    return metrics + steps_of(second, config, stop, last), digest(second), same


def both(config: dict, root: Path, first: int, stop: int, last: int) -> tuple[tuple, tuple]:
    """The uninterrupted run and the interrupted one, in one process."""
    return train(config, first, last), interrupted(config, root, first, stop, last)


def gradient(config: dict, step: int, order: list[int] | None = None) -> tuple[dict[str, list[float]], list[float]]:
    """Averaged gradients of one step, a sample of each parameter, and the prototypes after it.

    order: of the micro batches; None: as they are.
    """
    engine = engine_of(config)
    kept = {}

    def keep(*_: object, **__: object) -> None:
        kept.update({n: p.grad.flatten()[:50].tolist() for n, p in engine.module.named_parameters() if p.requires_grad})

    engine.optimizer.step = keep
    mine = batches(config, step)
    engine.train_step([mine[i] for i in order] if order else mine, step)
    return kept, engine.module.memory.prototypes.flatten().tolist()
