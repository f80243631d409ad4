"""A small PCRE and random batches, shared by the method tests."""

import torch

from wsss_dist.data.batch import Batch
from wsss_dist.methods import load_method
from wsss_dist.models.vit import BackboneConfig

BACKBONE = {"name": "vit_tiny_patch16_224", "weights": None}
NUM_CLASSES = 3


def tiny_config(**changes):
    """PCRE on a random ViT-Ti/16 for 64 px images (a 4 x 4 grid)."""
    values = {
        "backbone": BACKBONE,
        "cam": {"scales": [1.0, 0.5]},
        "crme": {"query_grid": 4, "heads": 4, "ffn": 64, "layers": 2},
    }
    return load_method("pcre").Config.model_validate(values | changes)


def tiny_method(train_steps=100, seed=0, **changes):
    torch.manual_seed(seed)
    return load_method("pcre").Method(tiny_config(**changes), NUM_CLASSES, train_steps)


def random_batch(size=4, side=64, seed=0, num_classes=NUM_CLASSES):
    """Images with at least one tag each, the last one padded at the right."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(size, num_classes, generator=g) > 0.5).float()
    labels[torch.arange(size), torch.arange(size) % num_classes] = 1.0
    boxes = torch.tensor([[0, side, 0, side]] * size)
    boxes[-1, 3] = side - 20
    return Batch(
        images=torch.randn(size, 3, side, side, generator=g),
        labels=labels,
        boxes=boxes,
        ids=[f"image{i}" for i in range(size)],
        flipped=torch.zeros(size, dtype=torch.bool),
        draws=torch.rand(size, generator=g, dtype=torch.float64),
    )


def backbone_config(**changes):
    return BackboneConfig.model_validate(BACKBONE | changes)
