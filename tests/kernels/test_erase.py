"""erase: the golden values of P-NOC, every backend against the reference in fp64, the gradient through the maximum."""

import pytest
import torch

from kernels import available_backends, backend, erase_hard, erase_maximum, erase_soft

CPU_BACKENDS = available_backends("erase", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
each_backend = pytest.mark.usefixtures("each_backend_in_turn")


@pytest.fixture(params=CPU_BACKENDS)
def each_backend_in_turn(request, monkeypatch):
    monkeypatch.setitem(backend._settings, "erase", request.param)


GRIDS = [(1, 1), (1, 9), (4, 5), (13, 3), (32, 32)]
SIZES = [(19, 27), (4, 5), (2, 3), (1, 1), (1, 40), (64, 80)]


def example(b=3, grid=(4, 5), size=(19, 27), dtype=torch.float32):
    return torch.randn(b, 3, *size, dtype=dtype), torch.randn(b, *grid, dtype=dtype)


def soft_gradient(images, maps, weight, maximum=None, **options):
    """The erased images, then the gradients with respect to the maps and, where it is given, the maximum."""
    leaves = [x.clone().requires_grad_() for x in (maps, maximum) if x is not None]
    out = erase_soft(images, leaves[0], maximum=None if maximum is None else leaves[1], **options)
    return out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))


GOLDEN = torch.tensor([[[0.0, 2.0], [4.0, -1.0]], [[1.0, 1.0], [0.0, 0.5]]])


@each_backend
def test_pnoc_check_5_soft():
    ones = torch.ones(2, 3, 4, 4)
    assert erase_maximum(GOLDEN, (4, 4)) == 4
    keep = erase_soft(ones, GOLDEN)
    # The values are given without the 1e-5 of the denominator, which moves them by less than 1e-5 / 4.
    for image, row, want in (
        (0, 0, [1, 0.875, 0.625, 0.5]),
        (0, 3, [0, 0.25, 0.75, 1]),
        (1, 3, [1, 0.96875, 0.90625, 0.875]),
    ):
        for colour in range(3):
            torch.testing.assert_close(keep[image, colour, row], torch.tensor(want).float(), rtol=0, atol=2.6e-6)


@each_backend
def test_pnoc_check_5_hard():
    kept = erase_hard(torch.ones(2, 3, 4, 4), GOLDEN, threshold=0.2)
    assert all(torch.equal(kept[:, 0], kept[:, c]) for c in (1, 2))
    assert kept[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [2, 3], [3, 3]]
    assert kept[1, 0].nonzero().tolist() == [[3, 0], [3, 1]]


def by_hand(image, cells, maximum, y, x):
    """One pixel of the soft and of the hard mask, straight from the formulas; `maximum` of the batch."""
    (h, w), (height, width) = cells.shape, image.shape[1:]

    def place(pixel, num_in, num_out):
        at = min(max((pixel + 0.5) * num_in / num_out - 0.5, 0), num_in - 1)
        return int(at), min(int(at) + 1, num_in - 1), at - int(at)

    (top, bottom, down), (left, right, along) = place(y, h, height), place(x, w, width)
    up = 0
    for row, wy in ((top, 1 - down), (bottom, down)):
        for column, wx in ((left, 1 - along), (right, along)):
            up += wy * wx * max(cells[row, column].item(), 0)
    return image[:, y, x] * (1 - up / (maximum + 1e-5))


@pytest.mark.parametrize("grid", [(1, 1), (4, 5), (9, 2)])
def test_reference_equals_the_formula(grid):
    images, maps = example(2, grid, (7, 6), torch.float64)
    maximum = torch.tensor(1.7, dtype=torch.float64)
    out = erase_soft(images, maps, maximum=maximum, backend="reference")
    for b in range(2):
        for y in range(7):
            for x in range(6):
                torch.testing.assert_close(out[b, :, y, x], by_hand(images[b], maps[b], 1.7, y, x), rtol=0, atol=1e-12)


