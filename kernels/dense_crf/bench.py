"""Benchmark cases of dense_crf: 10 iterations at the settings of pydensecrf's examples, `few` with prune = 1e-3.

`python -m kernels.dense_crf.bench [case ...]` compares mode="fast" with pydensecrf, where that is installed, on the
three photographs of accuracy.py, each with its setting: process time of one thread, in turn, and labels that differ;
wall time with one and two threads; growth of the resident memory of the process at its peak.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.dense_crf.accuracy import PHOTOGRAPHS, photograph
from kernels.dense_crf.op import dense_crf
from kernels.measure import peak_bytes

# name: (B, K, H, W, classes alive)
SHAPES = {
    "21x500x375-all": (1, 21, 500, 375, 21),
    "21x500x375-few": (1, 21, 500, 375, 3),
    "51x224x224-few": (1, 51, 224, 224, 3),
    "81x640x480-all": (1, 81, 640, 480, 81),
    "81x640x480-few": (1, 81, 640, 480, 4),
    "8x21x375x500-few": (8, 21, 375, 500, 3),
}
TOLERANCE = 1e-3  # against fp64 without pruning; at ties of the lattice cells fp32 may take the other cell
ITERATIONS = 10
BILATERAL = (80.0, 13.0, 10.0)
ROUNDS = 5


@functools.cache
def inputs(name: str, device: torch.device, kind: str | None = None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unary, image and prune: coarse fields plus noise; classes that are not alive stay near 1e-5. `kind`: the image is
    this photograph of accuracy.py instead.
    """
    b, k, h, w, alive = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(b, 3, 6, 8, generator=make), (h, w), mode="bilinear") * 200
    fine = F.interpolate(torch.rand(b, 3, h // 4, w // 4, generator=make), (h, w), mode="bilinear") * 40
    image = (coarse + fine + 10 * torch.rand(b, 3, h, w, generator=make)).round().to(torch.uint8)
    if kind is not None:
        image = photograph(kind, (h, w))[0].expand(b, 3, h, w).contiguous()
    scores = 3 * F.interpolate(torch.randn(b, k, 9, 11, generator=make), (h, w), mode="bilinear")
    scores[:, alive:] -= 25
    unary = -scores.softmax(1).clamp_min(1e-5).log()
    return unary.to(device), image.to(device), 0.0 if alive == k else 1e-3


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64 without pruning."""
    unary, image, prune = inputs(name, device)
    want = dense_crf(unary.double(), image, iterations=ITERATIONS, backend="reference")
    return (dense_crf(unary, image, iterations=ITERATIONS, prune=prune, backend=backend) - want).abs().max().item()


def run(name: str, device: torch.device, backend: str, kind: str | None = None) -> Callable[[], torch.Tensor]:
    """A function without arguments that runs the op once."""
    unary, image, prune = inputs(name, device, kind)
    bilateral = PHOTOGRAPHS[kind][0] if kind else BILATERAL
    return lambda: dense_crf(unary, image, bilateral=bilateral, iterations=ITERATIONS, prune=prune, backend=backend)


def peers(name: str, device: torch.device, kind: str | None = None) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions without arguments that do the same by other packages, those installed alone."""
    if device.type != "cpu" or importlib.util.find_spec("pydensecrf") is None:
        return {}
    import numpy as np
    import pydensecrf.densecrf as peer

    unary, image, _ = inputs(name, device, kind)
    bilateral = PHOTOGRAPHS[kind][0] if kind else BILATERAL
    b, k, h, w, _ = SHAPES[name]
    energies = unary.reshape(b, k, -1).numpy()
    pixels = image.permute(0, 2, 3, 1).contiguous().numpy()

    def one(n: int) -> torch.Tensor:
        field = peer.DenseCRF2D(w, h, k)
        field.setUnaryEnergy(energies[n])
        field.addPairwiseGaussian(sxy=3, compat=3)
        field.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels[n], compat=bilateral[2])
        return torch.from_numpy(np.asarray(field.inference(ITERATIONS))).reshape(k, h, w)

    return {"pydensecrf": lambda: torch.stack([one(n) for n in range(b)])}


def cost(name: str) -> tuple[int, int]:
    """(bytes, flops) that cannot be avoided: unary and image in, Q out; per iteration, pixel and live class the splat
    and slice of 3 + 6 corners, two operations each, and 10 for the softmax. The blur varies with the image: left out.
    """
    b, k, h, w, alive = SHAPES[name]
    pixels = b * h * w
    return 4 * pixels * (2 * k + 3), ITERATIONS * pixels * alive * (2 * 2 * (3 + 6) + 10)


def in_turn(functions: dict[str, Callable], clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each."""
    times = {name: [] for name in functions}
    for turn in range(ROUNDS):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            start = clock()
            functions[name]()
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def with_threads(count: int, function: Callable) -> Callable:
    def call() -> None:
        torch.set_num_threads(count)
        function()
        torch.set_num_threads(1)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.dense_crf.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("case", nargs="*", help=f"any of: {', '.join(SHAPES)}; default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    for name in options.case or SHAPES:
        for kind in PHOTOGRAPHS:
            functions = {"native": run(name, cpu, "native", kind)} | peers(name, cpu, kind)
            text = [f"{who} {ms:.0f} ms" for who, ms in in_turn(functions, time.process_time).items()]
            if len(functions) > 1:
                ours, theirs = (function().argmax(1) for function in functions.values())
                text.append(f"labels that differ {100 * (ours != theirs).float().mean().item():.4f} %")
            counts = {f"{n} threads": with_threads(n, functions["native"]) for n in (1, 2)}
            text += [f"wall {n} {ms:.0f} ms" for n, ms in in_turn(counts, time.perf_counter).items()]
            print(f"{name} {kind} {PHOTOGRAPHS[kind][0]}: {', '.join(text)}", flush=True)
        functions = {"native": run(name, cpu, "native")} | peers(name, cpu)
        peaks = {who: peak_bytes(function, cpu) for who, function in functions.items()}
        text = [f"{who} {peak / 2**20:.0f} MiB" for who, peak in peaks.items() if peak is not None]
        print(f"{name}: memory at the peak {', '.join(text)}", flush=True)


if __name__ == "__main__":
    main()
