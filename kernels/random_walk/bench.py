"""Benchmark cases of random_walk, at the stride-4 grids of its users: 256 steps, radius 5, beta 10.

`python -m kernels.random_walk.bench` also sets the native op against what research code does, on the CPU: the matrix
squared 8 times (`dense`; beyond 64x64 one squaring is timed and counted 8 times) and a sparse matrix applied 256 times
(`csr`). The time that the peers need for their matrix is left out; ours builds the affinities each time. Times are CPU
time of the process.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch

from kernels.random_walk import reference
from kernels.random_walk.op import random_walk

# name: (B, C, h, w)
SHAPES = {f"1x{c}x{h}x{w}": (1, c, h, w) for h, w in ((64, 64), (94, 125), (128, 128)) for c in (3, 20)}
TOLERANCE = 1e-4  # of the maximum, against 256 steps in fp64
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
    want = expected(name, device)
    return ((random_walk(*inputs(name, device), backend=backend) - want).abs().max() / want.max()).item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    seeds, edges = inputs(name, device)
    return lambda: random_walk(seeds, edges, backend=backend)


def cpu_ms(function) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def compare(name: str, rounds: int = 10) -> str:
    """One line: median CPU times, error and labels of the native op beside the two peers."""
    cpu = torch.device("cpu")
    seeds, edges = inputs(name, cpu)
    matrix, want = transitions(edges[0]), expected(name, cpu)
    ours, csr = [], []
    for _ in range(rounds):
        ours.append(cpu_ms(run(name, cpu, "native")))
        csr.append(cpu_ms(lambda: steps(matrix, seeds)))
    ours, csr = statistics.median(ours), statistics.median(csr)
    got, peer = random_walk(seeds, edges, backend="native"), steps(matrix, seeds)
    moved = (got.argmax(1) != want.argmax(1)).double().mean().item()
    text = f"{name}: native {ours:.1f} ms, error {check(name, cpu, 'native'):.1e}, labels moved {moved:.1e}; "
    text += f"csr {csr:.0f} ms = {csr / ours:.1f}x, error {((peer - want).abs().max() / want.max()).item():.1e}"
    if seeds.shape[1] == 3 and seeds[0, 0].numel() < 12000:
        power = [matrix.to_dense()]
        full = seeds[0, 0].numel() == 64 * 64

        def square():
            for _ in range(8 if full else 1):
                power[0] = power[0] @ power[0]

        dense = cpu_ms(square) * (1 if full else 8)
        text += f"; dense {dense:.0f} ms = {dense / ours:.0f}x" + ("" if full else " (8 times its first squaring)")
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in SHAPES:
        print(compare(case), flush=True)