@native
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("given", [False, True])
def test_native_equals_reference(grid, given):
    for size in SIZES:
        images, maps = example(3, grid, size)
        weight, maximum = torch.randn(3, 3, *size), torch.tensor(2.5) if given else None
        got = soft_gradient(images, maps, weight, maximum, backend="native")
        wide = [x.double() if x is not None else None for x in (images, maps, weight, maximum)]
        want = soft_gradient(*wide, backend="reference")
        # fp32 places a pixel to 1e-6 of a cell; the gradient of a cell sums up to 5120 pixels, which may cancel.
        assert (got[0] - want[0]).abs().max() < 3e-6 * images.abs().max()
        for ours, theirs in zip(got[1:], want[1:], strict=True):
            assert (ours - theirs).abs().max() <= 3e-6 * (1 + theirs.abs().max() + (size[0] * size[1]) ** 0.5)
        # in fp64 both round at 1e-16
        got = soft_gradient(*wide, backend="native")
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        top = erase_maximum(wide[1], size, backend="reference")
        assert abs(erase_maximum(maps, size, backend="native") - top) < 5e-6  # where neighbours differ by 4


@native
@pytest.mark.parametrize("grid", GRIDS)
def test_native_hard_equals_reference(grid):
    for size in SIZES:
        images, maps = example(3, grid, size)
        for threshold in (0.0, 0.2, 1.0):
            got = erase_hard(images, maps, threshold=threshold, backend="native")
            assert ((got == 0) | (got == images)).all()
            # Where psi is not within rounding of the threshold, the decision is that of fp64.
            soft = torch.stack([erase_soft(torch.ones(1, 3, *size), m[None]) for m in maps]).squeeze(1)
            clear = (1 - soft - threshold).abs() > 1e-5
            want = erase_hard(images.double(), maps.double(), threshold=threshold, backend="reference")
            assert torch.equal(got[clear].double(), want[clear])
            exact = erase_hard(images.double(), maps.double(), threshold=threshold, backend="native")
            assert torch.equal(exact[clear], want[clear])


@each_backend
@pytest.mark.parametrize("size", [(6, 7), (3, 4), (2, 3), (1, 1)])
def test_gradcheck(size):
    images, maps = example(2, (3, 4), size, torch.float64)
    maximum = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: erase_soft(images, m), maps)
    assert torch.autograd.gradcheck(lambda m, top: erase_soft(images, m, maximum=top), (maps, maximum))
    assert torch.autograd.gradcheck(lambda m: erase_maximum(m, size), maps)


@each_backend
def test_the_maximum_is_not_detached():
    images, maps = example()
    weight = torch.randn_like(images)
    _, whole = soft_gradient(images, maps, weight)
    maximum = erase_maximum(maps, images.shape[2:])
    _, direct, through = soft_gradient(images, maps, weight, maximum)
    leaf = maps.clone().requires_grad_()
    (to_cells,) = torch.autograd.grad(erase_maximum(leaf, images.shape[2:]), leaf)
    assert through.abs() > 1e-3 and to_cells.count_nonzero() <= 4  # the cells around the arg-max pixel
    torch.testing.assert_close(to_cells.sum(), torch.tensor(1.0))
    torch.testing.assert_close(whole, direct + through * to_cells, rtol=1e-5, atol=1e-5)


@each_backend
def test_ties_share_the_gradient():
    # Both images reach 2, the first at the four pixels beyond its corner cell, the second at one pixel more.
    maps = torch.tensor([[[2.0, 0, 0], [0, 0, 0]], [[0.0, 0, 0], [0, 0, 2]], [[0.0, 1, 0], [0, 0, 0]]])
    maps.requires_grad_()
    (grad,) = torch.autograd.grad(erase_maximum(maps, (8, 12)), maps, torch.tensor(10.0))
    want = torch.zeros_like(maps)
    want[0, 0, 0] = want[1, 1, 2] = 5
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-6)
    maps = torch.tensor([[[4.0, 4, 1], [1, 1, 1]], [[1.0, 1, 1], [1, 1, 4]]]).requires_grad_()
    (grad,) = torch.autograd.grad(erase_maximum(maps, (4, 6)), maps)
    # Pixels of the first row: 0, 1, 2 lie at 4 (weights 1; 3/4 and 1/4; 1/4 and 3/4), as does the corner of the other.
    want = torch.zeros_like(maps)
    want[0, 0, 0], want[0, 0, 1], want[1, 1, 2] = 2 / 4, 1 / 4, 1 / 4
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-6)


