"""Benchmark cases of dense_crf: 10 iterations at the settings of pydensecrf's examples, `few` with prune = 1e-3.

`python -m kernels.dense_crf.bench` times one thread against pydensecrf, where that is installed.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from kernels.dense_crf.op import dense_crf

# name: (K, H, W, classes alive)
SHAPES = {
    "21x500x375-all": (21, 500, 375, 21),
    "21x500x375-few": (21, 500, 375, 3),
    "51x224x224-few": (51, 224, 224, 3),
}
TOLERANCE = 1e-3  # against fp64 without pruning; at ties of the lattice cells fp32 may take the other cell
ROUNDS = 5


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unary, image and prune: coarse fields plus noise; classes that are not alive stay near 1e-5."""
    k, h, w, alive = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(1, 3, 6, 8, generator=make), (h, w), mode="bilinear") * 200
    fine = F.interpolate(torch.rand(1, 3, h // 4, w // 4, generator=make), (h, w), mode="bilinear") * 40
    image = (coarse + fine + 10 * torch.rand(1, 3, h, w, generator=make)).round().to(torch.uint8)
    scores = 3 * F.interpolate(torch.randn(1, k, 9, 11, generator=make), (h, w), mode="bilinear")
    scores[:, alive:] -= 25
    unary = -scores.softmax(1).clamp_min(1e-5).log()
    return unary.to(device), image.to(device), 0.0 if alive == k else 1e-3


def check(name: str, device: torch.device, backend: str) -> float:
    """Largest difference from the reference in fp64 without pruning."""
    unary, image, prune = inputs(name, device)
    want = dense_crf(unary.double(), image, backend="reference")
    return (dense_crf(unary, image, prune=prune, backend=backend) - want).abs().max().item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that runs the op once."""
    unary, image, prune = inputs(name, device)
    return lambda: dense_crf(unary, image, prune=prune, backend=backend)


def against_pydensecrf(name: str, bilateral: tuple[float, float, float]) -> str:
    """Median CPU times of one thread, in turn, and the share of labels that differ."""
    import numpy as np
    import pydensecrf.densecrf as peer

    unary, image, prune = inputs(name, torch.device("cpu"))
    k, h, w, _ = SHAPES[name]
    energies, pixels = unary[0].reshape(k, -1).numpy(), image[0].permute(1, 2, 0).contiguous().numpy()

    def theirs():
        field = peer.DenseCRF2D(w, h, k)
        field.setUnaryEnergy(energies)
        field.addPairwiseGaussian(sxy=3, compat=3)
        field.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels, compat=bilateral[2])
        return torch.from_numpy(np.asarray(field.inference(10))).reshape(k, h, w)

    def ours():
        return dense_crf(unary, image, bilateral=bilateral, prune=prune, backend="native")[0]

    differ = (ours().argmax(0) != theirs().argmax(0)).float().mean().item()
    times = {ours: [], theirs: []}
    for turn in range(ROUNDS):
        for function in list(times)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            function()
            times[function].append(1e3 * (time.process_time() - start))
    a, b = (statistics.median(t) for t in times.values())
    return f"{a:.0f} ms, pydensecrf {b:.0f} ms, {b / a:.1f}x; labels that differ: {100 * differ:.4f} %"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in SHAPES:
        for setting in ((80.0, 13.0, 10.0), (50.0, 5.0, 10.0)):
            print(f"{case} {setting}: {against_pydensecrf(case, setting)}", flush=True)
