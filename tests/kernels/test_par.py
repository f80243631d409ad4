"""par: the reference against a pixel-by-pixel loop, every backend against the reference."""

import math

import pytest
import torch

from kernels import available_backends, par
from kernels.par import reference

DILATIONS = (1, 2, 4, 8, 12, 24)
CPU_BACKENDS = available_backends("par", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")


def photo(b, h, w):
    """Smooth colours plus noise, at 8-bit steps like a decoded image."""
    coarse = torch.rand(b, 3, 5, 5)
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")
    return ((smooth + 0.05 * torch.randn(b, 3, h, w)).clamp(0, 1) * 255).round() / 255


def loop_weights(image, y, x):
    """Tap weights of one pixel, straight from the formulas; float64 [48]."""
    _, h, w = image.shape
    taps, lengths = [], []
    for d in DILATIONS:
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if dy or dx:
                    taps.append(image[:, min(max(y + d * dy, 0), h - 1), min(max(x + d * dx, 0), w - 1)])
                    lengths.append(d * math.hypot(dy, dx))
    near, q = torch.stack(taps, 1), torch.tensor(lengths, dtype=torch.float64)
    sigma = near.std(dim=1, correction=1, keepdim=True)
    colour = -((((near - image[:, y, x, None]).abs()) / ((sigma + 1e-8) * 0.3)) ** 2).mean(0)
    place = -((q / ((q.std(correction=1) + 1e-8) * 0.3)) ** 2)
    return colour.softmax(0) + 0.01 * place.softmax(0)


def test_reference_equals_the_loop():
    image = photo(1, 9, 7).double()
    ours = reference.weights(image, DILATIONS)[0]
    for y, x in ((0, 0), (4, 3), (8, 6), (2, 5)):
        # The order of the 48 taps is the same: dilation by dilation, row by row.
        torch.testing.assert_close(ours[:, y, x], loop_weights(image[0], y, x), rtol=1e-9, atol=1e-12)


def test_position_spread():
    q = torch.tensor(reference.offsets(DILATIONS), dtype=torch.float64).pow(2).sum(1).sqrt()
    assert abs(q.std().item() - 9.9003) < 5e-5  # the value given with the method, four decimals


def test_pcre_check_3_weights_sum_to_1_01():
    total = reference.weights(photo(2, 20, 31), DILATIONS).sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 1.01), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pcre_check_3_constant_maps_grow_by_1_01_per_sweep(backend):
    out = par(photo(1, 20, 31), torch.ones(1, 2, 20, 31), iterations=3, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 1.01**3), rtol=3e-6, atol=0)  # fp32, 48 terms, 3 sweeps


