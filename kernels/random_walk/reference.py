"""Random walk on the affinities of an edge map in plain torch; the definition of the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype

TRUNCATION = 1e-6  # bound on what the cut of the series changes, relative to the seeds in the 2-norm


def offsets(radius: int) -> list[tuple[int, int]]:
    """Half of the neighbours (dy, dx) closer than `radius`, row by row; the other half are their negatives."""
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in range(1 - radius, radius)
        if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius
    ]


def path(dy: int, dx: int) -> list[tuple[int, int]]:
    """The cells (y, x) between (0, 0) and (dy, dx), both included, that lie closer than 1 to the line through them."""
    return [
        (y, x)
        for y in range(dy + 1)
        for x in range(min(dx, 0), max(dx, 0) + 1)
        if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    ]


def series_degree(log2_steps: int, radius: int) -> int:
    """Degree of the Chebyshev series of x^(2^t): sqrt(2^(t+1) ln(2 sqrt(z) / eps)), rounded up to an even number.

    z bounds the quotient of two degrees of the graph, so the result does not depend on the edges.
    """
    z = 1 + 2 * len(offsets(radius))
    exact = math.sqrt(2.0 ** (log2_steps + 1) * math.log(2 * math.sqrt(z) / TRUNCATION))
    return 2 * math.ceil(exact / 2)


def series_tails(log2_steps: int, radius: int) -> list[float]:
    """Sums of the coefficients c_2m + c_2m+2 + ... of x^n = sum_k c_k T_k(x) for m = 1, 2, ..., n = 2^log2_steps.

    c_k = 2^(1-n) n! / ((n-k)/2)! / ((n+k)/2)! for even k > 0. Empty where the whole series has no more terms than
    there are steps: then the steps themselves are taken.
    """
    n, degree = 2**log2_steps, series_degree(log2_steps, radius)
    if degree >= n:
        return []
    tails, total = [], 0.0
    for m in range(degree // 2, 0, -1):
        log_binomial = math.lgamma(n + 1) - math.lgamma(n / 2 - m + 1) - math.lgamma(n / 2 + m + 1)
        total += 2 * math.exp(log_binomial - n * math.log(2))
        tails.append(total)
    return tails[::-1]


def affinities(edges: Tensor, radius: int, beta: float) -> Tensor:
    """[B, 1, h, w, k, k], k = 2 radius - 1: A^beta of each pixel with the window around it, 0 for the pixel itself.

    The affinity of a pair is 1 - max of the edges on its path. Pairs that leave the map do not exist.
    """
    b, h, w = edges.shape
    middle = radius - 1
    window = edges.new_zeros(b, h, w, 2 * radius - 1, 2 * radius - 1)
    for dy, dx in offsets(radius):
        rows, columns, left = h - dy, w - abs(dx), max(-dx, 0)
        if rows <= 0 or columns <= 0:
            continue
        cells = [edges[:, y : y + rows, left + x : left + x + columns] for y, x in path(dy, dx)]
        weight = (1 - torch.stack(cells).amax(0)).clamp(0, 1) ** beta
        window[:, :rows, left : left + columns, middle + dy, middle + dx] = weight
        window[:, dy:, left + dx : left + dx + columns, middle - dy, middle - dx] = weight
    return window.unsqueeze(1)


def degrees(window: Tensor) -> Tensor:
    """[B, 1, h, w]: the weight 1 of the pixel itself plus those of its pairs."""
    return 1 + window.sum((-2, -1))


def change(u: Tensor, window: Tensor, z: Tensor) -> Tensor:
    """P u - u with (P u)_j = sum_i W_ij u_i / z_j, as sum_i W_ij (u_i - u_j) / z_j: rounding leaves constants alone."""
    size = window.shape[-1]
    near = torch.nn.functional.pad(u, (size // 2,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    return (window * (near - u[..., None, None])).sum((-2, -1)) / z


def random_walk(seeds: Tensor, edges: Tensor, radius: int, beta: float, steps: int, tails: list[float]) -> Tensor:
    """`steps` steps of P; with `tails` their Chebyshev series, sum_k c_k T_k(P), of degree 2 len(tails).

    T_k+1 = 2 P T_k - T_k-1 is run on the differences v_k = T_k - T_k-1, which are small where the maps are smooth:
    v_k+1 = v_k + 2 (P - 1) T_k. By parts, sum_k c_k T_k = T_0 + sum_m tails_m (v_2m-1 + v_2m), and a constant stays
    what it is.
    """
    dtype = accumulate_dtype(seeds, edges)
    seeds, edges = seeds.to(dtype), edges.to(dtype)
    if seeds.numel() == 0:
        return seeds.clone()
    window = affinities(edges, radius, beta)
    z = degrees(window)
    u = seeds.clone(memory_format=torch.contiguous_format)
    if not tails:
        for _ in range(steps):
            u = u + change(u, window, z)
        return u
    v = change(u, window, z)
    out = u.double()  # where a seed stands alone, a sum that starts at the seed ends at a ten-thousandth of it
    u = u + v
    for m, tail in enumerate(tails):
        if m > 0:
            v = v + 2 * change(u, window, z)
            u = u + v
        odd = v
        v = v + 2 * change(u, window, z)
        u = u + v
        out = out + tail * (odd.double() + v.double())
    return out.to(dtype)
