"""A method of a few thousand parameters with all that makes engines hard: a submodule called more than once a step and
also without gradient, a frozen layer, a branch without gradient until later, buffers, dropout."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.data.batch import Batch
from wsss_dist.methods.base import BaseMethod, Prediction, Views
from wsss_dist.schema import StrictModel

C = 3


class Config(StrictModel):
    """Options of the tests."""

    width: int = 8
    dropout: float = 0.1
    # step from which the second branch has a loss
    branch_from: int = 3
    # step whose loss is bad on one sample: of two ranks it is in the first micro batch of rank 1
    bad_step: int | None = None
    bad_id: str = "s3"
    # what is bad: a NaN or infinite loss, or a gradient that overflows though the loss is finite
    bad: str = "nan"
    # normalise with running statistics, which each rank gathers on its own samples
    batch_norm: bool = False
    # have a submodule that returns a class of its own
    wrapped: bool = False
    # step after which the last rank gets a SIGTERM
    signal_step: int | None = None


@dataclass
class Wrapped:
    """Something ZeRO-3 cannot look into."""

    x: Tensor


class Wrapper(nn.Module):
    """A submodule that returns it."""

    def forward(self, x: Tensor) -> Wrapped:
        return Wrapped(x)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * float("inf")


class Method(BaseMethod):
    """Two convolutions, a frozen one before them, two heads."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg = cfg
        self.frozen = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
        self.statistics = nn.BatchNorm2d(4, affine=False) if cfg.batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(4, cfg.width, 3, padding=1), nn.GELU(), nn.Conv2d(cfg.width, cfg.width, 1))
        self.norm = nn.LayerNorm(cfg.width)
        self.head = nn.Linear(cfg.width, num_classes)
        self.branch = nn.Linear(cfg.width, num_classes)
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.wrapper = Wrapper() if cfg.wrapped else None
        self.register_buffer("mean", torch.zeros(cfg.width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        x = self.norm(self.body(self.statistics(self.frozen(images))).mean((2, 3)))
        return self.wrapper(x).x if self.wrapper else x

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            self.eval()
            target = self.features(batch.images.flip(3)).float()
            self.train()
        x = F.dropout(self.features(batch.images), self.cfg.dropout)
        y = self.features(batch.images[..., ::2, ::2])
        tag = F.binary_cross_entropy_with_logits((self.head(x) * self.scale).float(), batch.labels)
        loss = tag + F.mse_loss(y.float(), target)
        if step >= self.cfg.branch_from:
            loss = loss + F.binary_cross_entropy_with_logits(self.branch(x).float(), batch.labels)
        if step == self.cfg.bad_step and self.cfg.bad_id in batch.ids:
            loss = {"nan": loss * float("nan"), "inf": loss + float("inf"), "grad": _Overflow.apply(loss)}[self.cfg.bad]
        return {"loss": loss, "tag": tag.detach()}

    def after_step(self, step: int) -> None:
        if step == self.cfg.signal_step and dist.rank() == dist.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 / (step + 1))

    def predict(self, batch: Batch, views: Views) -> Prediction:
        score = torch.sigmoid(self.head(self.features(batch.images)).float())[:, :, None, None]
        return Prediction((score * batch.labels[:, :, None, None]).expand(-1, -1, *batch.images.shape[2:]))

    def param_groups(self) -> list[dict]:
        slow = [*self.body.parameters(), *self.norm.parameters(), self.scale]
        fast = [*self.head.parameters(), *self.branch.parameters()]
        return [{"name": "slow", "params": slow, "lr_mult": 1.0}, {"name": "fast", "params": fast, "lr_mult": 10.0}]


def make_batches(step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[Batch]:
    """The micro batches of a rank as the loader deals them: chunk m * world_size + rank."""
    gen = torch.Generator().manual_seed(1000 + step)
    labels = (torch.rand(global_batch, C, generator=gen) > 0.5).float()
    images = torch.randn(global_batch, 3, 8, 8, generator=gen) + labels[:, :, None, None]
    batches = []
    for m in range(global_batch // (micro_batch * world_size)):
        i = (m * world_size + rank) * micro_batch
        ids = [f"s{k}" for k in range(i, i + micro_batch)]
        boxes = torch.tensor([[0, 8, 0, 8]]).repeat(micro_batch, 1)
        flipped = torch.zeros(micro_batch, dtype=torch.bool)
        batches.append(Batch(images[i : i + micro_batch], labels[i : i + micro_batch], boxes, ids, flipped))
    return batches


def values(run_dir: Path | str = "runs", **changes: object) -> dict:
    """The YAML of a small run of this method; `train__steps=3` changes train.steps."""
    out: dict = {
        "run": {"name": "tiny", "dir": str(run_dir), "seed": 3},
        "method": {"name": "tiny"},
        "data": {"format": "folder", "root": "unused", "crop": 8, "num_workers": 0},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 20, "global_batch": 8, "micro_batch": 2, "grad_clip": 1.0},
        "eval": {"size": None, "cam_scales": [1.0], "seg_scales": [1.0], "crf": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            out.setdefault(section, {})[name] = value
        else:
            out[section] = value
    return out
