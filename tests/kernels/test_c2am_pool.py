"""c2am_pool: the reference against its equation, every backend against the reference in fp64."""

import pytest
import torch

from kernels import available_backends, backend, c2am_pool

CPU_BACKENDS = available_backends("c2am_pool", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
each_backend = pytest.mark.usefixtures("each_backend_in_turn")
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 4), (3, 9, 5, 7), (2, 70, 3, 3), (1, 130, 1, 33), (2, 260, 14, 14)]


@pytest.fixture(params=CPU_BACKENDS)
def each_backend_in_turn(request, monkeypatch):
    monkeypatch.setitem(backend._settings, "c2am_pool", request.param)


def example(b=3, d=9, h=5, w=7, dtype=torch.float32):
    return torch.randn(b, d, h, w, dtype=dtype), 3 * torch.randn(b, 1, h, w, dtype=dtype)


def with_gradients(features, logits, flows, autocast=False, **options):
    """Foreground, background, gradient of the features, gradient of the logits."""
    leaves = [x.clone().requires_grad_() for x in (features, logits)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = c2am_pool(*leaves, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, [f.to(out[0].dtype) for f in flows])]


def test_reference_equals_the_equation():
    features, logits = example(dtype=torch.float64)
    got = c2am_pool(features, logits, backend="reference")
    q = torch.sigmoid(logits)
    torch.testing.assert_close(got[0], (q * features).mean((2, 3)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], ((1 - q) * features).mean((2, 3)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[0] + got[1], features.mean((2, 3)), rtol=1e-12, atol=1e-14)


@native
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(shape):
    features, logits = example(*shape)
    flows = torch.randn(2, *shape[:2])
    want = with_gradients(features.double(), logits.double(), flows, backend="reference")
    for x, tolerance in ((features, 2e-6), (features.double(), 1e-13)):  # sums of up to 260 products
        got = with_gradients(x, logits.to(x.dtype), flows, backend="native")
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * (1e-3 + theirs.abs().max())


@each_backend
def test_gradcheck():
    features, logits = example(2, 5, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(c2am_pool, (features.requires_grad_(), logits.requires_grad_()))


@each_backend
class TestEachBackend:
    def test_saturated_logits(self):
        features, logits = example()
        logits = logits.sign() * 1e4
        got = with_gradients(features, logits, torch.ones(2, 3, 9))
        inside = (logits > 0).float()
        torch.testing.assert_close(got[0], (features * inside).mean((2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[2], torch.full_like(features, 1 / 35), rtol=1e-5, atol=0)
        assert not got[3].any()

    def test_one_gradient_alone(self):
        features, logits = (x.requires_grad_() for x in example())
        grads = torch.autograd.grad(c2am_pool(features, logits)[0].sum(), (features, logits))
        twin = torch.autograd.grad((features * logits.sigmoid()).mean((2, 3)).sum(), (features, logits))
        for got, want in zip(grads, twin, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_layouts(self):
        features, logits = example()
        flows = torch.randn(2, 3, 9)
        want = with_gradients(features, logits, flows)
        last = features.contiguous(memory_format=torch.channels_last)
        got = with_gradients(last, logits.mT.contiguous().mT, flows.mT.contiguous().mT)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_empty(self):
        for b, d in ((0, 3), (2, 0)):
            features, logits = example(b, d)
            got = with_gradients(features, logits, torch.ones(2, b, d))
            assert got[0].shape == got[1].shape == (b, d) and got[2].shape == features.shape
            assert torch.equal(got[3], torch.zeros_like(logits))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype):
        features, logits = (x.to(dtype) for x in example())
        flows = torch.randn(2, 3, 9)
        got = with_gradients(features, logits, flows, autocast=True)
        want = with_gradients(features.float(), logits.float(), flows)
        assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 2
        for ours, theirs in zip(got, want, strict=True):  # the same fp32 sums, then rounded
            torch.testing.assert_close(ours, theirs.to(ours.dtype))
        mixed = c2am_pool(features, logits.double())
        assert mixed[0].dtype == torch.float64

    def test_second_run_gives_equal_bits(self):
        features, logits = example()
        first, second = (with_gradients(features, logits, torch.ones(2, 3, 9)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_compile_fullgraph(self):
        features, logits = (x.requires_grad_() for x in example())
        run = torch.compile(lambda x, y: sum(c2am_pool(x, y)), fullgraph=True, backend="aot_eager")
        got, want = run(features, logits), sum(c2am_pool(features, logits))
        assert torch.equal(got, want)
        for x, y in zip(*(torch.autograd.grad(x.square().sum(), (features, logits)) for x in (got, want)), strict=True):
            torch.testing.assert_close(x, y)


@native
def test_bits_depend_on_neither_threads_nor_memory():
    features, logits = example(3, 150, 7, 9)
    flows = torch.randn(2, 3, 150)
    want = with_gradients(features, logits, flows, backend="native")
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.empty(3).isnan().all()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = with_gradients(features, logits, flows, backend="native")
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@native
def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        features, logits = (x.flatten(2).requires_grad_() for x in example(dtype=dtype))
        torch.library.opcheck(torch.ops.wsss.c2am_pool.default, (features, logits.detach().squeeze(1).requires_grad_()))
        flows = torch.randn(2, 3, 9, dtype=dtype)
        back = (*flows, features.detach(), logits.detach().squeeze(1))
        torch.library.opcheck(torch.ops.wsss.c2am_pool_backward.default, back)


@native
def test_second_gradient_is_refused():
    features, logits = example()
    out, _ = c2am_pool(features.requires_grad_(), logits, backend="native")
    (grad,) = torch.autograd.grad(out, features, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="c2am_pool: the gradient itself is not differentiable"):
        grad.sum().backward()


@native
@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(3, 9), ValueError, r"features must be \[B, D, N\] with N >= 1"),
        (0, torch.zeros(3, 9, 0), ValueError, r"features must be \[B, D, N\] with N >= 1"),
        (0, torch.zeros(3, 9, 35).int(), TypeError, "features must be floating point"),
        (1, torch.zeros(3, 34), ValueError, r"logits must be \[3, 35\]"),
        (1, torch.zeros(3, 35).double(), TypeError, "logits must be Float, got Double"),
        (2, torch.zeros(3, 8), ValueError, r"gradients must be \[3, 9\]"),
        (3, torch.zeros(3, 9).double(), TypeError, "gradients must be Float, got Double"),
    ],
)
def test_direct_call_is_checked(place, value, error, match):
    args = [torch.zeros(3, 9, 35), torch.zeros(3, 35), torch.zeros(3, 9), torch.zeros(3, 9)]
    args[place] = value
    with pytest.raises(error, match="c2am_pool_backward: " + match):
        torch.ops.wsss.c2am_pool_backward(*args[2:], *args[:2])
    if place < 2:
        with pytest.raises(error, match="c2am_pool: " + match):
            torch.ops.wsss.c2am_pool(*args[:2])


@pytest.mark.parametrize(
    ("features", "logits", "error", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 1, 4, 4), ValueError, r"features must be \[B, D, h, w\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), ValueError, r"logits must be \[2, 1, 4, 4\], got \(2, 4, 4\)"),
        (torch.zeros(2, 3, 0, 4), torch.zeros(2, 1, 0, 4), ValueError, "features must have h . w >= 1"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4).int(), TypeError, "logits must be floating point"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, device="meta"), ValueError, "tensors must be on one device"),
    ],
)
def test_errors(features, logits, error, match):
    with pytest.raises(error, match="c2am_pool: " + match):
        c2am_pool(features, logits)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_equals_reference(shape, dtype):
    features, logits = (x.cuda().to(dtype) for x in example(*shape))
    flows = torch.randn(2, *shape[:2]).cuda()
    got, again = (with_gradients(features, logits, flows, backend="native") for _ in range(2))
    want = with_gradients(features.double(), logits.double(), flows, backend="reference")
    for ours, second, theirs in zip(got, again, want, strict=True):
        assert torch.equal(ours, second)
        eps = max(torch.finfo(ours.dtype).eps, 2e-6)
        assert (ours - theirs).abs().max() <= eps * (1e-3 + theirs.abs().max())
