"""Benchmark cases of par, at the shapes the trainer uses and those of the published timings."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.par import reference
from kernels.par.op import par

# name: (B, C, H, W)
SHAPES = {
    "1x3x112": (1, 3, 112, 112),
    "2x12x112": (2, 12, 112, 112),
    "1x3x224": (1, 3, 224, 224),
    "1x21x224": (1, 21, 224, 224),
    "1x3x448": (1, 3, 448, 448),
}
TOLERANCE = PEER_TOLERANCE = 1e-5  # against fp64; the maps lie in [0, 1]
DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed random maps over a smooth image with noise."""
    b, c, h, w = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(b, 3, 7, 7, generator=make), (h, w), mode="bilinear")
    image = (image + 0.05 * torch.randn(b, 3, h, w, generator=make)).clamp(0, 1)
    return image.to(device), torch.rand(b, c, h, w, generator=make).to(device)


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64."""
    return _error(name, device, par(*inputs(name, device), backend=backend))


@functools.cache
def _expected(name: str, device: torch.device) -> Tensor:
    image, maps = inputs(name, device)
    return par(image.double(), maps.double(), backend="reference")


def _error(name: str, device: torch.device, out: Tensor) -> float:
    return (out - _expected(name, device)).abs().max().item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    image, maps = inputs(name, device)
    return lambda: par(image, maps, backend=backend)


def _research(image: Tensor, maps: Tensor) -> Tensor:
    """As published: one-hot convolutions gather the 48 neighbours of image and maps, in each iteration anew."""
    taps = torch.zeros(8, 1, 3, 3, device=image.device)
    for i, (dy, dx) in enumerate(reference.DIRECTIONS):
        taps[i, 0, dy + 1, dx + 1] = 1

    def near(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 48, H, W]
        planes = x.reshape(-1, 1, *x.shape[2:])
        found = [F.conv2d(F.pad(planes, (d,) * 4, mode="replicate"), taps, dilation=d) for d in DILATIONS]
        return torch.cat(found, dim=1).view(*x.shape[:2], -1, *x.shape[2:])

    around = near(image)
    sigma = around.std(dim=2, keepdim=True)
    colour = -(((around - image.unsqueeze(2)).abs() / (sigma + 1e-8) / 0.3) ** 2).mean(dim=1, keepdim=True)
    place = torch.tensor(reference.position_weights(DILATIONS), device=image.device)[:, None, None]
    affinity = colour.softmax(dim=2) + place
    for _ in range(ITERATIONS):
        maps = (near(maps) * affinity).sum(2)
    return maps


def _sweep(maps: Tensor, weights: Tensor) -> Tensor:
    reach, (h, w) = max(DILATIONS), maps.shape[2:]
    wide = F.pad(maps, (reach,) * 4, mode="replicate")
    total = torch.zeros_like(maps)
    for n, (dy, dx) in enumerate(reference.offsets(DILATIONS)):
        total = total + weights[:, n : n + 1] * wide[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w]
    return total


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the published code. `compile`: weights and one sweep over a padded map, compiled."""
    image, maps = inputs(name, device)
    weigh, sweep = torch.compile(reference.weights), torch.compile(_sweep)

    @torch.no_grad()
    def compiled() -> Tensor:
        weights, out = weigh(image, DILATIONS), maps
        for _ in range(ITERATIONS):
            out = sweep(out, weights)
        return out

    return {"eager": lambda: _research(image, maps), "compile": compiled}


def peer_error(name: str, device: torch.device, peer: str, result: Tensor) -> float:
    return _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Image and maps in, maps out; 600 operations for the weights of a pixel, a product and a sum per tap and sweep."""
    b, c, h, w = SHAPES[name]
    return 4 * b * h * w * (3 + 2 * c), b * h * w * (600 + 2 * 48 * ITERATIONS * c)
