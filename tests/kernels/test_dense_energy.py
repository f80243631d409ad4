"""dense_energy: the value against a double loop, the gradient against the stated convention; native code against the
reference."""

import pytest
import torch
import torch.nn.functional as F

from kernels import available_backends, dense_energy
from kernels.dense_energy import reference
from kernels.lattice import Lattice, pixel_features


def example(b=2, k=3, h=12, w=16, dtype=torch.float64):
    probs = torch.randn(b, k, h, w, dtype=dtype).softmax(1)
    image = (torch.rand(b, 3, h, w) * 60 + 90).round().to(dtype)
    roi = torch.ones(b, h, w, dtype=dtype)
    roi[:, :3] = 0
    labels = torch.randint(0, k, (b, h, w))
    labels[:, :, ::3] = 255
    return probs, image, roi, labels


def plain(probs, image, roi, labels, sigma_rgb=15.0, sigma_xy=50.0):
    """Value and slope at half size, in fp64, with the kernel as a matrix; inputs at full size."""
    b = len(probs)
    small = F.interpolate(probs, scale_factor=0.5, mode="bilinear", align_corners=False)
    image, roi, labels = image[:, :, ::2, ::2], roi[:, ::2, ::2], labels[:, ::2, ::2]
    value, slopes = 0.0, []
    for n in range(b):
        f = pixel_features(image[n], sigma_xy, sigma_rgb)
        kernel = torch.exp(-0.5 * (f[:, None] - f[None]).square().sum(2))
        gate = (roi[n] - small[n].amax(0)).clamp_min(0)
        gate[labels[n] == 255] = 1
        s = (small[n] * roi[n]).flatten(1)
        smooth = s @ kernel
        value -= 1e-7 / b * (s * gate.flatten() * smooth).sum()
        slopes.append((-2e-7 / b * gate.flatten() * smooth * roi[n].flatten()).view_as(small[n]))
    return value, small, torch.stack(slopes)


def test_true_scale_equals_the_matrix_form():
    probs, image, roi, labels = example()
    want, _, _ = plain(probs, image, roi, labels)
    got = dense_energy(probs, image, roi, labels, scale="true")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_gradient_is_the_stated_convention():
    probs, image, roi, labels = example()
    probs.requires_grad_()
    dense_energy(probs, image, roi, labels, scale="true").mul(3).backward()
    with torch.no_grad():
        _, _, slope = plain(probs, image, roi, labels)
    x = probs.detach().clone().requires_grad_()
    F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False).backward(3 * slope)
    torch.testing.assert_close(probs.grad, x.grad, rtol=1e-10, atol=1e-20)
    assert torch.equal(probs.grad[:, :, :2], torch.zeros_like(probs[:, :, :2]))  # outside the roi


def test_without_gate_the_gradient_is_the_true_derivative():
    # With every pixel unlabelled the gate is 1, and the convention coincides with the derivative.
    probs, image, roi, labels = example(b=1, k=2, h=4, w=6)
    labels = torch.full_like(labels, 255)
    run = lambda p: 1e7 * dense_energy(p, image, roi, labels, scale="true")  # noqa: E731
    assert torch.autograd.gradcheck(run, probs.requires_grad_())


def test_pcre_check_11_certain_and_labelled_has_no_energy():
    probs, image, roi, labels = example()
    probs = torch.zeros_like(probs)
    probs[:, 1] = 1.0
    for scale in ("lattice", "true"):
        assert dense_energy(probs, image, torch.ones_like(roi), torch.ones_like(labels), scale=scale).item() == 0.0


def test_pcre_check_11_all_ignored_opens_the_gate():
    probs, image, roi, labels = example()
    ignored = torch.full_like(labels, 255)
    got = dense_energy(probs, image, roi, ignored, scale="lattice")
    small = F.interpolate(probs, scale_factor=0.5, mode="bilinear") * roi[:, None, ::2, ::2]
    want = 0.0
    for p, i in zip(small, image[:, :, ::2, ::2], strict=True):
        s = p.flatten(1).t().contiguous()
        want -= 1e-7 / 2 * (s * Lattice(pixel_features(i, 50.0, 15.0)).filter(s)).sum()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert got < dense_energy(probs, image, roi, labels, scale="lattice") < 0


