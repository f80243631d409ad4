"""radius_mask: disc sizes, exact zeros, gradient."""

import math

import pytest
import torch

from kernels import radius_mask


def kept(radius, metric="euclidean", grid=(13, 13)):
    """Number of cells in the disc of the central patch."""
    n = grid[0] * grid[1]
    out = radius_mask(torch.zeros(1, n, n), grid, radius, metric=metric)
    assert set(out.unique().tolist()) <= {0.0, 0.5}
    return int((out[0, n // 2] > 0).sum())


@pytest.mark.parametrize(("radius", "cells"), [(1, 5), (math.sqrt(2), 9), (2, 13), (3, 29), (4, 49), (5, 81)])
def test_pcre_check_6_disc_sizes(radius, cells):
    assert kept(radius) == cells


def test_metrics():
    assert kept(2, "euclidean_open") == 9
    assert kept(math.sqrt(2), "euclidean_open") == 5  # sqrt(2)^2 is above 2 in floating point
    assert kept(2, "chebyshev") == 25
    assert kept(0) == 1 and kept(0, "chebyshev") == 1 and kept(0, "euclidean_open") == 0
    assert kept(100) == 169


def test_kept_set_by_loop():
    h, w, radius = 4, 7, 2.3
    logits = torch.randn(2, h * w, h * w)
    out = radius_mask(logits, (h, w), radius)
    for i in range(h * w):
        for j in range(h * w):
            inside = math.dist(divmod(i, w), divmod(j, w)) <= radius
            want = torch.sigmoid(logits[:, i, j]) if inside else torch.zeros(2)
            torch.testing.assert_close(out[:, i, j], want, rtol=1e-6, atol=0)


def test_gradcheck_and_zero_gradient_outside():
    logits = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: radius_mask(x, (2, 3), 1.0), logits)
    bad = torch.full((1, 6, 6), math.inf)
    bad[0, range(6), range(6)] = 0
    bad.requires_grad_()
    radius_mask(bad, (2, 3), 0.0).sum().backward()
    assert torch.equal(bad.grad[0], 0.25 * torch.eye(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_layout_empty_repeat(dtype):
    logits = torch.randn(2, 6, 6).to(dtype)
    out = radius_mask(logits, (2, 3), 1.0)
    assert out.dtype == dtype
    assert torch.equal(out, radius_mask(logits.mT.contiguous().mT, (2, 3), 1.0))
    assert radius_mask(logits[:0], (2, 3), 1.0).shape == (0, 6, 6)


def test_compile_fullgraph():
    logits = torch.randn(2, 6, 6)
    run = torch.compile(lambda x: radius_mask(x, (2, 3), 1.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(logits), radius_mask(logits, (2, 3), 1.5))


def test_errors():
    logits = torch.zeros(1, 6, 6)
    with pytest.raises(ValueError, match=r"radius_mask: grid must have h \* w = 6 patches, got \(2, 2\)"):
        radius_mask(logits, (2, 2), 1.0)
    with pytest.raises(ValueError, match=r"radius_mask: logits must be \[B, 6, 6\], got \(1, 6, 5\)"):
        radius_mask(logits[..., 1:], (2, 3), 1.0)
    with pytest.raises(ValueError, match="radius_mask: radius must lie in .* got -1"):
        radius_mask(logits, (2, 3), -1.0)
    with pytest.raises(ValueError, match="radius_mask: radius must lie in .* got nan"):
        radius_mask(logits, (2, 3), math.nan)
    with pytest.raises(ValueError, match="radius_mask: metric must be one of euclidean, .* got 'l1'"):
        radius_mask(logits, (2, 3), 1.0, metric="l1")
    with pytest.raises(TypeError, match="radius_mask: logits must be floating point"):
        radius_mask(logits.int(), (2, 3), 1.0)
