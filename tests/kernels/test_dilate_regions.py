"""dilate_regions against a loop over seeds, and the native code against the reference."""

import math

import pytest
import torch

from kernels import available_backends, dilate_regions

CPU_BACKENDS = available_backends("dilate_regions", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
INSIDE = {
    "euclidean": lambda dy, dx, r: math.hypot(dy, dx) <= r,
    "euclidean_open": lambda dy, dx, r: math.hypot(dy, dx) < r,
    "chebyshev": lambda dy, dx, r: max(abs(dy), abs(dx)) <= r,
}


@each_backend
@pytest.mark.parametrize("metric", INSIDE)
@pytest.mark.parametrize("radius", [0, 1, 1.5, 2.3, 50])
def test_equals_the_loop(metric, radius, backend):
    seeds = torch.rand(2, 2, 6, 9) < 0.05
    seeds[0, 0, 0, 0] = True
    seeds[1, 1] = False
    want = torch.zeros_like(seeds)
    for b, m, y, x in seeds.nonzero().tolist():
        for yy in range(6):
            for xx in range(9):
                want[b, m, yy, xx] |= INSIDE[metric](yy - y, xx - x, radius)
    assert torch.equal(dilate_regions(seeds, radius, metric=metric, backend=backend), want)


@native
@pytest.mark.parametrize("metric", INSIDE)
@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 9), (9, 1), (13, 11), (40, 40), (5, 63), (5, 64), (5, 65), (2, 130), (70, 2)]
)
def test_native_equals_reference(grid, metric):
    share = torch.tensor([0.0, 0.02, 0.5])[None, :, None, None]
    for radius in (0, 0.7, math.sqrt(2), 8) if max(grid) < 60 else (3.3, 63, 1e6):
        seeds = torch.rand(2, 3, *grid) < share
        seeds[0, 0, -1, -1] = True  # a corner: nothing may wrap around
        want = dilate_regions(seeds, radius, metric=metric, backend="reference")
        assert torch.equal(dilate_regions(seeds, radius, metric=metric, backend="native"), want), radius


@each_backend
def test_empty_layout_repeat(backend):
    seeds = torch.rand(2, 3, 5, 7) < 0.2
    want = dilate_regions(seeds, 2, backend=backend)
    assert torch.equal(want, dilate_regions(seeds.mT.contiguous().mT, 2, backend=backend))
    assert torch.equal(want[1:, 1:], dilate_regions(seeds[1:, 1:], 2, backend=backend))
    for shape in ((0, 2, 3, 3), (2, 0, 3, 3), (1, 1, 0, 3)):
        assert dilate_regions(torch.zeros(shape, dtype=torch.bool), 2, backend=backend).shape == shape


@each_backend
def test_compile_fullgraph(backend):
    seeds = torch.rand(2, 3, 5, 7) < 0.2
    run = torch.compile(lambda x: ~dilate_regions(x, 2, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(seeds), ~dilate_regions(seeds, 2, backend=backend))


@native
def test_threads_and_memory_change_nothing():
    seeds = torch.rand(3, 20, 12, 70) < 0.05
    want = dilate_regions(seeds, 4, backend="native")
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor
        assert torch.equal(dilate_regions(seeds, 4, backend="native"), want)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@native
def test_opcheck_and_direct_calls():
    seeds = torch.rand(2, 3, 5, 7) < 0.2
    torch.library.opcheck(torch.ops.wsss.dilate_regions.default, (seeds, 4, False))
    with pytest.raises(ValueError, match=r"dilate_regions: seeds must be \[B, M, h, w\]"):
        torch.ops.wsss.dilate_regions(seeds[0], 4, False)
    with pytest.raises(TypeError, match="dilate_regions: seeds must be bool"):
        torch.ops.wsss.dilate_regions(seeds.float(), 4, False)


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


@pytest.mark.gpu
@pytest.mark.parametrize("metric", INSIDE)
@pytest.mark.parametrize("grid", [(1, 1), (13, 11), (40, 40), (5, 65), (700, 700)])  # the last is above shared memory
def test_cuda_equals_reference(grid, metric):
    seeds = (torch.rand(2, 3, *grid) < 0.02).cuda()
    for radius in (0, 1.5, 8):
        want = dilate_regions(seeds, radius, metric=metric, backend="reference")
        assert torch.equal(dilate_regions(seeds, radius, metric=metric, backend="native"), want)
