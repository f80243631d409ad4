"""Batches of the shapes that a config trains on, without its data.

B batch, C foreground classes, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_dist.data.batch import Batch
from wsss_dist.data.config import DataConfig
from wsss_dist.errors import UserError

CLASSES = {"coco": 80, "voc": 20}
# tags of an image, from and to, drawn evenly: 2.9 on average in COCO, 1.5 in VOC
TAGS = {"coco": (1, 5), "voc": (1, 2)}
LEVELS = 12  # coarse grid of the random images


def num_classes(cfg: DataConfig) -> int:
    """Classes of a data section.

    Raises:
        UserError: a folder, whose classes are read from it.
    """
    if cfg.classes is not None:
        return len(cfg.classes)
    if cfg.format not in CLASSES:
        raise UserError(
            f"config: 'data.format' is {cfg.format}, whose number of classes is in the data; name them in "
            "data.classes, or give --data to read it"
        )
    return CLASSES[cfg.format]


def make_batch(cfg: DataConfig, classes: int, size: int, seed: int) -> Batch:
    """`size` images: smooth random colours with noise, some random tags, boxes of the whole crop, random maps.

    Crops are data.crop pixels a side, also where data.augment is native, whose images have many sizes.

    Args:
        cfg: crop, format and maps.
        classes: C.
        size: B.
        seed: equal seeds give equal batches.
    """
    make, side = torch.Generator().manual_seed(seed), cfg.crop
    low, high = TAGS.get(cfg.format, TAGS["voc"])
    labels = torch.zeros(size, classes)
    for row in labels:
        count = min(classes, int(torch.randint(low, high + 1, (), generator=make)))
        row[torch.randperm(classes, generator=make)[:count]] = 1.0
    images = 2 * _smooth((size, 3), side, make) + 0.2 * torch.randn(size, 3, side, side, generator=make)
    batch = Batch(
        images=images,
        labels=labels,
        boxes=torch.tensor([[0, side, 0, side]]).repeat(size, 1),
        ids=[f"synthetic{seed}_{i}" for i in range(size)],
        flipped=torch.zeros(size, dtype=torch.bool),
        draws=torch.rand(size, generator=make, dtype=torch.float64),
        maps={name: _map(m.kind, labels, side, make) for name, m in cfg.maps.items()},
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _smooth(shape: tuple[int, int], side: int, make: torch.Generator) -> Tensor:
    """Smooth random maps [*shape, side, side] around 0."""
    coarse = torch.randn(*shape, LEVELS, LEVELS, generator=make)
    return F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)


def _map(kind: str, labels: Tensor, side: int, make: torch.Generator) -> Tensor:
    """A map of an earlier stage, [B, H, W]; see `Batch.maps`."""
    values = _smooth((len(labels), 1), side, make)[:, 0]
    if kind in ("grey", "scores"):
        return values.sigmoid()
    if kind == "erased":
        return (values > 0.5).to(torch.uint8)
    first = labels.argmax(1)[:, None, None] + 1  # where it is high a tag, where it is low background
    return torch.where(values > 0.3, first, torch.where(values < 0, 0, 255)).to(torch.uint8)
