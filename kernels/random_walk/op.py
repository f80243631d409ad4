"""Random walk: spreads seed maps over regions that no edge separates."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.random_walk import reference

METHODS = ("chebyshev", "stepped")
MAX_RADIUS = 16
MAX_LOG2_STEPS = 16


def _native(seeds: Tensor, edges: Tensor, radius: int, beta: float, steps: int, tails: list[float]) -> Tensor:
    if torch.float64 in (seeds.dtype, edges.dtype):
        raise TypeError("random_walk: the native backend computes in fp32; use backend='reference' for float64")
    return torch.ops.wsss.random_walk(seeds.float(), edges.float(), radius, beta, steps, tails, False)


if native_problem("random_walk") is None:

    @torch.library.register_fake("wsss::random_walk")
    def _fake(seeds, edges, radius, beta, steps, tails, transposed):
        return seeds.new_empty(seeds.shape)

    def _keep(ctx, inputs, output):
        _, edges, *ctx.settings, ctx.transposed = inputs
        ctx.save_for_backward(edges)

    def _backward(ctx, grad):
        (edges,) = ctx.saved_tensors
        seeds = torch.ops.wsss.random_walk(grad, edges, *ctx.settings, not ctx.transposed)
        return seeds, None, None, None, None, None, None

    torch.library.register_autograd("wsss::random_walk", _backward, setup_context=_keep)


register("random_walk", reference=reference.random_walk, native=_native)


def random_walk(
    seeds: Tensor,
    edges: Tensor,
    *,
    radius: int = 5,
    beta: float = 10.0,
    log2_steps: int = 8,
    method: str = "chebyshev",
    backend: str | None = None,
) -> Tensor:
    """Seed maps after 2^log2_steps steps of a random walk that avoids edges: y = x T^(2^t), x a row of pixels.

    T_ij = A_ij^beta / sum_k A_kj^beta; A_ii = 1, A_ij = 1 - max of the edges on the line from i to j for pixels closer
    than `radius`, else 0. Each column of T sums to 1: every output is a weighted mean of its seeds.

    seeds       [B, C, h, w], finite, fp32, bf16, fp16 (fp64: reference alone); all C share the edges of their image.
                IRN damps them on edges first, seeds * (1 - edges); that is left to the caller.
    edges       [B, h, w], probability of an edge in [0, 1]; without gradient.
    radius      in pixels of the grid, integer in [1, 16]; 1: every pixel is alone and the seeds come back.
    beta        > 0; raises affinities to this power.
    log2_steps  t, integer in [0, 16].
    method      "chebyshev": a series of about sqrt(2^t * 33) applications of T, cut at 1e-6 of the seeds; "stepped":
                2^t applications.
    Returns [B, C, h, w] float32 (float64 for float64 inputs), differentiable in `seeds`.
    Raises ValueError or TypeError for a wrong shape, dtype, device, range, method or backend; on the CPU, and not
    inside torch.compile, also for seeds that are not finite and edges outside [0, 1] (on CUDA the look at the values
    would stall the stream; edges are clamped there).
    Source: IRN (Ahn et al., CVPR 2019), section 5.1, with the affinities of its published code.
    """
    checks.shape("random_walk", "seeds", seeds, "B", "C", "h", "w")
    checks.shape("random_walk", "edges", edges, seeds.shape[0], seeds.shape[2], seeds.shape[3])
    checks.floating("random_walk", seeds=seeds, edges=edges)
    checks.same_device("random_walk", seeds=seeds, edges=edges)
    for name, value, low, high in (("radius", radius, 1, MAX_RADIUS), ("log2_steps", log2_steps, 0, MAX_LOG2_STEPS)):
        if not low <= value <= high or value != int(value):
            raise ValueError(f"random_walk: {name} must be an integer in [{low}, {high}], got {value}")
    checks.number("random_walk", "beta", beta, low=0.0, open=True)
    if method not in METHODS:
        raise ValueError(f"random_walk: method must be one of {', '.join(METHODS)}, got {method!r}")
    edges = edges.detach()
    if seeds.device.type == "cpu" and not torch.compiler.is_compiling():
        if not torch.isfinite(seeds).all():
            raise ValueError("random_walk: seeds must be finite, got NaN or infinity")
        if not ((edges >= 0) & (edges <= 1)).all():
            raise ValueError("random_walk: edges must lie in [0, 1], got values outside or NaN")
    radius, log2_steps = int(radius), int(log2_steps)
    tails = reference.series_tails(log2_steps, radius) if method == "chebyshev" else []
    run = choose("random_walk", seeds.device, backend)
    return run(seeds, edges, radius, float(beta), 2**log2_steps, tails)
