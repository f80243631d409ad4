"""dilate_regions against a loop over seeds."""

import math

import pytest
import torch

from kernels import dilate_regions

INSIDE = {
    "euclidean": lambda dy, dx, r: math.hypot(dy, dx) <= r,
    "euclidean_open": lambda dy, dx, r: math.hypot(dy, dx) < r,
    "chebyshev": lambda dy, dx, r: max(abs(dy), abs(dx)) <= r,
}


@pytest.mark.parametrize("metric", INSIDE)
@pytest.mark.parametrize("radius", [0, 1, 1.5, 2.3, 50])
def test_equals_the_loop(metric, radius):
    seeds = torch.rand(2, 2, 6, 9) < 0.05
    seeds[0, 0, 0, 0] = True
    seeds[1, 1] = False
    want = torch.zeros_like(seeds)
    for b, m, y, x in seeds.nonzero().tolist():
        for yy in range(6):
            for xx in range(9):
                want[b, m, yy, xx] |= INSIDE[metric](yy - y, xx - x, radius)
    assert torch.equal(dilate_regions(seeds, radius, metric=metric), want)


def test_empty_layout_repeat():
    seeds = torch.rand(2, 3, 5, 7) < 0.2
    want = dilate_regions(seeds, 2)
    assert torch.equal(want, dilate_regions(seeds.mT.contiguous().mT, 2))
    for shape in ((0, 2, 3, 3), (2, 0, 3, 3), (1, 1, 0, 3)):
        assert dilate_regions(torch.zeros(shape, dtype=torch.bool), 2).shape == shape


def test_errors():
    seeds = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"dilate_regions: seeds must be \[B, M, h, w\]"):
        dilate_regions(seeds[0], 1)
    with pytest.raises(TypeError, match="dilate_regions: seeds must be bool"):
        dilate_regions(seeds.float(), 1)
    with pytest.raises(ValueError, match="dilate_regions: radius must lie in"):
        dilate_regions(seeds, -0.5)
    with pytest.raises(ValueError, match="dilate_regions: metric must be one of"):
        dilate_regions(seeds, 1, metric="disc")
