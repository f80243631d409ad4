"""What the loader hands to a method: one micro batch for training, one image for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wsss_dist.data.transforms import denormalise


@dataclass
class Batch:
    """B images with their tags; no pixel label of the data set is ever part of it.

    images  [B, 3, H, W] float32, normalised with the ImageNet mean and standard deviation.
    labels  [B, C] float32, 1 where the image carries the tag.
    boxes   [B, 4] int64, (y0, y1, x0, x1) in pixels: the part of the crop that is real image, the rest is padding.
    ids     name of each image within its data set.
    flipped [B] bool, True where the transform mirrored the image.
    damaged (path, reason) of each file that could not be read and was replaced by another sample.
    draws   [B] float64, one uniform number in [0, 1) per image from (seed, step, position) for what a method draws by
            image, so that it depends neither on the ranks nor on the micro batches; training alone has it.
    maps    name -> [B, H, W] of what an earlier stage made (`data.maps`): uint8 for kind "labels" (0 background, 1..C
            classes, 255 undecided or padding) and "erased" (1 where `images` has the mean colour instead of the
            image's), else float32 (padding 0).
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    ids: list[str]
    flipped: Tensor
    damaged: list[tuple[str, str]] = field(default_factory=list)
    draws: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def rgb(self) -> Tensor:
        """The images as [B, 3, H, W] float32 RGB in [0, 1], rounded to the 8-bit levels they came from."""
        return denormalise(self.images.float()).round().clamp(0, 255) / 255

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU run in the background (for the loader)."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        names = [k for k in ("images", "labels", "boxes", "flipped", "draws") if getattr(self, k) is not None]
        tensors = {k: move(getattr(self, k)) for k in names}
        return replace(self, **tensors, maps={name: move(values) for name, values in self.maps.items()})


@dataclass
class EvalSample:
    """One image for evaluation, or for a stage that makes something of each image.

    index   position in the data set.
    id      name within the data set.
    image   [3, H, W] uint8 RGB at its native size.
    labels  [C] float32 tags.
    mask    [H, W] uint8, 0 background, 1..C classes, 255 ignore; None where the split has no masks, or none are wanted.
    """

    index: int
    id: str
    image: Tensor
    labels: Tensor
    mask: Tensor | None


def batch_of(samples: Sequence[EvalSample], images: Tensor) -> Batch:
    """The batch of images [B, 3, H, W], as they go into the network, with the tags of their samples."""
    device = images.device
    return Batch(
        images=images,
        labels=torch.stack([s.labels for s in samples]).to(device),
        boxes=torch.tensor([[0, images.shape[-2], 0, images.shape[-1]]] * len(samples), device=device),
        ids=[s.id for s in samples],
        flipped=torch.zeros(len(samples), dtype=torch.bool, device=device),
    )
