"""Object regions that adversarial erasing has mined, as packed bits, and the images with these regions erased.

    DIR/<id>.npz     `labels` int16 [K], indices 0..C-1 of the image's tags; `size` int32 [2], (H, W); `bits` uint8
                     [K, ceil(H W / 8)], the region of each tag, rows first, the first pixel in the highest bit
    DIR/store.json   what the files belong to (`StoreManifest`)

An image without a tag needs no file. Erased pixels take the mean colour of the training images, after everything else
that changes colours, so that each has exactly the same value. Source: AE-PSL (CVPR 2017), Algorithm 1.

Letters: C foreground classes, K tags of an image, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from wsss_dist.data.dataset import Dataset
from wsss_dist.data.transforms import MEAN, STD
from wsss_dist.errors import UserError
from wsss_dist.files import write_whole

MANIFEST = "store.json"


class UnfitRegions(Exception):
    """A file that does not hold the regions of its image: what was found, what was expected."""


@dataclass
class StoreManifest:
    """What the regions of a split belong to.

    images   digest of the names and tags of the images, `Dataset.digest`.
    classes  names of the C classes.
    mean     mean colour of the training images, RGB in 0..255, which takes the place of erased pixels.
    rule     settings by which regions were mined.
    losses   loss of the classifier of each step so far, None where its log holds none.
    """

    images: str
    classes: list[str]
    mean: list[float]
    rule: dict[str, Any]
    losses: list[float | None]

    def check(self, folder: Path, dataset: Dataset) -> None:
        """Hold that the store was made of these images and classes. Raises UserError."""
        if self.classes != dataset.class_names:
            raise UserError(
                f"data: {folder / MANIFEST} holds regions of the classes {', '.join(self.classes)}; expected "
                f"{', '.join(dataset.class_names)}, those of '{dataset.name}': mine the regions again"
            )
        if self.images != dataset.digest():
            raise UserError(
                f"data: {folder / MANIFEST} was made of other images or tags than '{dataset.name}' has now "
                f"({len(dataset)} images); expected the same split, limits and tags: mine them again, or correct "
                "data.train_limit and data.untagged"
            )


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of the regions in `folder`. Raises UserError where there is none."""
    path = folder / MANIFEST
    try:
        return StoreManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"data: {path} cannot be used ({type(error).__name__}); expected the manifest of mined regions: name the "
            "folder out/<split> of a stage of kind regions, or run that stage again"
        ) from None


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Write it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))


def regions_writer(labels: np.ndarray, regions: np.ndarray) -> Callable[[IO], None]:
    """What writes the regions bool [K, H, W] of the tags `labels` [K]."""
    bits = np.packbits(regions.reshape(len(regions), int(np.prod(regions.shape[1:]))), axis=1)
    size = np.array(regions.shape[1:], np.int32)
    return lambda file: np.savez_compressed(file, labels=labels.astype(np.int16), size=size, bits=bits)


def load_regions(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Tags int64 [K] and regions bool [K, H, W] of a file. Raises UnfitRegions."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels, size, bits = file["labels"], file["size"], file["bits"]
    except Exception as error:  # numpy, zipfile and zlib raise many kinds on damaged bytes, and all mean the same here
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UnfitRegions(f"cannot be used: {reason}", "an .npz of mined regions") from None
    whole = labels.ndim == 1 and size.shape == (2,) and bits.ndim == 2 and bits.dtype == np.uint8 and min(size) >= 0
    pixels = int(size[0]) * int(size[1]) if whole else 0
    if not whole or bits.shape != (len(labels), -(-pixels // 8)):
        raise UnfitRegions(f"holds `labels` {labels.shape} and `bits` {bits.shape}", "bits of each tag at every pixel")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UnfitRegions(f"holds the classes {labels.tolist()}", f"indices 0..{num_classes - 1}")
    return labels.astype(np.int64), np.unpackbits(bits, axis=1, count=pixels).reshape(-1, *size).astype(bool)


def fill_erased(images: Tensor, erased: Tensor, mean: list[float]) -> None:
    """Give erased pixels of normalised images the mean colour, in place.

    Args:
        images: [B, 3, H, W], minus the ImageNet mean, over the standard deviation.
        erased: [B, H, W], nonzero where a pixel is erased.
        mean: RGB in 0..255.
    """
    value = (torch.tensor(mean, dtype=torch.float64) / 255 - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(
        STD, dtype=torch.float64
    )
    value = value.to(images).view(1, 3, 1, 1)
    torch.where(erased[:, None] != 0, value, images, out=images)
