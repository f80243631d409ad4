"""What the ranks of the PCRE tests do: a few steps of a small PCRE, with batches dealt like the loader's."""

from __future__ import annotations

import torch

from tests.methods.tiny import BACKBONE, NUM_CLASSES, random_batch
from tests.train.work import digest
from wsss_dist import dist
from wsss_dist.config import parse_config
from wsss_dist.engine import build_engine
from wsss_dist.methods import load_method

GLOBAL, MICRO = 4, 2


def values(**train: object) -> dict:
    """The YAML of a run; keywords go to its train section. Twenty steps, so every phase of the schedule is met."""
    return {
        "run": {"name": "pcre", "dir": "unused", "seed": 1},
        "method": {
            "name": "pcre",
            "backbone": BACKBONE,
            "cam": {"scales": [1.0, 0.5]},
            "crme": {"query_grid": 4, "heads": 4, "ffn": 64},
        },
        "data": {"format": "folder", "root": "unused", "crop": 64, "num_workers": 0},
        "optim": {"lr": 1e-4, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch": GLOBAL, "micro_batch": MICRO, **train},
        "eval": {"crf": None},
    }


def engine_of(config: dict):
    cfg = parse_config(config)
    dist.init(60)
    torch.manual_seed(cfg.run.seed)
    method = load_method("pcre").Method(cfg.method, NUM_CLASSES, cfg.train.steps)
    return build_engine(method, cfg)


def batches(step: int) -> list:
    """This rank's micro batches of the global batch of a step."""
    whole = random_batch(GLOBAL, seed=step)
    out = []
    for m in range(GLOBAL // MICRO // dist.world_size()):
        i = (m * dist.world_size() + dist.rank()) * MICRO
        part = random_batch(MICRO)
        for name in ("images", "labels", "boxes", "flipped", "ids"):
            setattr(part, name, getattr(whole, name)[i : i + MICRO])
        out.append(part)
    return out


def train(config: dict, first: int, last: int) -> tuple[list[float], str]:
    """Losses of steps first .. last - 1, and the digest of weights and buffers."""
    engine = engine_of(config)
    losses = [engine.train_step(batches(s), s)["loss"] for s in range(first, last)]
    return losses, digest(engine)


def gradient(config: dict, step: int) -> tuple[dict[str, list[float]], list[float]]:
    """Averaged gradients of one step, a sample of each parameter, and the prototypes after it."""
    engine = engine_of(config)
    kept = {}

    def keep(*_: object, **__: object) -> None:
        kept.update({n: p.grad.flatten()[:50].tolist() for n, p in engine.module.named_parameters() if p.requires_grad})

    engine.optimizer.step = keep
    engine.train_step(batches(step), step)
    return kept, engine.module.memory.prototypes.flatten().tolist()
