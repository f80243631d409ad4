"""Keeps the tokens behind a backbone's frozen blocks on disk, one small file per image content.

Worth its space where the same pixels come again: fixed-size views, mirrored or not, without random augmentation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsss_dist.files import whole_file


class TokenCache:
    """Half-precision tokens under `root/<digest of the frozen weights>/`.

    A value is rounded to half precision before its first use too, so a run that finds it stored and a run that makes
    it get the same bits. Files are written under a temporary name and renamed: ranks may share a folder.
    """

    def __init__(self, root: Path, frozen: dict[str, Tensor], settings: str = ""):
        """`frozen`: the weights that make the tokens; `settings`: whatever else they depend on."""
        digest = hashlib.sha256(settings.encode())
        for name in sorted(frozen):
            digest.update(name.encode())
            digest.update(frozen[name].detach().float().cpu().numpy().tobytes())
        self.folder = Path(root) / digest.hexdigest()[:16]

    def get(self, image: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The stored tokens of an image [3, H, W], or those of `compute()`, which are then stored; float32.

        The key is a digest of size and pixels, so two images never share an entry, whatever their names.
        """
        pixels = np.ascontiguousarray(image.detach().float().cpu().numpy())
        # half-precision arithmetic gives other tokens
        how = (
            torch.get_autocast_dtype(image.device.type) if torch.is_autocast_enabled(image.device.type) else image.dtype
        )
        digest = hashlib.blake2b(f"{pixels.shape} {how}".encode(), digest_size=20)
        digest.update(pixels)
        path = self.folder / f"{digest.hexdigest()}.npy"
        try:
            tokens = np.load(path, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            tokens = compute().half().cpu().numpy()
            self._write(path, tokens)
        return torch.from_numpy(tokens).float()

    def _write(self, path: Path, tokens: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path, contested=True) as partial, partial.open("wb") as file:
            np.save(file, tokens)
