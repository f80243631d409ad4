"""What the loader hands to a method: one micro batch for training, one image for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wsss_dist.data.transforms import denormalise


@dataclass
class Batch:
    """B images with their tags; no pixel label is ever part of it.

    images  [B, 3, H, W] float32, normalised with the ImageNet mean and standard deviation.
    labels  [B, C] float32, 1 where the image carries the tag.
    boxes   [B, 4] int64, (y0, y1, x0, x1) in pixels: the part of the crop that is real image, the rest is padding.
    ids     name of each image within its data set.
    flipped [B] bool, True where the transform mirrored the image.
    damaged (path, reason) of each file that could not be read and was replaced by another sample.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    ids: list[str]
    flipped: Tensor
    damaged: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def rgb(self) -> Tensor:
        """The images as [B, 3, H, W] float32 RGB in [0, 1], rounded to the 8-bit levels they came from."""
        return denormalise(self.images.float()).round().clamp(0, 255) / 255

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("images", "labels", "boxes", "flipped")}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU run in the background (for the loader)."""
        pinned = {k: getattr(self, k).pin_memory() for k in ("images", "labels", "boxes", "flipped")}
        return replace(self, **pinned)


@dataclass
class EvalSample:
    """One image for evaluation.

    index   position in the data set.
    id      name within the data set.
    image   [3, H, W] uint8 RGB at its native size.
    labels  [C] float32 tags.
    mask    [H, W] uint8, 0 background, 1..C classes, 255 ignore; None where the split has no masks.
    """

    index: int
    id: str
    image: Tensor
    labels: Tensor
    mask: Tensor | None
