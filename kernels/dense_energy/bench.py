"""Benchmark cases of dense_energy, value and gradient; the lattice has half the height and the width of the crop."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F

from kernels.dense_energy import reference
from kernels.dense_energy.op import dense_energy
from kernels.lattice import Lattice, pixel_features

# name: (B, K, H, W)
SHAPES = {
    "2x12x224": (2, 12, 224, 224),
    "4x21x320": (4, 21, 320, 320),
    "4x21x448": (4, 21, 448, 448),
    "4x81x448": (4, 81, 448, 448),
}
# Relative L2 norm, against fp64. Not the largest difference: where a pixel lies between two lattice cells fp32 may take
# the other, which moves some hundred gradients around it by up to 1e-4 of the largest.
TOLERANCE = 1e-5
PEER_TOLERANCE = 1e-3  # a C++ peer takes other cells at such pixels


def inputs(name: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Smooth probabilities over a smooth image with noise; a third of the pixels unlabelled."""
    b, k, h, w = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    probs = F.interpolate(3 * torch.randn(b, k, 9, 9, generator=make), (h, w), mode="bilinear").softmax(1)
    image = 220 * F.interpolate(torch.rand(b, 3, 7, 7, generator=make), (h, w), mode="bilinear")
    image = (image + 12 * torch.rand(b, 3, h, w, generator=make)).round()
    labels = probs.argmax(1)
    labels[:, : h // 3] = 255
    return tuple(x.to(device) for x in (probs, image, torch.ones(b, h, w), labels))


def _gradient(probs: torch.Tensor, *args: torch.Tensor, backend: str) -> torch.Tensor:
    probs = probs.detach().requires_grad_()
    dense_energy(probs, *args, backend=backend).backward()
    return probs.grad


def check(name: str, device: torch.device, backend: str) -> float:
    """Difference of the gradient from the reference in fp64, relative, in the L2 norm."""
    probs, *rest = inputs(name, device)
    return _error(name, device, _gradient(probs, *rest, backend=backend))


@functools.cache
def _expected(name: str, device: torch.device) -> torch.Tensor:
    probs, *rest = inputs(name, device)
    return _gradient(probs.double(), *rest, backend="reference")


def _error(name: str, device: torch.device, got: torch.Tensor) -> float:
    want = _expected(name, device)
    return ((got - want).norm() / want.norm()).item()


def run(name: str, device: torch.device, backend: str):
    """A function without arguments that computes value and gradient once."""
    probs, *rest = inputs(name, device)
    return lambda: _gradient(probs, *rest, backend=backend)


def _one_by_one(image: torch.Tensor, planes: torch.Tensor, sigma_xy: float, sigma_rgb: float, scale: str):
    """The filter as the published loss calls it: one lattice per image, one class after the other."""
    sums = []
    for i, p in zip(image, planes, strict=True):
        lattice = Lattice(pixel_features(i, sigma_xy, sigma_rgb))
        sums.append(torch.stack([lattice.filter(x.reshape(-1, 1)).view_as(x) for x in p]))
    return torch.stack(sums)


def _one_by_one_in_cpp(image: torch.Tensor, planes: torch.Tensor, sigma_xy: float, sigma_rgb: float, scale: str):
    """The same with the C++ lattice of pydensecrf2, by the code of the same author that the published loss holds: a
    field of one label per image, and a mean-field step per class, which leaves the filtered values in its energies."""
    import numpy as np
    import pydensecrf.densecrf as peer

    sums = torch.empty_like(planes)
    h, w = planes.shape[-2:]
    for i, p, out in zip(image.permute(0, 2, 3, 1).to(torch.uint8).contiguous(), planes, sums, strict=True):
        field = peer.DenseCRF2D(w, h, 1)
        field.addPairwiseBilateral(sigma_xy, sigma_rgb, i.numpy(), 1, normalization=peer.NO_NORMALIZATION)
        values, energies, scratch = (field.startInference()[0] for _ in range(3))
        for x, y in zip(p, out, strict=True):
            np.asarray(values)[:] = x.reshape(1, -1).numpy()
            field.stepInference(values, energies, scratch)
            y[:] = torch.from_numpy(np.asarray(energies)).view(h, w)
    return sums


def peers(name: str, device: torch.device) -> dict:
    """`eager`: the lattice in plain torch, class by class; `pydensecrf2`: lattice and one mean-field step on all
    classes, which holds the same filter in C++ (and a softmax), without value and gradient; `class by class in C++`:
    the whole loss around that lattice, in place of the published one. Nothing for
    torch.compile: the number of vertices depends on the image."""
    probs, image, roi, labels = inputs(name, device)

    def loss(sums) -> torch.Tensor:
        leaf = probs.detach().requires_grad_()
        reference.dense_energy(leaf, image, roi, labels, 15.0, 100.0, 0.5, "lattice", sums=sums).backward()
        return leaf.grad

    functions = {"eager": functools.partial(loss, _one_by_one)}
    if device.type == "cpu" and importlib.util.find_spec("pydensecrf"):
        functions["pydensecrf2"] = _mean_field_step(probs, image)
        functions["class by class in C++"] = functools.partial(loss, _one_by_one_in_cpp)
    return functions


def _mean_field_step(probs: torch.Tensor, image: torch.Tensor):
    import pydensecrf.densecrf as peer

    small = [int(s * 0.5) for s in probs.shape[-2:]]
    unary = -F.interpolate(probs, small, mode="bilinear").log().flatten(2)
    pixels = F.interpolate(image, small).permute(0, 2, 3, 1).to(torch.uint8).contiguous()

    def step() -> None:
        for u, p in zip(unary, pixels, strict=True):
            field = peer.DenseCRF2D(small[1], small[0], len(u))
            field.setUnaryEnergy(u.numpy())
            field.addPairwiseBilateral(50, 15, p.numpy(), 1, normalization=peer.NO_NORMALIZATION)
            field.inference(1)

    return step


def peer_error(name: str, device: torch.device, peer: str, result: torch.Tensor | None) -> float | None:
    return None if result is None else _error(name, device, result)


def cost(name: str) -> tuple[int, int]:
    """Probabilities in, gradient out; splat and slice of 6 corners a pixel at half the size."""
    b, k, h, w = SHAPES[name]
    return 8 * b * k * h * w, 2 * 2 * 6 * b * k * (h // 2) * (w // 2)