@native
def test_ties_are_those_of_the_reference():
    for size in ((8, 12), (2, 3), (4, 4), (16, 24)):  # weights that are exact in binary
        maps = torch.randint(-1, 2, (3, 2, 3)).double().requires_grad_()
        grads = [
            torch.autograd.grad(erase_maximum(maps, size, backend=name), maps)[0] for name in ("native", "reference")
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@each_backend
def test_a_maximum_over_two_ranks():
    """The differentiable maximum over the ranks sends the gradient of both to the one that owns it."""
    images, maps = example(4)
    weight = torch.randn_like(images)
    want = soft_gradient(images, maps, weight)
    leaf = maps.clone().requires_grad_()
    maximum = torch.maximum(*(erase_maximum(m, images.shape[2:]) for m in leaf.split(2)))
    out = [erase_soft(x, m, maximum=maximum) for x, m in zip(images.split(2), leaf.split(2), strict=True)]
    (grad,) = torch.autograd.grad(torch.cat(out), leaf, weight)
    assert torch.equal(torch.cat(out).detach(), want[0])
    torch.testing.assert_close(grad, want[1], rtol=1e-5, atol=1e-5)


@each_backend
def test_without_a_positive_cell_nothing_is_erased():
    images, maps = example()
    maps = -maps.abs()
    out, grad = soft_gradient(images, maps, torch.ones_like(images))
    assert torch.equal(out, images) and not grad.any()
    assert torch.equal(erase_hard(images, maps), images)
    assert erase_maximum(maps, (19, 27)) == 0


@each_backend
def test_a_map_that_is_not_a_number_is_not_hidden():
    images, maps = example()
    maps[1, 2, 3] = torch.nan
    assert erase_maximum(maps, images.shape[2:]).isnan()
    out, grad = soft_gradient(images, maps, torch.ones_like(images))
    assert out.isnan().all() and grad.isnan().any()
    kept = erase_hard(images, maps)
    assert not kept[1].any() and kept[0].any()


@each_backend
class TestEachBackend:
    def test_layouts(self):
        images, maps = example()
        weight = torch.randn_like(images)
        want = soft_gradient(images, maps, weight)
        last = images.contiguous(memory_format=torch.channels_last)
        got = soft_gradient(last, maps.mT.contiguous().mT, weight.flip(3).contiguous().flip(3))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(erase_hard(last, maps.mT.contiguous().mT), erase_hard(images, maps))

    def test_empty(self):
        for b, size in ((0, (4, 4)), (2, (0, 4)), (2, (4, 0))):
            images, maps = example(b, (2, 2), size)
            out, grad = soft_gradient(images, maps, torch.ones_like(images))
            assert out.shape == images.shape and torch.equal(grad, torch.zeros_like(maps))
            assert erase_hard(images, maps).shape == images.shape
            leaf = maps.requires_grad_()
            (grad,) = torch.autograd.grad(erase_maximum(leaf, size), leaf)
            assert erase_maximum(maps, size) == 0 and not grad.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype):
        images, maps = (x.to(dtype) for x in example())
        weight = torch.randn(images.shape).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, grad = soft_gradient(images, maps, weight)
            kept, maximum = erase_hard(images, maps), erase_maximum(maps, images.shape[2:])
        assert out.dtype == grad.dtype == kept.dtype == dtype and maximum.dtype == torch.float32
        want, want_grad = soft_gradient(images.float(), maps.float(), weight.float())
        assert torch.equal(out, want.to(dtype))
        assert torch.equal(kept, erase_hard(images.float(), maps.float()).to(dtype))
        torch.testing.assert_close(grad, want_grad.to(dtype))  # sums of the same fp32 products
        mixed = erase_soft(images, maps.double())
        assert mixed.dtype == dtype and (mixed - out).abs().max() <= 2 * torch.finfo(dtype).eps * images.abs().max()

    def test_second_run_gives_equal_bits(self):
        images, maps = example()
        first, second = (soft_gradient(images, maps, torch.ones_like(images)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_gradient_goes_to_the_maps_alone(self):
        images, maps = example()
        maps.requires_grad_()
        images.requires_grad_()
        assert not erase_hard(images, maps).requires_grad
        assert not erase_soft(images, maps.detach()).requires_grad
        out = erase_soft(images, maps)
        grads = torch.autograd.grad(out.sum(), (images, maps), allow_unused=True)
        assert grads[0] is None and grads[1] is not None

    def test_inputs_are_untouched(self):
        images, maps = example()
        before = images.clone(), maps.clone()
        for out in (erase_soft(images, maps), erase_hard(images, -maps.abs())):
            assert out.data_ptr() != images.data_ptr()
        assert torch.equal(images, before[0]) and torch.equal(maps, before[1])

    def test_compile_fullgraph(self):
        images, maps = example()
        maps.requires_grad_()

        def run(x, m):
            return erase_soft(x, m) + erase_hard(x, m)

        got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(images, maps), run(images, maps)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the compiler may reorder the reference
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), maps)[0] for x in (got, want)), rtol=1e-5, atol=1e-5)


