"""max_upsampled_masks against stack-and-max, its gradient against autograd, and pixels where the map is zero."""

import pytest
import torch
import torch.nn.functional as F

from kernels import RegionSelection, available_backends, backend, max_upsampled_masks, radius_mask
from kernels.max_upsampled_masks import reference

CPU_BACKENDS = available_backends("max_upsampled_masks", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
each_backend = pytest.mark.usefixtures("each_backend_in_turn")


@pytest.fixture(params=CPU_BACKENDS)
def each_backend_in_turn(request, monkeypatch):
    monkeypatch.setitem(backend._settings, "max_upsampled_masks", request.param)


GRID, SIZE = (4, 5), (19, 27)


def example(dtype=torch.float32):
    """Three pairs of two images, the last without members."""
    logits = torch.randn(2, 20, 20, dtype=dtype)
    members = torch.rand(3, 20) < 0.4
    members[2] = False
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2]])
    return logits, RegionSelection(pairs, members, torch.full((3, 5), -1))


def naive(logits, selection, radius):
    """All members upsampled at once; autograd does the rest."""
    masks = torch.sigmoid(logits) if radius is None else radius_mask(logits, GRID, radius, backend="reference")
    rows = []
    for (b, _), chosen in zip(selection.pairs.tolist(), selection.members, strict=True):
        if not chosen.any():
            rows.append(logits.new_zeros(SIZE))
            continue
        grids = masks[b, chosen].view(-1, 1, *GRID)
        rows.append(F.interpolate(grids, SIZE, mode="bilinear", align_corners=False).squeeze(1).amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("radius", [None, 0.0, 1.5])
def test_pcre_check_8_equals_stack_and_max_bit_for_bit(radius):
    logits, selection = example()
    got = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=radius, backend="reference")
    assert torch.equal(got, naive(logits, selection, radius))
    assert torch.equal(got[2], torch.zeros(SIZE))


@pytest.mark.parametrize("chunk", [1, 3 * 19 * 27])
def test_chunks_of_members(chunk, monkeypatch):
    logits, selection = example()
    monkeypatch.setattr(reference, "CHUNK_VALUES", chunk)
    got = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.5, backend="reference")
    # The framework's resize rounds differently for another number of planes: one or two units of fp32 below 1.
    assert (got - naive(logits, selection, 1.5)).abs().max() <= 2.4e-7


@each_backend
@pytest.mark.parametrize("radius", [None, 1.0])
def test_gradient_equals_autograd_of_the_naive_form(radius):
    logits, selection = example(torch.float64)
    weight = torch.randn(3, *SIZE, dtype=torch.float64)
    grads = []
    for run in (lambda x: max_upsampled_masks(x, selection, grid=GRID, size=SIZE, radius=radius), naive):
        x = logits.clone().requires_grad_()
        out = run(x) if run is not naive else naive(x, selection, radius)
        # Where the map is 0 the naive form spreads its gradient over tied members, all with a zero factor behind it.
        (out * weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


@each_backend
def test_gradcheck():
    logits = torch.randn(2, 6, 6, dtype=torch.float64)
    members = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0], [0] * 6]).bool()
    selection = RegionSelection(torch.tensor([[0, 1], [1, 0], [1, 2]]), members, None)

    def run(x):
        return max_upsampled_masks(x, selection, grid=(2, 3), size=(6, 7), radius=1.5)

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@each_backend
@pytest.mark.parametrize("size", [(3, 4), (2, 3), (1, 1), (2, 9)])
def test_gradcheck_at_other_sizes(size):
    logits = torch.randn(1, 12, 12, dtype=torch.float64)
    selection = RegionSelection(torch.tensor([[0, 1], [0, 2]]), torch.rand(2, 12) < 0.6, None)
    run = lambda x: max_upsampled_masks(x, selection, grid=(3, 4), size=size)  # noqa: E731
    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@each_backend
