"""patch_token_contrast: against a loop over pairs, against its closed-form gradient, and its corner cases."""

import pytest
import torch

from kernels import available_backends, patch_token_contrast
from kernels.patch_token_contrast import bench
from kernels.patch_token_contrast.bench import loss_and_gradient
from kernels.patch_token_contrast.reference import pair_sets

native = pytest.mark.skipif(
    "native" not in available_backends("patch_token_contrast", "cpu"), reason="kernels._C is not built"
)


def both(tokens, labels, name="native", **options):
    """(loss, gradient) by `name`, and by the reference in fp64."""
    got = loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend=name, **options), tokens)
    wide = loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend="reference", **options), tokens.double())
    return got, wide


def assert_near(got, want, tolerance=1e-5):
    """Loss within a tenth of the relative tolerance, gradient within it in relative L2; goal D3 at the default."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance / 10, atol=0)
    assert (got[1].double() - want[1]).norm() <= tolerance * want[1].norm()


def loop_loss(tokens, labels):
    """The definition, pair by pair."""
    sums, counts = [0.0, 0.0], [0, 0]
    for f, y in zip(tokens, labels, strict=True):
        f = f / f.norm(dim=1, keepdim=True).clamp_min(1e-8)
        for i in range(len(y)):
            for j in range(len(y)):
                if i != j and y[i] != 255 and y[j] != 255:
                    kind = int(y[i] != y[j])
                    sums[kind] = sums[kind] + (f[i] @ f[j]).abs()
                    counts[kind] += 1
    return 0.5 * (1 - sums[0] / (counts[0] + 1)) + 0.5 * sums[1] / (counts[1] + 1)


def example(b=2, n=9, d=5, dtype=torch.float64):
    labels = torch.randint(0, 3, (b, n))
    labels[:, ::4] = 255
    return torch.randn(b, n, d, dtype=dtype), labels


def test_equals_the_loop():
    tokens, labels = example()
    torch.testing.assert_close(patch_token_contrast(tokens, labels), loop_loss(tokens, labels), rtol=1e-12, atol=0)


def test_pcre_check_4_all_ignored_gives_half_and_zero_gradient():
    tokens = torch.randn(2, 9, 5, requires_grad=True)
    loss = patch_token_contrast(tokens, torch.full((2, 9), 255))
    loss.backward()
    assert loss.item() == 0.5
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))


def test_pcre_check_4_counts_by_histogram_equal_counts_by_pairs():
    _, labels = example(b=3, n=50)
    positive, negative = pair_sets(labels, 255)
    num_pos = num_neg = 0
    for y in labels:
        counts = torch.bincount(y[y != 255])
        num_pos += int((counts * (counts - 1)).sum())
        num_neg += int(counts.sum() ** 2 - (counts**2).sum())
    assert positive.sum().dtype == torch.int64
    assert (int(positive.sum()), int(negative.sum())) == (num_pos, num_neg)


def test_closed_form_gradient():
    tokens, labels = example(b=1)
    tokens.requires_grad_()
    patch_token_contrast(tokens, labels).backward()
    with torch.no_grad():
        norm = tokens[0].norm(dim=1, keepdim=True)
        f = tokens[0] / norm
        positive, negative = (p[0].double() for p in pair_sets(labels, 255))
        g = -0.5 * positive / (positive.sum() + 1) + 0.5 * negative / (negative.sum() + 1)
        e = 2 * (g * (f @ f.T).sign()) @ f
        want = (e - (e * f).sum(1, keepdim=True) * f) / norm
    torch.testing.assert_close(tokens.grad[0], want, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    tokens, labels = example(n=6, d=4)
    assert torch.autograd.gradcheck(lambda t: patch_token_contrast(t, labels), tokens.requires_grad_())


def test_zero_tokens_have_finite_gradient():
    tokens = torch.zeros(1, 4, 3, requires_grad=True)
    patch_token_contrast(tokens, torch.tensor([[0, 0, 1, 1]])).backward()
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_fp32(dtype):
    tokens, labels = example(dtype=dtype)
    tokens.requires_grad_()
    loss = patch_token_contrast(tokens, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, patch_token_contrast(tokens.float(), labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss, patch_token_contrast(tokens, labels))
    loss.backward()
    assert tokens.grad.dtype == dtype


def test_layout_dtype_of_labels_empty_and_repeat():
    tokens, labels = example(dtype=torch.float32)
    want = patch_token_contrast(tokens, labels)
    assert torch.equal(want, patch_token_contrast(tokens.mT.contiguous().mT, labels.to(torch.uint8)))
    assert torch.equal(want, patch_token_contrast(tokens, labels))
    assert patch_token_contrast(torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.long)).item() == 0.5
    other = torch.where(labels == 255, -1, labels)
    assert torch.equal(want, patch_token_contrast(tokens, other, ignore_index=-1))


def test_compile_fullgraph():
    tokens, labels = example(dtype=torch.float32)
    run = torch.compile(patch_token_contrast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(tokens, labels), patch_token_contrast(tokens, labels), rtol=1e-6, atol=0)


def test_errors():
    tokens, labels = example()
    with pytest.raises(ValueError, match=r"patch_token_contrast: labels must be \[2, 9\], got \(2, 8\)"):
        patch_token_contrast(tokens, labels[:, 1:])
    with pytest.raises(ValueError, match=r"patch_token_contrast: tokens must be \[B, N, D\]"):
        patch_token_contrast(tokens[0], labels)
    with pytest.raises(TypeError, match="patch_token_contrast: labels must hold integers, got torch.float32"):
        patch_token_contrast(tokens, labels.float())
    with pytest.raises(TypeError, match="patch_token_contrast: tokens must be floating point"):
        patch_token_contrast(tokens.long(), labels)


# N below, at, and above multiples of the group (8), the panel (32) and the strip (64); D odd and above one panel.
@native
@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 65, 200])
@pytest.mark.parametrize("d", [3, 32, 67])
def test_native_equals_reference(b, n, d):
    tokens, labels = bench.example(b, n, d, 0.2)
    if d == 3:  # so few numbers may give any cosine
        tokens = tokens.sign() * torch.tensor([1, 4, 9]) + 0.1 * tokens
    for y in (labels, labels.clamp(0, 0)):  # the second: one class, no negatives, none ignored
        got, want = both(tokens, y)
        assert_near(got, want)
        assert got[1].dtype == torch.float32 and not got[1][y == 255].any()


@native
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_native_labels_of_every_dtype(dtype):
    tokens, labels = bench.example(2, 50, 33, 0.2)
    ignore_index = 99
    labels = torch.where(labels == 255, 99, labels).to(dtype)
    assert_near(*both(tokens, labels, ignore_index=ignore_index))
    if dtype == torch.int64:
        far = torch.where(labels == 99, 99, 2**40 * labels - 5)  # any values, beyond int32 too
        assert_near(both(tokens, far, ignore_index=ignore_index)[0], both(tokens, labels, ignore_index=99)[1])


@native
def test_native_zero_and_tiny_tokens():
    tokens, labels = bench.example(2, 50, 33, 0.2)
    tokens[0, 3], tokens[1, 7:9] = 0, 0
    tokens[0, 5] = 1e-10 * tokens[0, 5]  # norm below eps: divided by eps, no projection
    tokens[1, 2] *= 1e30  # its square overflows fp32
    got, want = both(tokens, labels)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    scale = want[1].norm(dim=2, keepdim=True).clamp_min(1e-300)
    torch.testing.assert_close(got[1].double() / scale, want[1] / scale, rtol=0, atol=1e-5)


@native
def test_native_all_ignored_is_half_with_zero_gradient():
    tokens = bench.example(2, 50, 33, 0)[0]
    loss, gradient = both(tokens, torch.full((2, 50), 255))[0]
    assert loss.item() == 0.5 and torch.equal(gradient, torch.zeros_like(tokens))


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_half(dtype):
    tokens, labels = bench.example(2, 50, 33, 0.2)
    tokens = tokens.to(dtype)
    full = both(tokens.float(), labels)[0]
    loss, gradient = both(tokens, labels)[0]
    assert gradient.dtype == dtype and torch.equal(loss, full[0])
    assert torch.equal(gradient, full[1].to(dtype))
    # a loss scale reaches the gradient before it is rounded to half
    scaled = loss_and_gradient(lambda x: 2.0**14 * patch_token_contrast(x, labels, backend="native"), tokens)[1]
    assert torch.equal(scaled, (2.0**14 * full[1]).to(dtype))


@native
def test_native_without_gradient_gives_the_same_loss():
    tokens, labels = bench.example(2, 150, 33, 0.2)
    loss, gradient = torch.ops.wsss.patch_token_contrast(tokens, labels, 255, False)
    assert gradient.shape == (0,)
    assert torch.equal(loss, torch.ops.wsss.patch_token_contrast(tokens, labels, 255, True)[0])
    with torch.no_grad():
        out = patch_token_contrast(tokens.requires_grad_(), labels, backend="native")
    assert torch.equal(out, loss) and not out.requires_grad
    out = torch.ops.wsss.patch_token_contrast(tokens, labels, 255, False)[0]
    with pytest.raises(RuntimeError, match="with_gradient=False, so it has no gradient"):
        out.backward()


@native
def test_native_layout_scale_and_second_derivative():
    tokens, labels = bench.example(2, 50, 33, 0.2)
    want = both(tokens, labels)[0]
    other = torch.cat([tokens, tokens], 2).mT.contiguous().mT[:, :, :33]
    got = both(other, torch.stack([labels, labels], 2)[..., 0])[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(-3 * patch_token_contrast(tokens, labels), tokens, create_graph=True)
    assert torch.equal(gradient, -3 * want[1])
    with pytest.raises(RuntimeError, match="patch_token_contrast, .* the gradient itself is not differentiable"):
        gradient.sum().backward()


@native
def test_bits_depend_on_neither_threads_nor_run_nor_memory_nor_batch():
    tokens, labels = bench.example(3, 150, 67, 0.2)
    want = both(tokens, labels)[0]
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(both(tokens, labels)[0], want, strict=True))
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert all(torch.equal(a, b) for a, b in zip(both(tokens, labels)[0], want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    for _ in range(20):
        got = loss_and_gradient(lambda x: patch_token_contrast(x, labels, backend="native"), tokens)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # The loss sums over the batch, so its last bit may depend on the order of the images; the gradient's may not.
    got = loss_and_gradient(lambda x: patch_token_contrast(x, labels.flip(0), backend="native"), tokens.flip(0))
    torch.testing.assert_close(got[0], want[0], rtol=2e-7, atol=0)
    assert torch.equal(got[1].flip(0), want[1])


@native
def test_native_compile_autocast_opcheck():
    tokens, labels = bench.example(2, 40, 33, 0.2)
    want = both(tokens, labels)[0]
    run = torch.compile(lambda x, y: 2 * patch_token_contrast(x, y), fullgraph=True, backend="aot_eager")
    got = loss_and_gradient(lambda x: run(x, labels), tokens)
    assert torch.equal(got[0], 2 * want[0]) and torch.equal(got[1], 2 * want[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(tokens, labels)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tokens.requires_grad_()
    torch.library.opcheck(torch.ops.wsss.patch_token_contrast.default, (tokens, labels, 255, True))
    torch.library.opcheck(torch.ops.wsss.patch_token_contrast.default, (tokens.detach(), labels, 255, False))


@native
def test_float64_goes_to_the_reference():
    tokens, labels = example()
    assert patch_token_contrast(tokens, labels).dtype == torch.float64
    with pytest.raises(TypeError, match="patch_token_contrast: tokens must be fp32, bf16 or fp16, got Double"):
        patch_token_contrast(tokens, labels, backend="native")


@native
def test_direct_call_is_checked():
    tokens, labels = torch.zeros(2, 9, 5), torch.zeros(2, 9, dtype=torch.long)
    run = torch.ops.wsss.patch_token_contrast
    with pytest.raises(ValueError, match="patch_token_contrast: tokens must have 3 dimensions"):
        run(tokens[0], labels, 255, False)
    with pytest.raises(ValueError, match=r"patch_token_contrast: labels must be \[2, 9\], got \[2, 8\]"):
        run(tokens, labels[:, 1:], 255, False)
    with pytest.raises(TypeError, match="patch_token_contrast: labels must hold integers, got Bool"):
        run(tokens, labels.bool(), 255, False)


def test_bench_peers_compute_the_same(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 20, 40, 0.3))
    want = bench.run("tiny", torch.device("cpu"), "reference")()
    got = bench.peers("tiny", torch.device("cpu"))["eager"]()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
def test_cuda_equals_reference():
    # tf32 off, the default; bf16 rounds the weights and the result
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        for b, n, d in ((2, 65, 67), (4, 784, 768)):
            tokens, labels = (x.cuda() for x in bench.example(b, n, d, 0.2))
            got, want = both(tokens.to(dtype), labels, "triton")
            assert_near(got, want, tolerance)
            again = both(tokens.to(dtype), labels, "triton")[0]
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