@native
def test_bits_depend_on_neither_threads_nor_memory():
    images, maps = example(4, (16, 16), (70, 90))
    weight = torch.randn_like(images)

    def run():
        return *soft_gradient(images, maps, weight, backend="native"), erase_hard(images, maps, backend="native")

    want = run()
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@native
def test_opcheck():
    ops = torch.ops.wsss
    for dtype in (torch.float32, torch.float64):
        images, maps = example(dtype=dtype)
        maximum = erase_maximum(maps, (19, 27), backend="native")
        torch.library.opcheck(ops.erase_maximum.default, (maps.clone().requires_grad_(), 19, 27))
        torch.library.opcheck(ops.erase_maximum_backward.default, (maximum, maximum, maps, 19, 27))
        leaves = images, maps.clone().requires_grad_(), maximum.clone().requires_grad_()
        torch.library.opcheck(ops.erase_soft.default, leaves)
        torch.library.opcheck(ops.erase_soft_backward.default, (images, images, maps, maximum))
        torch.library.opcheck(ops.erase_hard.default, (images, maps, 0.2))


@native
@pytest.mark.parametrize("function", [erase_soft, lambda x, m, backend: erase_maximum(m, (5, 5), backend=backend)])
def test_second_gradient_is_refused(function):
    images, maps = example()
    out = function(images, maps.requires_grad_(), backend="native")
    weight = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, maps, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="erase: the gradient itself is not differentiable"):
        grad.sum().backward()


@native
@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(3, 3, 19), ValueError, r"images must be \[B, 3, H, W\]"),
        (0, torch.zeros(3, 4, 9, 9), ValueError, r"images must be \[B, 3, H, W\]"),
        (0, torch.zeros(3, 3, 9, 9).int(), TypeError, "images must be floating point"),
        (1, torch.zeros(3, 4), ValueError, r"maps must be \[B, h, w\]"),
        (1, torch.zeros(3, 4, 0), ValueError, "maps must have 1 to 2"),
        (1, torch.zeros(2, 4, 5), ValueError, r"maps must be \[3, h, w\]"),
        (1, torch.zeros(3, 4, 5).double(), TypeError, "maps must be Float, got Double"),
        (2, torch.zeros(1), ValueError, "maximum must be a scalar"),
        (2, torch.zeros(()).double(), TypeError, "maximum must be Float"),
    ],
)
def test_direct_call_is_checked(place, value, error, match):
    args = [*example(), torch.tensor(1.0)]
    args[place] = value
    with pytest.raises(error, match="erase_soft: " + match):
        torch.ops.wsss.erase_soft(*args)
    with pytest.raises(error, match="erase_soft_backward: " + match):
        torch.ops.wsss.erase_soft_backward(args[0], *args)
    if place < 2:
        with pytest.raises(error, match="erase_hard: " + match):
            torch.ops.wsss.erase_hard(*args[:2], 0.2)


