"""What the ranks of the tests of P-NOC's stages do: a few steps on batches dealt like the loader's, BatchNorm fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.methods.tiny import NUM_CLASSES, random_batch
from wsss_dist import dist
from wsss_dist.config import parse_config
from wsss_dist.data.batch import Batch
from wsss_dist.engine import build_engine
from wsss_dist.methods import load_method

BACKBONE = {"name": "resnet18", "weights": None, "norm": "fix"}
SIZE, SIDE = 4, 64


def values(method: dict, **train: object) -> dict:
    """The YAML of a run of 20 steps of 4 images; keywords go to its train section."""
    maps = {name: {"dir": "unused", "kind": kind} for name, kind in (("hint", "scores"), ("labels", "labels"))}
    return {
        "run": {"name": "stage", "dir": "unused", "seed": 1},
        "method": method,
        "data": {"format": "folder", "root": "unused", "crop": SIDE, "num_workers": 0, "maps": maps},
        "optim": {"name": "sgd", "lr": 2e-6, "weight_decay": 1e-4, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch": SIZE, "micro_batch": SIZE, **train},
        "eval": {"crf": None},
    }


def batch_of(step: int) -> Batch:
    """The global batch of a step; contrast grows by the image, so that a batch-global maximum lies in the last ones."""
    whole = random_batch(SIZE, side=SIDE, seed=step)
    whole.images *= torch.linspace(0.2, 3, SIZE).view(-1, 1, 1, 1)
    make = torch.Generator().manual_seed(step)
    cells = torch.rand(SIZE, 1, 4, 4, generator=make)
    whole.maps["hint"] = nn.functional.interpolate(cells, (SIDE, SIDE), mode="bilinear")[:, 0]
    # the first half of the batch has few pairs, the second many: the counts must be those of all ranks
    blocks = torch.randint(0, NUM_CLASSES + 1, (SIZE, 1, 6, 6), generator=make).float()
    labels = nn.functional.interpolate(blocks, (SIDE, SIDE), mode="nearest")[:, 0].to(torch.uint8)
    labels[: SIZE // 2, :, SIDE // 2 :] = 255
    whole.maps["labels"] = labels
    return whole


def _mine(batch: Batch, micro: int) -> Batch:
    """This rank's micro batch."""
    begin = dist.rank() * micro
    part = random_batch(micro, side=SIDE)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[begin : begin + micro]

    for name in ("images", "labels", "boxes", "flipped", "draws"):
        setattr(part, name, cut(getattr(batch, name)))
    part.maps = {name: cut(tensor) for name, tensor in batch.maps.items()}
    return part


def train(config: dict) -> tuple[list[float], list[float]]:
    """Losses of the steps, and what they have added to the weights, a sample of each parameter."""
    cfg = parse_config(config)
    dist.init(60)
    torch.manual_seed(cfg.run.seed)
    method = load_method(cfg.method_name).Method(cfg.method, NUM_CLASSES, cfg.train.steps)
    if cfg.method_name == "c2am":
        method.head.norm = nn.Identity()  # statistics of a rank's own images would be others
    engine = build_engine(method, cfg)
    micro, before = cfg.train.micro_batch, _sample(engine.module)
    losses = [engine.train_step([_mine(batch_of(step), micro)], step)["loss"] for step in range(cfg.train.steps)]
    return losses, (_sample(engine.module) - before).tolist()


def _sample(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten()[:20].double() for p in module.parameters() if p.requires_grad])