def test_zero_pixels_swallow_any_gradient():
    logits, selection = example()
    logits[:, :, 3] = -200.0  # the sigmoid underflows to 0
    logits.requires_grad_()
    out = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.0)
    assert (out == 0).any()
    grad = torch.where(out == 0, torch.nan, 1.0)  # what a BCE in low precision may send back
    out.backward(grad)
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


@each_backend
def test_bce_has_no_nan():
    logits, selection = example()
    logits.requires_grad_()
    out = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.0)
    F.binary_cross_entropy(out, torch.ones_like(out)).backward()
    assert torch.isfinite(logits.grad).all()


@each_backend
def test_no_pairs():
    logits, _ = example()
    none = RegionSelection(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 20, dtype=torch.bool), None)
    logits.requires_grad_()
    out = max_upsampled_masks(logits, none, grid=GRID, size=SIZE)
    assert out.shape == (0, *SIZE)
    out.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    logits, selection = example()
    logits = logits.to(dtype)
    want = max_upsampled_masks(logits.float(), selection, grid=GRID, size=SIZE, radius=2.0)
    grads = []
    for x in (logits.clone(), logits.mT.contiguous().mT):
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = max_upsampled_masks(x, selection, grid=GRID, size=SIZE, radius=2.0)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        got.square().sum().backward()
        assert x.grad.dtype == dtype
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def both(logits, selection, grid, size, radius, weight):
    """(map, gradient) of the native op in fp32 or half, and of the reference in fp64."""
    results = []
    for x, name in ((logits, "native"), (logits.double(), "reference")):
        x = x.clone().requires_grad_()
        out = max_upsampled_masks(x, selection, grid=grid, size=size, radius=radius, backend=name)
        (grad,) = torch.autograd.grad(out, x, weight.to(out.dtype))
        results.append((out.detach(), grad))
    return results


def random_selection(b, n, pairs, share):
    image = torch.randint(b, (pairs,)).sort().values
    return RegionSelection(torch.stack([image, torch.arange(pairs)], 1), torch.rand(pairs, n) < share, None)


SIZES = [(19, 27), (16, 16), (4, 5), (2, 3), (1, 1), (33, 1), (64, 80)]


@native
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (4, 5), (6, 13), (13, 3)])
@pytest.mark.parametrize("radius", [None, 0.0, 1.5, 3, 50])
def test_native_equals_reference(grid, radius):
    n = grid[0] * grid[1]
    for size in SIZES:
        selection = random_selection(2, n, 4, 0.5)
        logits, weight = 3 * torch.randn(2, n, n), torch.randn(4, *size)
        (got, got_grad), (want, want_grad) = both(logits, selection, grid, size, radius, weight)
        assert (got - want).abs().max() <= 1e-6
        assert torch.equal(got > 0, want > 0)
        # fp32 sums of at most size / grid squared pixels, in units of their largest
        scale = 1e-6 * (1 + want_grad.abs().max())
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-5, atol=float(scale))


@native
@pytest.mark.parametrize("radius", [5.0, None])
def test_native_equals_reference_at_real_sizes(radius):
    selection = random_selection(2, 784, 3, 0.15)  # about 117 members: more than are handled at once
    logits, weight = 3 * torch.randn(2, 784, 784), torch.randn(3, 200, 300)
    (got, got_grad), (want, want_grad) = both(logits, selection, (28, 28), (200, 300), radius, weight)
    # fp32 places a pixel between cells 16 .. 27 to 2e-6 only; the reference in fp32 does so too.
    assert (got - want).abs().max() <= 4e-6
    options = {"grid": (28, 28), "size": (200, 300), "radius": radius, "backend": "reference"}
    assert (got - max_upsampled_masks(logits, selection, **options)).abs().max() <= 1e-6
    # A pixel where two members tie to fp32 may go to the other one: judged by the sum over the gradient.
    error = (got_grad - want_grad).norm() / want_grad.norm()
    assert error < 1e-3, error


