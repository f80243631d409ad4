"""class_patch_contrast: against a loop over pairs, its gradient, and its corner cases."""

import pytest
import torch

from kernels import available_backends, class_patch_contrast
from kernels.class_patch_contrast import bench
from kernels.patch_token_contrast.bench import example as tokens_and_labels
from kernels.patch_token_contrast.bench import loss_and_gradient

native = pytest.mark.skipif(
    "native" not in available_backends("class_patch_contrast", "cpu"), reason="kernels._C is not built"
)


def wider_example(b, c, n, d):
    """fp32 arguments of the op; no cosine is near 0, where |cos| has its kink."""
    tokens, labels = tokens_and_labels(b, c + n, d, 0.2)
    if d == 3:
        tokens = tokens.sign() * torch.tensor([1, 4, 9]) + 0.1 * tokens
    present = torch.arange(b * c).view(b, c) % 3 > 0
    return tokens[:, :c], tokens[:, c:], labels[:, c:], present


def both(z, f, *rest, name="native"):
    """(loss, gradient) by `name`, and by the reference in fp64."""
    wide = f.double()
    got = loss_and_gradient(lambda x: class_patch_contrast(x, f, *rest, backend=name), z)
    return got, loss_and_gradient(lambda x: class_patch_contrast(x, wide, *rest, backend="reference"), z.double())


def assert_near(got, want, tolerance=1e-5):
    # absolute: an ulp of the terms, 1/2, where the loss is their small difference
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance / 10, atol=6e-8)
    assert (got[1].double() - want[1]).norm() <= tolerance * want[1].norm()


def example(dtype=torch.float64):
    z, f = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 8, 5, dtype=dtype)
    labels = torch.tensor([[0, 1, 1, 2, 255, 3, 0, 2], [0, 0, 3, 3, 255, 255, 1, 0]])
    return z, f, labels, torch.tensor([[1, 1, 0], [0, 0, 1]])


def loop_loss(z, f, labels, present):
    sums, counts = [0.0, 0.0], [0, 0]
    for b in range(len(z)):
        for c in range(z.shape[1]):
            for i in range(f.shape[1]):
                if present[b, c] and labels[b, i] != 255:
                    kind = int(labels[b, i] != c + 1)
                    sums[kind] = sums[kind] + torch.cosine_similarity(z[b, c], f[b, i], dim=0).abs()
                    counts[kind] += 1
    return 0.5 * (1 - sums[0] / (counts[0] + 1)) + 0.5 * sums[1] / (counts[1] + 1)


def test_equals_the_loop():
    args = example()
    torch.testing.assert_close(class_patch_contrast(*args), loop_loss(*args), rtol=1e-12, atol=0)


def test_gradient_reaches_the_class_tokens_alone():
    z, f, labels, present = example()
    z.requires_grad_(), f.requires_grad_()
    class_patch_contrast(z, f, labels, present).backward()
    assert f.grad is None
    assert (z.grad[present > 0].abs().sum(1) > 0).all()
    assert (z.grad[present == 0] == 0).all()


def test_gradcheck():
    z, f, labels, present = example()
    assert torch.autograd.gradcheck(lambda t: class_patch_contrast(t, f, labels, present), z.requires_grad_())


def test_nothing_to_compare_gives_half_and_zero_gradient():
    z, f, labels, present = example(torch.float32)
    for y, p in ((torch.full_like(labels, 255), present), (labels, torch.zeros_like(present))):
        token = z.clone().requires_grad_()
        loss = class_patch_contrast(token, f, y, p)
        loss.backward()
        assert loss.item() == 0.5 and torch.equal(token.grad, torch.zeros_like(z))
    empty = class_patch_contrast(z[:0], f[:0], labels[:0], present[:0])
    assert empty.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_fp32(dtype):
    z, f, labels, present = example(dtype)
    loss = class_patch_contrast(z, f, labels, present)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, class_patch_contrast(z.float(), f.float(), labels, present.bool()))


def test_layout_repeat_and_compile():
    z, f, labels, present = example(torch.float32)
    want = class_patch_contrast(z, f, labels, present)
    assert torch.equal(want, class_patch_contrast(z.mT.contiguous().mT, f.mT.contiguous().mT, labels, present.float()))
    run = torch.compile(class_patch_contrast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(z, f, labels, present), want, rtol=1e-6, atol=0)


def test_errors():
    z, f, labels, present = example()
    with pytest.raises(ValueError, match=r"class_patch_contrast: patch_tokens must be \[2, N, 5\], got \(2, 8, 4\)"):
        class_patch_contrast(z, f[..., 1:], labels, present)
    with pytest.raises(ValueError, match=r"class_patch_contrast: present must be \[2, 3\]"):
        class_patch_contrast(z, f, labels, present[:, 1:])
    with pytest.raises(TypeError, match="class_patch_contrast: labels must hold integers"):
        class_patch_contrast(z, f, labels.double(), present)


# C around the group of 8 rows, N around the panel (32) and the strip (64) of columns.
@native
@pytest.mark.parametrize("b", [0, 3])
@pytest.mark.parametrize("c", [0, 1, 9, 20])
@pytest.mark.parametrize("n", [0, 1, 33, 130])
@pytest.mark.parametrize("d", [3, 67])
def test_native_equals_reference(b, c, n, d):
    z, f, labels, present = wider_example(b, c, n, d)
    for y, p in ((labels, present), (labels.clamp(1, 1), torch.ones_like(present))):  # the second: one class
        got, want = both(z, f, y, p)
        assert_near(got, want)
        assert not got[1][~p].any()


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_half_labels_layout(dtype):
    z, f, labels, present = wider_example(2, 9, 50, 33)
    full = both(z.to(dtype).float(), f.to(dtype).float(), labels, present)[0]
    loss, gradient = both(z.to(dtype), f.to(dtype), labels.to(torch.uint8), present.float())[0]
    assert torch.equal(loss, full[0]) and torch.equal(gradient, full[1].to(dtype))
    got = both(z.to(dtype).float(), f.to(dtype), labels.int(), present)[0]  # types may differ
    assert all(torch.equal(a, b) for a, b in zip(got, full, strict=True))
    got = both(z.to(dtype).float().mT.contiguous().mT, f.to(dtype).mT.contiguous().mT, labels, present)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, full, strict=True))


