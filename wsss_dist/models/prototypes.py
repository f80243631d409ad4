"""Class prototypes that follow the class tokens (PCRE, Eq. 12)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeMemory(nn.Module):
    """C unit vectors of width D, moved by exponential averaging; always float32, no gradient.

    Before the first update they are random directions.
    """

    prototypes: Tensor  # [C, D]

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.register_buffer("prototypes", torch.randn(num_classes, dim))

    def _apply(self, fn, recurse=True):
        kept = self.prototypes
        super()._apply(fn, recurse)
        # a cast of the model to half precision must not round the averages; a move to a device must reach them
        self.prototypes = kept.to(self.prototypes.device)
        return self

    def forward(self, patches: Tensor) -> Tensor:
        """Absolute cosine of patches [B, N, D] with each prototype, [B, N, C] float32 also under autocast."""
        with torch.autocast(patches.device.type, enabled=False):
            return (F.normalize(patches.float(), dim=-1) @ F.normalize(self.prototypes, dim=-1).T).abs()

    @torch.no_grad()
    def update(self, tokens: Tensor, labels: Tensor, momentum: float, normalize_token: bool = False) -> None:
        """Move the prototype of every tag of every image, image by image in the order given; then normalise all rows.

        Args:
            tokens: class tokens [G, C, D] of the global batch.
            labels: tags [G, C].
            momentum: share of the old value that each image leaves.
            normalize_token: scale the tokens to unit length first.
        """
        if normalize_token:
            tokens = F.normalize(tokens, dim=-1)
        for image, present in zip(tokens.float(), labels.bool(), strict=True):
            moved = momentum * self.prototypes + (1 - momentum) * image
            self.prototypes.copy_(torch.where(present[:, None], moved, self.prototypes))
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))