@native
def test_winners_are_those_of_the_reference():
    logits, selection = example()
    _, winner = torch.ops.wsss.max_upsampled_masks(logits, *selection[:2], *GRID, *SIZE, 2)
    masks = radius_mask(logits.double(), GRID, 1.5, backend="reference")
    for p, (b, _) in enumerate(selection.pairs.tolist()):
        patches = selection.members[p].nonzero().flatten()
        if not len(patches):
            assert (winner[p] == -1).all()
            continue
        stack = F.interpolate(masks[b, patches].view(-1, 1, *GRID), SIZE, mode="bilinear").squeeze(1)
        best, index = stack.max(0)
        want = torch.where(best > 0, patches[index], -1)
        second = stack.topk(2, dim=0).values[1]
        clear = (best - second > 1e-6) | (best == 0)
        assert clear.float().mean() > 0.9 and torch.equal(winner[p][clear], want[clear].int())


@native
def test_equal_masks_go_to_the_lower_patch():
    logits = torch.randn(1, 1, 20).expand(1, 20, 20)
    chosen = torch.zeros(1, 20, dtype=torch.bool)
    chosen[0, [4, 7, 11]] = True
    _, winner = torch.ops.wsss.max_upsampled_masks(logits, torch.tensor([[0, 0]]), chosen, *GRID, *SIZE, 10**6)
    assert (winner == 4).all()


@native
def test_pairs_of_one_image_may_share_members():
    logits, selection = torch.randn(1, 20, 20), random_selection(1, 20, 5, 0.6)
    weight = torch.randn(5, *SIZE)
    (_, got), (_, want) = both(logits, selection, GRID, SIZE, 2.0, weight)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@native
def test_bits_depend_on_neither_threads_nor_batch_nor_memory():
    logits, selection = torch.randn(3, 63, 63), random_selection(3, 63, 6, 0.9)
    selection = selection._replace(pairs=torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]))
    weight = torch.randn(6, 45, 61)

    def run(x, chosen, w):
        x = x.clone().requires_grad_()
        out = max_upsampled_masks(x, chosen, grid=(7, 9), size=(45, 61), radius=4.0, backend="native")
        return out.detach(), *torch.autograd.grad(out, x, w)

    want = run(logits, selection, weight)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert all(torch.equal(a, b) for a, b in zip(run(logits, selection, weight), want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    part = RegionSelection(torch.tensor([[0, 0], [0, 1]]), selection.members[2:4], None)
    out, grad = run(logits[1:2], part, weight[2:4])
    assert torch.equal(out, want[0][2:4]) and torch.equal(grad, want[1][1:2])


@each_backend
def test_compile_fullgraph():
    logits, selection = example()
    logits.requires_grad_()

    def op(x, pairs, members):
        chosen = RegionSelection(pairs, members, None)
        return max_upsampled_masks(x, chosen, grid=GRID, size=SIZE, radius=1.5).square()

    if backend._settings["max_upsampled_masks"] == "reference":
        pytest.skip("the reference reads the images of the pairs on the host")
    want = op(logits, *selection[:2])
    got = torch.compile(op, fullgraph=True, backend="aot_eager")(logits, *selection[:2])
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (got, want)))


@native
def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        logits, selection = example(dtype)
        args = (logits.requires_grad_(), *selection[:2], *GRID, 8, 11, 2)
        torch.library.opcheck(torch.ops.wsss.max_upsampled_masks.default, args)
        value, winner = (x.detach() for x in torch.ops.wsss.max_upsampled_masks(*args))
        back = (torch.randn_like(value), winner, logits.detach(), *selection[:2], *GRID, 2)
        torch.library.opcheck(torch.ops.wsss.max_upsampled_masks_backward.default, back)