@native
def test_native_tokens_of_any_norm():
    """Patches are read as they are and scaled afterwards: with norms of 1e-37 to 1e37 no digit is lost."""
    z, f, labels, present = wider_example(2, 5, 70, 33)
    f = f * (10.0 ** torch.linspace(-37, 37.4, 70)[:, None]).float()
    z = z * torch.tensor([1e-5, 1e-3, 1, 1e10, 1e15])[:, None]
    got, want = both(z, f, labels, present)
    assert got[1].isfinite().all()
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=6e-8)
    for mine, true in zip(got[1].flatten(0, 1), want[1].flatten(0, 1), strict=True):
        assert (mine - true).norm() <= 1e-5 * true.norm()


@native
def test_native_nothing_to_compare_and_zero_tokens():
    z, f, labels, present = wider_example(2, 9, 50, 33)
    for y, p in ((torch.full_like(labels, 255), present), (labels, torch.zeros_like(present))):
        loss, gradient = both(z, f, y, p)[0]
        assert loss.item() == 0.5 and torch.equal(gradient, torch.zeros_like(z))
    z, f = z.clone(), f.clone()
    z[0, 1], f[1, 3], present[0, 1] = 0, 0, True
    got, want = both(z, f, labels, present)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    scale = want[1].norm(dim=2, keepdim=True).clamp_min(1e-300)
    torch.testing.assert_close(got[1].double() / scale, want[1] / scale, rtol=0, atol=1e-5)


@native
def test_bits_depend_on_neither_threads_nor_run_nor_memory_nor_batch():
    arguments = wider_example(3, 20, 150, 67)
    want = both(*arguments)[0]
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(both(*arguments)[0], want, strict=True))
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert all(torch.equal(a, b) for a, b in zip(both(*arguments)[0], want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(both(*arguments)[0], want, strict=True))
    # The loss sums over the batch, so its last bit may depend on the order of the images; the gradient's may not.
    got = both(*(x.flip(0) for x in arguments))[0]
    torch.testing.assert_close(got[0], want[0], rtol=2e-7, atol=0)
    assert torch.equal(got[1].flip(0), want[1])


@native
def test_native_compile_autocast_opcheck_second_derivative():
    z, *rest = wider_example(2, 9, 40, 33)
    want = both(z, *rest)[0]
    run = torch.compile(lambda *args: 2 * class_patch_contrast(*args), fullgraph=True, backend="aot_eager")
    got = loss_and_gradient(lambda x: run(x, *rest), z)
    assert torch.equal(got[0], 2 * want[0]) and torch.equal(got[1], 2 * want[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(z, *rest)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    z = z.clone().requires_grad_()
    torch.library.opcheck(torch.ops.wsss.class_patch_contrast.default, (z, *rest, 255, True))
    (gradient,) = torch.autograd.grad(class_patch_contrast(z, *rest), z, create_graph=True)
    with pytest.raises(RuntimeError, match="class_patch_contrast: the gradient itself is not differentiable"):
        gradient.sum().backward()
    with torch.no_grad():
        assert torch.equal(class_patch_contrast(z, *rest), want[0])


@native
def test_float64_goes_to_the_reference():
    z, f, labels, present = example()
    assert class_patch_contrast(z.float(), f, labels, present).dtype == torch.float64
    with pytest.raises(TypeError, match="class_patch_contrast: patch_tokens must be fp32, bf16 or fp16, got Double"):
        class_patch_contrast(z.float(), f, labels, present, backend="native")


@native
def test_direct_call_is_checked():
    z, f, labels, present = wider_example(2, 3, 8, 5)
    run = torch.ops.wsss.class_patch_contrast
    with pytest.raises(ValueError, match=r"class_patch_contrast: patch_tokens must be \[2, N, 5\], got \[2, 8, 4\]"):
        run(z, f[..., 1:], labels, present, 255, False)
    with pytest.raises(ValueError, match=r"class_patch_contrast: labels must be \[2, 8\], got \[2, 7\]"):
        run(z, f, labels[:, 1:], present, 255, False)
    with pytest.raises(TypeError, match="class_patch_contrast: present must be bool, got Float"):
        run(z, f, labels, present.float(), 255, False)
    with pytest.raises(ValueError, match=r"class_patch_contrast: present must be \[2, 3\], got \[2, 2\]"):
        run(z, f, labels, present[:, 1:], 255, False)


@pytest.mark.gpu
def test_cuda_equals_reference():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        for case in ((2, 9, 65, 67), (4, 20, 784, 768)):
            z, f, *rest = (x.cuda() for x in wider_example(*case))
            got, want = both(z.to(dtype), f.to(dtype), *rest, name="triton")
            assert_near(got, want, tolerance)


def test_bench_peers_compute_the_same(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 5, 3, 20, 40))
    want = bench.run("tiny", torch.device("cpu"), "reference")()
    got = bench.peers("tiny", torch.device("cpu"))["eager"]()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