@native
def test_other_direct_calls_are_checked():
    images, maps = example()
    one = torch.tensor(1.0)
    with pytest.raises(TypeError, match="erase_maximum: maps must be float32 or float64, got Half"):
        torch.ops.wsss.erase_maximum(maps.half(), 4, 4)
    with pytest.raises(ValueError, match=r"erase_maximum: size must be \(H, W\) of 0 to 2\^24 pixels, got \(-1, 4\)"):
        torch.ops.wsss.erase_maximum(maps, -1, 4)
    with pytest.raises(ValueError, match="erase_maximum_backward: grad must be a scalar"):
        torch.ops.wsss.erase_maximum_backward(one[None], one, maps, 4, 4)
    with pytest.raises(ValueError, match="erase_soft_backward: grad must be"):
        torch.ops.wsss.erase_soft_backward(images[:1], images, maps, one)
    with pytest.raises(TypeError, match="erase_soft_backward: grad must be Float, got Double"):
        torch.ops.wsss.erase_soft_backward(images.double(), images, maps, one)


@pytest.mark.parametrize(
    ("images", "maps", "options", "error", "match"),
    [
        ((2, 4, 8), (2, 2, 2), {}, ValueError, r"images must be \[B, 3, H, W\], got \(2, 4, 8\)"),
        ((2, 3, 4, 8), (3, 2, 2), {}, ValueError, r"maps must be \[2, h, w\], got \(3, 2, 2\)"),
        ((2, 3, 4, 8), (2, 0, 2), {}, ValueError, "maps must have 1 to 2"),
        ((2, 3, 4, 8), (2, 2, 2), {"maximum": torch.ones(1)}, ValueError, r"maximum must be \[\], got \(1,\)"),
        ((2, 3, 4, 8), (2, 2, 2), {"maximum": torch.tensor(1)}, TypeError, "maximum must be floating point"),
        ((2, 3, 4, 8), (2, 2, 2), {"maximum": 1.0}, TypeError, "maximum must be a tensor"),
    ],
)
def test_errors(images, maps, options, error, match):
    with pytest.raises(error, match="erase_soft: " + match):
        erase_soft(torch.zeros(images), torch.zeros(maps), **options)
    if not options:
        with pytest.raises(error, match="erase_hard: " + match):
            erase_hard(torch.zeros(images), torch.zeros(maps))


def test_other_errors():
    images, maps = example()
    with pytest.raises(ValueError, match=r"erase_hard: threshold must lie in \[0.0, 1.0\], got 1.5"):
        erase_hard(images, maps, threshold=1.5)
    with pytest.raises(ValueError, match=r"erase_maximum: size must be \(H, W\) of 0 to 2\^24 pixels, got \(4, -1\)"):
        erase_maximum(maps, (4, -1))
    with pytest.raises(TypeError, match="erase_soft: maps must be floating point"):
        erase_soft(images, maps.int())
    with pytest.raises(ValueError, match="erase_soft: tensors must be on one device"):
        erase_soft(images, maps.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_equals_reference(grid, dtype):
    for size in SIZES:
        images, maps = (x.cuda().to(dtype) for x in example(3, grid, size))
        weight = torch.randn_like(images)
        got = soft_gradient(images, maps, weight, backend="native")
        again = soft_gradient(images, maps, weight, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        want = soft_gradient(images.double(), maps.double(), weight.double(), backend="reference")
        eps = max(torch.finfo(dtype).eps, 3e-6)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).abs().max() <= eps * (1 + theirs.abs().max())
        cpu = erase_hard(images.cpu(), maps.cpu(), backend="native")
        assert (erase_hard(images, maps, backend="native").cpu() != cpu).float().mean() < 1e-3
