"""Benchmark cases of random_walk, at the stride-4 grids of its users: 256 steps, radius 5, beta 10.

The peers are what research code does: a sparse matrix applied 256 times (`csr`); the dense matrix squared 8 times
(`dense`; on more than 2,000 pixels `dense, 8 x its first squaring`: one squaring is timed), for C = 3 alone, since C
plays no part; 256 steps of a stencil, compiled. The time that the peers need for their matrix is left out; ours builds
the affinities each time.
"""

from __future__ import annotations

import functools

import torch

from kernels.random_walk import reference
from kernels.random_walk.op import random_walk

# name: (B, C, h, w)
SHAPES = {f"1x{c}x{h}x{w}": (1, c, h, w) for h, w in ((64, 64), (94, 125), (128, 128)) for c in (3, 20)}
SHAPES = {"1x3x32x40": (1, 3, 32, 40), **SHAPES, "1x3x120x160": (1, 3, 120, 160)}
TOLERANCE = 1e-4  # of the maximum, against 256 steps in fp64
PEER_TOLERANCE = 1e-3  # steps that do not keep constants apart drift by rounding, always to the same side
SQUARED_IN_FULL = 2000  # pixels
LARGEST_DENSE = 120 * 160  # pixels; its matrices take 1.5 GB each
STEPS = 256


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs with large regions at 0, damped on edges; edges are smooth hills with sharp outlines of boxes."""
    b, c, h, w = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    hills = torch.rand(b, 1, 7, 7, generator=make)
    edges = 0.3 * torch.nn.functional.interpolate(hills, (h, w), mode="bilinear")[:, 0]
    boxes = torch.nn.functional.interpolate(torch.rand(b, 1, 3, 4, generator=make), (h, w), mode="nearest")[:, 0]
    edges[:, 1:][boxes[:, 1:] != boxes[:, :-1]] = 0.8
    edges[:, :, 1:][boxes[:, :, 1:] != boxes[:, :, :-1]] = 0.8
    blobs = torch.rand(b, c, 6, 6, generator=make) * 2 - 1
    seeds = torch.nn.functional.interpolate(blobs, (h, w), mode="bicubic").clamp(0, 1)
    return (seeds * (1 - edges.unsqueeze(1))).to(device), edges.to(device)


def transitions(edges: torch.Tensor) -> torch.Tensor:
    """Sparse [N, N] in the dtype of `edges` [h, w]; its product with a map is one step."""
    h, w = edges.shape
    window = reference.affinities(edges[None], 5, 10.0)
    window = window[0, 0] / reference.degrees(window)[0, 0, :, :, None, None]
    window[:, :, 4, 4] = 1 - window.sum((-2, -1))
    y, x, dy, dx = window.nonzero().unbind(1)
    starts = torch.searchsorted(y * w + x, torch.arange(h * w + 1, device=edges.device))
    columns, values = (y + dy - 4) * w + x + dx - 4, window[y, x, dy, dx]
    return torch.sparse_csr_tensor(starts, columns, values, (h * w, h * w), check_invariants=False)


def steps(matrix: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """256 steps of one image, [1, C, h, w]."""
    u = seeds[0].flatten(1).T.contiguous()
    for _ in range(STEPS):
        u = matrix @ u
    return u.T.reshape(seeds.shape)


@functools.cache
def expected(name: str, device: torch.device) -> torch.Tensor:
    seeds, edges = (x.double() for x in inputs(name, device))
    return steps(transitions(edges[0]), seeds)


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from 256 steps in fp64, relative to the largest value."""
    return _error(name, device, random_walk(*inputs(name, device), backend=backend))


def _error(name: str, device: torch.device, got: torch.Tensor) -> float:
    want = expected(name, device)
    return ((got - want).abs().max() / want.max()).item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    seeds, edges = inputs(name, device)
    return lambda: random_walk(seeds, edges, backend=backend)


def peers(name: str, device: torch.device) -> dict:
    seeds, edges = inputs(name, device)
    matrix = transitions(edges[0])
    change = torch.compile(reference.change)
    window = reference.affinities(edges, 5, 10.0)
    degree = reference.degrees(window)

    def stencil() -> torch.Tensor:
        u = seeds
        for _ in range(STEPS):
            u = u + change(u, window, degree)
        return u

    functions = {"csr": lambda: steps(matrix, seeds), "compile, stencil": stencil}
    if seeds.shape[1] == 3 and edges[0].numel() <= LARGEST_DENSE:
        dense = matrix.to_dense()

        def square() -> torch.Tensor:
            return dense @ dense

        def power() -> torch.Tensor:
            result = dense
            for _ in range(8):
                result = result @ result
            return (result @ seeds[0].flatten(1).T).T.reshape(seeds.shape)

        square.scale = 8
        if len(dense) <= SQUARED_IN_FULL:
            functions["dense"] = power
        else:
            functions["dense, 8 x its first squaring"] = square
    return functions


def peer_error(name: str, device: torch.device, peer: str, result: torch.Tensor) -> float | None:
    return None if peer.startswith("dense,") else _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Seeds and edges in, maps out; 80 applications of a stencil of 69 entries, as a series of 256 steps needs them."""
    b, c, h, w = SHAPES[name]
    return 4 * b * h * w * (2 * c + 1), 80 * 2 * 69 * b * c * h * w
