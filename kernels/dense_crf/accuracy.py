"""`python -m kernels.dense_crf.accuracy [--size H W] [--oracle fp64|native]`: distance of each mode from mean field.

Three synthetic photographs (smooth, mixed, textured) are given the contrast at which the lattice of their setting has
the occupancy M / 6N measured on PASCAL VOC photographs at 500x375, since accuracy and speed depend on it. Unaries are
scores of cells of 16x16 pixels, as class activation maps are. The oracle is the reference in fp64 with mode="exact",
O((HW)^2), or, above 192x192 pixels, the native mode="exact", which has a row of its own at smaller sizes.

Columns: labels that differ, in %; total variation distance, mean over the pixels; largest difference of a probability;
then for one application of the normalised bilateral kernel to Q0 the relative L2 error and the largest error.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import available_backends
from kernels.dense_crf.op import dense_crf
from kernels.dense_crf.reference import ExactKernel
from kernels.lattice import Lattice, pixel_features

# name: (bilateral setting, share of texture, occupancy M / 6N)
PHOTOGRAPHS = {
    "smooth": ((80.0, 13.0, 10.0), 0.2, 0.013),
    "mixed": ((64.0, 5.0, 4.0), 0.25, 0.08),
    "textured": ((50.0, 5.0, 10.0), 0.5, 0.24),
}
SPATIAL = (3.0, 3.0)
SIZE = (160, 192)
MAX_FP64 = 192 * 192  # pixels for which the oracle is in fp64
CELL = 16


def octaves(channels: int, size: tuple[int, int], coarsest: float, finest: float, make: torch.Generator) -> Tensor:
    """[channels, H, W] noise of unit deviation, each octave of wavelengths with an amplitude in proportion to them."""
    total, wavelength = torch.zeros(channels, *size), coarsest
    while wavelength >= finest:
        grid = [max(2, round(s / wavelength) + 1) for s in size]
        noise = torch.randn(1, channels, *grid, generator=make)
        total += wavelength * F.interpolate(noise, size, mode="bicubic", align_corners=True)[0]
        wavelength /= 2
    return total / total.std()


def occupancy(image: Tensor, bilateral: tuple[float, float, float]) -> float:
    """M / 6N of the bilateral lattice."""
    lattice = Lattice(pixel_features(image.float(), *bilateral[:2]))
    return lattice.num_vertices / (6 * lattice.num_points)


def photograph(name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """uint8 [3, H, W] with the occupancy of its kind, and the region [H, W] in 0..4 of each pixel."""
    bilateral, texture, target = PHOTOGRAPHS[name]
    make = torch.Generator().manual_seed(1)
    regions = octaves(5, size, max(size) / 2, 8, make).argmax(0)
    colours = torch.randn(5, 3, generator=make)[regions].permute(2, 0, 1)
    edges = F.avg_pool2d(F.pad(colours[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    shading, grain = octaves(3, size, max(size), max(size) / 4, make), octaves(3, size, 16, 1, make)
    look = (1 - texture) * (edges + 0.5 * shading) + texture * grain
    low, high = 0.0, 200.0
    for _ in range(12):
        contrast = (low + high) / 2
        image = (120 + contrast * look).clamp(0, 255).round().to(torch.uint8)
        low, high = (contrast, high) if occupancy(image, bilateral) < target else (low, contrast)
    return image, regions


def cell_scores(regions: Tensor, num_classes: int) -> Tensor:
    """[1, K, H, W] energies from scores of 16x16 cells: the share of each region in the cell, plus noise."""
    make = torch.Generator().manual_seed(2)
    size = tuple(regions.shape)
    grid = [-(-s // CELL) for s in size]
    share = F.adaptive_avg_pool2d(F.one_hot(regions, num_classes).permute(2, 0, 1).float(), grid)
    scores = 4 * share + torch.randn(num_classes, *grid, generator=make)
    probs = F.interpolate(scores[None], size, mode="bilinear").softmax(1)
    return -probs.clamp_min(1e-5).log()


def pydensecrf(unary: Tensor, image: Tensor, bilateral: tuple[float, float, float]) -> Tensor:
    """Q [K, H, W] of the peer, 10 iterations."""
    import numpy as np
    import pydensecrf.densecrf as peer

    k, h, w = unary.shape
    field = peer.DenseCRF2D(w, h, k)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(k, -1).numpy()))
    field.addPairwiseGaussian(sxy=SPATIAL[0], compat=SPATIAL[1])
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels, compat=bilateral[2])
    return torch.tensor(np.array(field.inference(10))).reshape(k, h, w)


def native_sums(image: Tensor, sigma_xy: float, sigma_rgb: float, values: Tensor) -> Tensor:
    """The native true Gaussian sums, un-normalised, of values [n, K]."""
    planes = values.t().reshape(1, -1, *image.shape[-2:]).float()
    sums = torch.ops.wsss.gaussian_filter(image.float()[None], planes, sigma_xy, sigma_rgb)
    return sums[0].flatten(1).t()


def filtered(mode: str, image: Tensor, bilateral: tuple[float, float, float], values: Tensor) -> Tensor:
    """n K n applied to values [n, K]; fast and ring: the lattice in fp64, which leaves its own error alone."""
    if mode == "exact":
        norm = (native_sums(image, *bilateral[:2], values.new_ones(len(values), 1)) + 1e-20).rsqrt()
        return norm * native_sums(image, *bilateral[:2], norm * values)
    features = pixel_features(image.double(), *bilateral[:2])
    return Lattice(features, ring=mode == "ring").normalised(1.0).filter(values)


def measure(
    name: str, size: tuple[int, int], num_classes: int, modes: list[str], oracle_backend: str
) -> list[dict[str, float | str]]:
    """The rows of one photograph; NaN where there is nothing to measure. oracle_backend: fp64 or native."""
    bilateral = PHOTOGRAPHS[name][0]
    image, regions = photograph(name, size)
    unary = cell_scores(regions, num_classes)
    settings = {"spatial": SPATIAL, "bilateral": bilateral}
    values = (-unary.double()).softmax(1)[0].flatten(1).t().contiguous()
    if oracle_backend == "fp64":
        oracle = dense_crf(unary.double(), image[None], mode="exact", backend="reference", **settings)[0]
        kernel = ExactKernel(pixel_features(image.double(), *bilateral[:2]), 1.0)
        smooth = kernel.filter(values)
    else:
        oracle = dense_crf(unary, image[None], mode="exact", backend="native", **settings)[0].double()
        smooth = filtered("exact", image, bilateral, values)
        modes = [m for m in modes if m != "exact"]
    rows = []
    for mode in modes:
        row = {"photograph": name, "occupancy": occupancy(image, bilateral), "mode": mode}
        if mode == "pydensecrf":
            q = pydensecrf(unary[0], image, bilateral)
        else:
            q = dense_crf(unary, image[None], mode=mode, **settings)[0]
            error = (filtered(mode, image, bilateral, values) - smooth).abs()
            row |= {"filter_l2": (error.norm() / smooth.norm()).item(), "filter_worst": error.max().item()}
        difference = (q.double() - oracle).abs()
        wrong = q.argmax(0) != oracle.argmax(0)
        best = oracle.topk(2, dim=0).values
        rows.append(
            {"filter_l2": float("nan"), "filter_worst": float("nan")}
            | row
            | {"labels_%": 100 * wrong.float().mean().item(), "tv": 0.5 * difference.sum(0).mean().item()}
            | {"worst": difference.max().item(), "margin": max([0.0, *(best[0] - best[1])[wrong].tolist()])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.dense_crf.accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--oracle", choices=["fp64", "native"], help="default: by the size")
    parser.add_argument("--photograph", choices=list(PHOTOGRAPHS), nargs="*", default=list(PHOTOGRAPHS))
    options = parser.parse_args()
    modes = ["fast", "ring", *(["exact"] if "native" in available_backends("dense_crf") else [])]
    if importlib.util.find_spec("pydensecrf") is not None:
        modes.insert(0, "pydensecrf")
    size = tuple(options.size)
    oracle = options.oracle or ("fp64" if size[0] * size[1] <= MAX_FP64 else "native")
    print(f"{size[0]}x{size[1]}, {options.classes} classes, oracle: {oracle}")
    print(f"{'photograph':>10} {'M/6N':>6} {'mode':>10} {'labels %':>9} {'TV':>9} {'worst':>9} {'L2':>9} {'worst':>9}")
    for name in options.photograph:
        for row in measure(name, size, options.classes, modes, oracle):
            text = f"{name:>10} {row['occupancy']:6.3f} {row['mode']:>10} {row['labels_%']:9.4f} {row['tv']:9.2e}"
            text += f" {row['worst']:9.2e} {row['filter_l2']:9.2e} {row['filter_worst']:9.2e}"
            print(text + f"  (margin of wrong labels <= {row['margin']:.1e})", flush=True)


if __name__ == "__main__":
    main()