def test_lattice_scale_is_a_share_of_the_true_one():
    probs, _, _, labels = example(b=1, h=64, w=64)
    image = F.interpolate(torch.rand(1, 3, 5, 5) * 200, (64, 64), mode="bilinear") + 3 * torch.randn(1, 3, 64, 64)
    args = (probs, image, torch.ones(1, 64, 64), torch.full((1, 64, 64), 255))
    share = dense_energy(*args) / dense_energy(*args, scale="true")
    assert 0.45 < share < 0.7  # documented as about 0.57


def test_odd_sizes_full_size_and_empty():
    probs, image, roi, labels = example(h=13, w=7)
    assert dense_energy(probs, image, roi, labels).item() < 0
    assert dense_energy(probs, image, roi, labels, scale_factor=1.0).item() < 0
    one = example(b=1, h=1, w=1)
    assert torch.isfinite(dense_energy(*one))
    empty = probs[:0].requires_grad_()
    loss = dense_energy(empty, image[:0], roi[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0.0


def test_empty_roi_has_no_energy():
    probs, image, roi, labels = example()
    probs.requires_grad_()
    loss = dense_energy(probs, image, torch.zeros_like(roi), labels)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(probs.grad, torch.zeros_like(probs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    probs, image, roi, labels = example(dtype=torch.float32)
    probs = probs.to(dtype)
    want = dense_energy(probs.float(), image, roi, labels)
    for p in (probs.clone(), probs.mT.contiguous().mT):
        p.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = dense_energy(p, image, roi.bool(), labels.to(torch.uint8))
        got.backward()
        assert got.dtype == torch.float32 and torch.equal(got, want) and p.grad.dtype == dtype


def test_errors():
    probs, image, roi, labels = example()
    with pytest.raises(ValueError, match=r"dense_energy: roi must be \[2, 12, 16\], got \(2, 11, 16\)"):
        dense_energy(probs, image, roi[:, 1:], labels)
    with pytest.raises(ValueError, match="dense_energy: scale must be one of lattice, true, got 'exact'"):
        dense_energy(probs, image, roi, labels, scale="exact")
    with pytest.raises(ValueError, match="dense_energy: sigma_rgb must lie in"):
        dense_energy(probs, image, roi, labels, sigma_rgb=0.0)
    with pytest.raises(ValueError, match="dense_energy: scale_factor must lie in"):
        dense_energy(probs, image, roi, labels, scale_factor=2.0)
    with pytest.raises(TypeError, match="dense_energy: labels must hold integers"):
        dense_energy(probs, image, roi, labels.float())
    with pytest.raises(TypeError, match="dense_energy: image must be floating point"):
        dense_energy(probs, image.to(torch.uint8), roi, labels)


# ------------------------------------------------------------------------------------------------ native


CPU_BACKENDS = available_backends("dense_energy", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")


def value_and_grad(probs, *args, **options):
    probs = probs.clone().requires_grad_()
    value = dense_energy(probs, *args, **options)
    value.backward()
    return value.detach(), probs.grad


@native
@pytest.mark.parametrize("size", [(24, 32), (13, 7), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 21, 36, 51])
def test_native_equals_reference(size, k):
    probs, image, roi, labels = example(2, k, *size, dtype=torch.float32)
    full = {"sigma_rgb": 5.0, "sigma_xy": 20.0, "scale_factor": 1.0}
    for options in ({}, full, {"scale_factor": 0.7}, {"scale_factor": 0.3}):
        got = value_and_grad(probs, image, roi, labels, backend="native", **options)
        plain = value_and_grad(probs, image, roi, labels, backend="reference", **options)
        want = value_and_grad(probs.double(), image, roi, labels, backend="reference", **options)
        assert got[0].dtype == got[1].dtype == torch.float32
        for ours, fp32, fp64 in zip(got, plain, want, strict=True):
            torch.testing.assert_close(ours, fp32, rtol=1e-5, atol=1e-12)
            # fp64 breaks ties of the lattice cells its own way
            assert (ours - fp64).abs().max() <= 1e-3 * fp64.abs().max()


@native
@pytest.mark.parametrize("sigmas", [(50.0, 15.0), (3.0, 200.0), (80.0, 1.0)])
@pytest.mark.parametrize("shape", [(2, 3, 20, 31), (1, 8, 1, 17), (3, 1, 9, 9), (1, 33, 12, 10)])
def test_filter_equals_the_lattice(sigmas, shape):
    b, _, h, w = shape
    image, planes = 255 * torch.rand(b, 3, h, w), torch.randn(shape)
    got = torch.ops.wsss.lattice_filter(image, planes, *sigmas)
    for i, p, ours in zip(image, planes, got, strict=True):
        for dtype in (torch.float32, torch.float64):
            values = p.to(dtype).flatten(1).t().contiguous()
            want = Lattice(pixel_features(i.to(dtype), *sigmas)).filter(values).t().reshape(p.shape)
            error, scale = (ours - want).abs(), want.abs()
            if dtype == torch.float32:
                assert error.max() < 1e-5 * scale.max()
            # coordinates of 500 carry 3e-5 in fp32, and fp64 breaks ties of the lattice cells its own way
            assert error.mean() < 1e-3 * scale.mean()


@native
def test_native_batch_position_threads_repeat():
    image, planes = 255 * torch.rand(3, 3, 61, 83), torch.randn(3, 21, 61, 83)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(torch.ops.wsss.lattice_filter(image, planes, 50.0, 15.0))
            pairs = zip(image.split(1), planes.split(1), strict=True)
            results.append(torch.cat([torch.ops.wsss.lattice_filter(i, p, 50.0, 15.0) for i, p in pairs]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@native
@pytest.mark.parametrize("size", [(46, 600), (47, 35)])  # runs of 256 pixels with a rest; not halved
def test_native_energy_batch_position_threads(size):
    """Two threads share the vertices of the third image, which one thread fills as the rows come."""
    probs, image, roi, labels = example(3, 45, *size, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(value_and_grad(probs, image, roi, labels, backend="native"))
            ones = zip(*(x.split(1) for x in (probs, image, roi, labels)), strict=True)
            alone = torch.cat([value_and_grad(*one, backend="native")[1] for one in ones])
            # a third of the weight: the sum over the batch is a mean
            torch.testing.assert_close(results[0][1], alone / 3, rtol=1e-6, atol=0)
            order = [2, 0, 1]
            moved = value_and_grad(probs[order], image[order], roi[order], labels[order], backend="native")[1]
            assert torch.equal(moved, results[0][1][order])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@native
def test_energy_opcheck_compile_errors():
    op = torch.ops.wsss.dense_energy
    probs = torch.rand(2, 36, 9, 8)
    small = 255 * torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4), torch.rand(2, 4, 4) < 0.5
    for leaf in (probs, probs.clone().requires_grad_()):
        torch.library.opcheck(op.default, (leaf, *small, 20.0, 15.0, True))
    energy, slope = op(probs, *small, 20.0, 15.0, True)
    torch.library.opcheck(torch.ops.wsss.dense_energy_backward.default, (torch.ones(()), slope, probs.shape, 4, 4))
    without = op(probs, *small, 20.0, 15.0, False)
    assert torch.equal(without[0], energy) and without[1].numel() == 0
    args = example(dtype=torch.float32)
    want = value_and_grad(*args, backend="native")
    leaf = args[0].clone().requires_grad_()
    loss = torch.compile(lambda *a: 2 * dense_energy(*a, backend="native"), fullgraph=True, backend="aot_eager")
    loss(leaf, *args[1:]).backward()
    torch.testing.assert_close(leaf.grad, 2 * want[1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="dense_energy: image does not fit probs"):
        op(probs[:1], *small, 20.0, 15.0, True)
    with pytest.raises(ValueError, match="dense_energy: roi does not fit image"):
        op(probs, small[0], small[1][:, 1:], small[2], 20.0, 15.0, True)
    with pytest.raises(ValueError, match="dense_energy: unlabelled does not fit roi"):
        op(probs, *small[:2], small[2][:, 1:], 20.0, 15.0, True)
    with pytest.raises(TypeError, match="dense_energy: unlabelled must be bool"):
        op(probs, *small[:2], small[1], 20.0, 15.0, True)
    with pytest.raises(ValueError, match="dense_energy: the standard deviations must be > 0"):
        op(probs, *small, 0.0, 15.0, True)
    with pytest.raises(ValueError, match="dense_energy: probs and image must not be empty"):
        op(probs[:, :0], *small, 20.0, 15.0, True)
    with pytest.raises(ValueError, match="dense_energy_backward: no such shape"):
        torch.ops.wsss.dense_energy_backward(torch.ones(()), slope, probs.shape, 4, 0)
    with pytest.raises(ValueError, match="dense_energy_backward: slope .* does not fit"):
        torch.ops.wsss.dense_energy_backward(torch.ones(()), slope[:1], probs.shape, 4, 4)
    with pytest.raises(RuntimeError, match="dense_energy: the gradient itself is not differentiable"):
        x = probs.clone().requires_grad_()
        one = torch.ones((), requires_grad=True)
        (grad,) = torch.autograd.grad(op(x, *small, 20.0, 15.0, True)[0], x, one, create_graph=True)
        grad.sum().backward()


@native
def test_native_true_scale_is_the_reference():
    args = example(dtype=torch.float32)
    assert torch.equal(*(dense_energy(*args, scale="true", backend=b) for b in ("native", "reference")))


@native
def test_native_refuses_float64():
    with pytest.raises(TypeError, match="dense_energy: the native backend computes in fp32"):
        dense_energy(*example(), backend="native")


@native
def test_too_small_a_deviation():
    for backend in CPU_BACKENDS:
        with pytest.raises(ValueError, match="lattice: the features span too many cells"):
            dense_energy(*example(dtype=torch.float32), sigma_rgb=1e-4, backend=backend)


@native
def test_filter_opcheck_compile_layout_empty():
    op = torch.ops.wsss.lattice_filter
    args = (255 * torch.rand(2, 3, 9, 8), torch.rand(2, 5, 9, 8), 20.0, 15.0)
    torch.library.opcheck(op.default, args)
    want = op(*args)
    run = torch.compile(lambda *a: op(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*args), want + 1)
    assert torch.equal(want, op(args[0].mT.contiguous().mT, args[1].to(memory_format=torch.channels_last), *args[2:]))
    for b, k, h in ((0, 2, 4), (1, 0, 4), (1, 2, 0)):
        assert op(torch.rand(b, 3, h, 5), torch.rand(b, k, h, 5), 20.0, 15.0).shape == (b, k, h, 5)
    with pytest.raises(TypeError, match="lattice_filter: planes must be float32"):
        op(args[0], args[1].double(), 20.0, 15.0)
    with pytest.raises(ValueError, match="lattice_filter: image does not fit planes"):
        op(args[0][..., :4], *args[1:])
    with pytest.raises(ValueError, match="lattice_filter: the standard deviations must be > 0"):
        op(*args[:2], 0.0, 15.0)


@pytest.mark.gpu
class TestOnTheGpu:
    """The kernels themselves run in test_lattice_serial.py without a GPU."""

    @pytest.mark.parametrize("shape", [(2, 3, 20, 31), (1, 8, 1, 17), (2, 2, 1, 1), (1, 33, 12, 10), (2, 21, 112, 112)])
    def test_filter_equals_the_reference_in_fp64(self, shape):
        b, _, h, w = shape
        image, planes = 255 * torch.rand(b, 3, h, w), torch.rand(shape)
        want = reference.kernel_sums(image.double(), planes.double(), 40.3, 17.7, "lattice")
        got = torch.ops.wsss.lattice_filter(image.cuda(), planes.cuda(), 40.3, 17.7).cpu()
        assert (got - want).abs().max() < 1e-4 * want.abs().max()  # fp32 coordinates carry 3e-5

    def test_value_and_gradient(self):
        args = example(2, 21, 60, 64, dtype=torch.float32)
        want = value_and_grad(*args, backend="native")
        got = value_and_grad(*(x.cuda() for x in args))
        for ours, cpu in zip(got, want, strict=True):
            torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-4, atol=1e-12)

    def test_twenty_runs_and_batch_position(self):
        image, planes = 255 * torch.rand(3, 3, 61, 83).cuda(), torch.rand(3, 21, 61, 83).cuda()
        image[0] = 90.0  # vertices with thousands of entries
        run = lambda i, p: torch.ops.wsss.lattice_filter(i, p, 50.0, 15.0)  # noqa: E731
        want = run(image, planes)
        for _ in range(20):
            assert torch.equal(want, run(image, planes))
        order = [2, 0, 1]
        assert torch.equal(want[order], run(image[order], planes[order]))
        assert torch.equal(want[1:2], run(image[1:2], planes[1:2]))
        with pytest.raises(ValueError, match="lattice: the features span too many cells"):
            torch.ops.wsss.lattice_filter(image, planes, 50.0, 1e-4)
