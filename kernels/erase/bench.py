"""Benchmark cases of erase, at the shapes the trainer uses."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.erase.op import erase_hard, erase_soft

# name: (B, H, W, h, w, mode); "soft backward" is with the gradient
SHAPES = {
    "soft 16x3x512x512 from 32x32": (16, 512, 512, 32, 32, "soft"),
    "soft 16x3x512x512 from 32x32 backward": (16, 512, 512, 32, 32, "soft backward"),
    "hard 16x3x512x512 from 32x32": (16, 512, 512, 32, 32, "hard"),
}
TOLERANCE = 1e-5  # against fp64, in units of the largest value; a mask at the threshold may go either way, see _error
PEER_TOLERANCE = TOLERANCE


def inputs(name: str, device: torch.device) -> list[Tensor]:
    """Images, maps and the gradient that comes back."""
    b, height, width, h, w, _ = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    shapes = (b, 3, height, width), (b, h, w), (b, 3, height, width)
    return [torch.randn(shape, generator=make).to(device) for shape in shapes]


def once(name: str, soft, hard, images: Tensor, maps: Tensor, flow: Tensor) -> list[Tensor]:
    """The erased images and, where the case says so, the gradient."""
    mode = SHAPES[name][5]
    if mode == "hard":
        return [hard(images, maps)]
    leaf = maps.detach().requires_grad_(mode == "soft backward")
    out = soft(images, leaf)
    return [out.detach(), *(torch.autograd.grad(out, leaf, flow) if leaf.requires_grad else ())]


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64, in units of the largest value."""
    return _error(name, device, run(name, device, backend)())


@functools.cache
def _expected(name: str, device: torch.device) -> list[Tensor]:
    return once(name, erase_soft, erase_hard, *(x.double() for x in inputs(name, device)))


def _error(name: str, device: torch.device, got: list[Tensor]) -> float:
    want = _expected(name, device)
    if SHAPES[name][5] == "hard":  # the share of pixels that differ
        return (got[0] != want[0]).float().mean().item()
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    tensors = inputs(name, device)
    functions = (functools.partial(f, backend=backend) for f in (erase_soft, erase_hard))
    return functools.partial(once, name, *functions, *tensors)


def _soft(images: Tensor, maps: Tensor) -> Tensor:
    """As published."""
    mask = F.interpolate(F.relu(maps).unsqueeze(1), images.shape[2:], mode="bilinear", align_corners=False)
    return images * (1 - mask / (mask.max() + 1e-5))


def _hard(images: Tensor, maps: Tensor) -> Tensor:
    with torch.no_grad():
        mask = F.interpolate(F.relu(maps).unsqueeze(1), images.shape[2:], mode="bilinear", align_corners=False)
        mask = mask / (mask.amax((1, 2, 3), keepdim=True) + 1e-5)
        return images * (mask <= 0.2).float()


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the published code; `compile`: the same, compiled."""
    forms = {"eager": (_soft, _hard), "compile": (torch.compile(_soft), torch.compile(_hard))}
    tensors = inputs(name, device)
    return {key: functools.partial(once, name, *functions, *tensors) for key, functions in forms.items()}


def peer_error(name: str, device: torch.device, peer: str, result: list[Tensor]) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Images in and out, with the gradient images and their gradient in once more; about 12 operations per pixel of a
    mask each way."""
    b, height, width, _, _, mode = SHAPES[name]
    pixels, backward = b * height * width, mode == "soft backward"
    return 4 * 3 * pixels * (4 if backward else 2), 12 * pixels * (2 if backward else 1)