@native
def test_second_gradient_is_refused():
    logits, selection = example()
    out = max_upsampled_masks(logits.requires_grad_(), selection, grid=GRID, size=SIZE, backend="native")
    weight = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, logits, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="max_upsampled_masks: the gradient itself is not differentiable"):
        grad.sum().backward()


@native
@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(2, 20, 19), ValueError, r"mask_logits must be \[B, N, N\]"),
        (0, torch.zeros(2, 20, 20).int(), TypeError, "mask_logits must be floating point"),
        (1, torch.zeros(3, 3).long(), ValueError, r"pairs must be \[P, 2\]"),
        (1, torch.zeros(3, 2), TypeError, "pairs must be int64"),
        (1, torch.tensor([[0, 0], [2, 0], [0, 0]]), ValueError, "no image 2 in a batch of 2"),
        (2, torch.zeros(2, 20).bool(), ValueError, r"members must be \[P, N\]"),
        (2, torch.zeros(3, 20), TypeError, "members must be bool"),
        (5, 0, ValueError, "size must be >= 1"),
    ],
)
def test_direct_call_is_checked(place, value, error, match):
    logits, selection = example()
    args = [logits, *selection[:2], *GRID, *SIZE, 2]
    args[place] = value
    with pytest.raises(error, match="max_upsampled_masks: " + match):
        torch.ops.wsss.max_upsampled_masks(*args)


@native
def test_direct_call_of_the_gradient_is_checked():
    logits, selection = example()
    value, winner = torch.ops.wsss.max_upsampled_masks(logits, *selection[:2], *GRID, *SIZE, 2)
    run = torch.ops.wsss.max_upsampled_masks_backward
    with pytest.raises(ValueError, match="max_upsampled_masks_backward: grad must be"):
        run(value[:2], winner, logits, *selection[:2], *GRID, 2)
    with pytest.raises(TypeError, match="max_upsampled_masks_backward: grad must be"):
        run(value.double(), winner, logits, *selection[:2], *GRID, 2)
    with pytest.raises(TypeError, match="max_upsampled_masks_backward: winner must be int32"):
        run(value, winner.long(), logits, *selection[:2], *GRID, 2)
    with pytest.raises(ValueError, match="max_upsampled_masks_backward: no patch 20"):
        run(value, torch.full_like(winner, 20), logits, *selection[:2], *GRID, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [None, 1.5])
def test_cuda_equals_reference(radius, dtype):
    for grid, size in (((4, 5), (19, 27)), ((13, 3), (2, 3)), ((28, 28), (448, 448))):
        n = grid[0] * grid[1]
        logits, selection = torch.randn(2, n, n).to(dtype).cuda(), random_selection(2, n, 4, 0.3)
        selection = RegionSelection(selection.pairs.cuda(), selection.members.cuda(), None)
        weight = torch.randn(4, *size, device="cuda")
        (got, got_grad), (want, want_grad) = both(logits, selection, grid, size, radius, weight)
        again = both(logits, selection, grid, size, radius, weight)[0]
        assert torch.equal(got, again[0]) and torch.equal(got_grad, again[1])
        assert (got - want).abs().max() <= 1e-6
        assert (got_grad - want_grad).norm() / want_grad.norm() < max(1e-3, torch.finfo(dtype).eps)


def test_errors():
    logits, selection = example()
    with pytest.raises(ValueError, match=r"max_upsampled_masks: selection.members must be \[3, 20\], got \(2, 20\)"):
        bad = selection._replace(members=selection.members[1:])
        max_upsampled_masks(logits, bad, grid=GRID, size=SIZE)
    with pytest.raises(ValueError, match="max_upsampled_masks: size must be"):
        max_upsampled_masks(logits, selection, grid=GRID, size=(0, 4))
    with pytest.raises(ValueError, match="max_upsampled_masks: radius must lie in"):
        max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=-1)
    with pytest.raises(ValueError, match="max_upsampled_masks: grid must have"):
        max_upsampled_masks(logits, selection, grid=(5, 5), size=SIZE)