@native
@pytest.mark.parametrize("size", [(40, 56), (33, 65), (1, 50), (50, 1), (1, 1), (2, 3), (97, 31)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_native_equals_reference(size, channels):
    image, maps = photo(2, *size), torch.rand(2, channels, *size)
    want = par(image.double(), maps.double(), backend="reference")
    got = par(image, maps, backend="native")
    plain = par(image, maps, backend="reference")
    # Both fp32 forms are judged by fp64. The colour term squares quotients by sigma, so fp32 rounding reaches 3e-6.
    assert (plain - want).abs().max() < 5e-6
    assert (got - want).abs().max() < 5e-6


@native
def test_native_constant_image_and_single_edge():
    image = torch.zeros(1, 3, 30, 30)
    image[..., 15:] = 1.0
    maps = torch.rand(1, 2, 30, 30)
    for im in (torch.full_like(image, 0.25), image):
        got, want = (par(im, maps, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestEachBackend:
    def test_layouts(self, backend):
        image, maps = photo(2, 18, 22), torch.rand(2, 3, 18, 22)
        want = par(image, maps, backend=backend)
        last = par(image.contiguous(memory_format=torch.channels_last), maps.mT.contiguous().mT, backend=backend)
        assert torch.equal(want, last)
        alone = par(image[1:], maps[1:], backend=backend)  # the batch position is immaterial
        if backend == "reference":
            # torch splits its loops among threads by size, and the vector and scalar parts of exp round differently
            torch.testing.assert_close(alone, want[1:], rtol=0, atol=1e-6)
        else:
            assert torch.equal(alone, want[1:])

    def test_empty(self, backend):
        assert par(torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, 4, 4), backend=backend).shape == (0, 2, 4, 4)
        assert par(torch.zeros(1, 3, 4, 4), torch.zeros(1, 0, 4, 4), backend=backend).shape == (1, 0, 4, 4)
        assert par(torch.zeros(1, 3, 0, 4), torch.zeros(1, 2, 0, 4), backend=backend).shape == (1, 2, 0, 4)

    def test_no_iteration_returns_a_copy(self, backend):
        maps = torch.rand(1, 2, 5, 6)
        out = par(photo(1, 5, 6), maps, iterations=0, backend=backend)
        assert torch.equal(out, maps) and out.data_ptr() != maps.data_ptr()

    def test_other_dilations(self, backend):
        image, maps = photo(1, 12, 13), torch.rand(1, 2, 12, 13)
        for dilations in ((1,), (3, 100), [1000]):
            got = par(image, maps, dilations=dilations, backend=backend)
            want = par(image.double(), maps.double(), dilations=dilations, backend="reference")
            assert (got - want).abs().max() < 1e-5  # fewer taps, sharper weights: a little above 5e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, backend, dtype):
        image, maps = photo(1, 12, 13).to(dtype), torch.rand(1, 2, 12, 13).to(dtype)
        got = par(image, maps, backend=backend)
        assert got.dtype == torch.float32
        assert torch.equal(got, par(image.float(), maps.float(), backend=backend))

    def test_second_run_gives_equal_bits(self, backend):
        image, maps = photo(1, 40, 33), torch.rand(1, 3, 40, 33)
        assert torch.equal(par(image, maps, backend=backend), par(image, maps, backend=backend))

    def test_no_gradient(self, backend):
        maps = torch.rand(1, 2, 5, 6, requires_grad=True)
        assert not par(photo(1, 5, 6), maps, backend=backend).requires_grad
        assert torch.equal(par(photo(1, 5, 6), maps * 0, backend=backend), torch.zeros(1, 2, 5, 6))

    def test_inputs_are_untouched(self, backend):
        image, maps = photo(1, 8, 9), torch.rand(1, 2, 8, 9)
        before = image.clone(), maps.clone()
        par(image, maps, backend=backend)
        assert torch.equal(image, before[0]) and torch.equal(maps, before[1])

    def test_compile_fullgraph(self, backend):
        image, maps = photo(1, 8, 9), torch.rand(1, 2, 8, 9)
        run = torch.compile(
            lambda i, m: par(i, m, dilations=(1,), iterations=2, backend=backend) + 1,
            fullgraph=True,
            backend="aot_eager",  # the graph, without code generation for the loops of the reference
        )
        want = par(image, maps, dilations=(1,), iterations=2, backend=backend) + 1
        torch.testing.assert_close(run(image, maps), want, rtol=1e-5, atol=1e-6)


@native
def test_thread_count_changes_no_bit():
    image, maps = photo(1, 40, 33), torch.rand(1, 3, 40, 33)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(par(image, maps, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@native
def test_poisoned_memory():
    image, maps = photo(1, 21, 37), torch.rand(1, 3, 21, 37)
    want = par(image, maps, backend="native")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        assert torch.equal(want, par(image, maps, backend="native"))
    finally:
        torch.use_deterministic_algorithms(before)


@native
def test_opcheck():
    place = reference.position_weights((1, 2))
    args = (photo(2, 8, 9), torch.rand(2, 3, 8, 9), [1, 2], place, 2)
    torch.library.opcheck(torch.ops.wsss.par.default, args)


@native
def test_direct_call_is_checked():
    image, maps, place = torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), [0.0] * 8
    with pytest.raises(TypeError, match="par: maps must be float32"):
        torch.ops.wsss.par(image, maps.double(), [1], place, 1)
    with pytest.raises(ValueError, match="par: image does not fit maps"):
        torch.ops.wsss.par(image[..., :3], maps, [1], place, 1)
    with pytest.raises(ValueError, match="par: one position weight per tap"):
        torch.ops.wsss.par(image, maps, [1], place[:4], 1)
    with pytest.raises(ValueError, match="par: 1 to 32 dilations"):
        torch.ops.wsss.par(image, maps, [], [], 1)


@native
def test_native_refuses_float64():
    with pytest.raises(TypeError, match="par: the native backend computes in fp32"):
        par(torch.rand(1, 3, 4, 4).double(), torch.rand(1, 2, 4, 4), backend="native")


@pytest.mark.parametrize(
    ("image", "maps", "options", "error", "match"),
    [
        ((2, 4, 8), (2, 1, 4, 8), {}, ValueError, r"par: image must be \[B, 3, H, W\], got \(2, 4, 8\)"),
        ((1, 3, 4, 8), (1, 1, 4, 7), {}, ValueError, r"par: maps must be \[1, C, 4, 8\], got \(1, 1, 4, 7\)"),
        ((1, 3, 4, 8), (1, 1, 4, 8), {"dilations": ()}, ValueError, "par: dilations must be"),
        ((1, 3, 4, 8), (1, 1, 4, 8), {"dilations": (1, 0)}, ValueError, "par: dilations must be"),
        ((1, 3, 4, 8), (1, 1, 4, 8), {"dilations": tuple(range(1, 34))}, ValueError, "par: dilations must be"),
        ((1, 3, 4, 8), (1, 1, 4, 8), {"iterations": -1}, ValueError, "par: iterations must be >= 0, got -1"),
    ],
)
def test_errors(image, maps, options, error, match):
    with pytest.raises(error, match=match):
        par(torch.zeros(image), torch.zeros(maps), **options)


def test_integer_image_is_refused():
    with pytest.raises(TypeError, match="par: image must be floating point"):
        par(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(40, 56), (33, 65), (1, 1)])
@pytest.mark.parametrize("channels", [1, 5])
def test_cuda_equals_reference(size, channels):
    image, maps = photo(2, *size).cuda(), torch.rand(2, channels, *size).cuda()
    want = par(image.double(), maps.double(), backend="reference")
    got = par(image, maps, backend="native")
    assert (got - want).abs().max() < 5e-6
    assert torch.equal(got, par(image, maps, backend="native"))
