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
        shares, kept = shares_of(labels, momentum)
        self.move(kept, summed(tokens, shares, normalize_token))

    @torch.no_grad()
    def move(self, kept: Tensor, moved: Tensor) -> None:
        """To what is `kept` [C] of each prototype plus the weighted sum of the tokens, `moved` [C, D], normalised."""
        self.prototypes.copy_(F.normalize(kept[:, None] * self.prototypes + moved, dim=-1))


def shares_of(labels: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """What r <- m r + (1 - m) z for each tag of each image, one after the other, makes of r and of each z (Eq. 12).

    Args:
        labels: tags [G, C] of the global batch, in its order.
        momentum: m.
    Returns:
        the share [G, C] of each token, (1 - m) m^(later images with that tag), and that of the old prototypes [C].
    """
    present = labels.bool().to(torch.promote_types(labels.dtype, torch.float32))
    count = present.sum(0)
    return (1 - momentum) * present * momentum ** (count - present.cumsum(0)), momentum**count


def summed(tokens: Tensor, shares: Tensor, normalize_token: bool) -> Tensor:
    """Sum [C, D] of class tokens [G, C, D], scaled to unit length first where asked, with their shares [G, C]."""
    tokens = tokens.to(shares)
    if normalize_token:
        tokens = F.normalize(tokens, dim=-1)
    return torch.einsum("gc,gcd->cd", shares, tokens)
