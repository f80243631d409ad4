"""The colours of class ids in PNG files and reports."""

from __future__ import annotations

import numpy as np
from PIL import Image


def voc_palette(num_colours: int = 256) -> np.ndarray:
    """The PASCAL VOC colour map, uint8 [num_colours, 3] RGB: bit i of each colour comes from bits 3i, 3i+1, 3i+2."""
    ids = np.arange(num_colours)
    palette = np.zeros((num_colours, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def palette_picture(labels: np.ndarray) -> Image.Image:
    """Class ids uint8 [H, W] as a picture of mode P with these colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(voc_palette().tobytes())
    return picture
