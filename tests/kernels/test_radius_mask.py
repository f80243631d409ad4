"""radius_mask: disc sizes, exact zeros, gradients, every backend against the reference."""

import math
import os
import subprocess
import sys

import pytest
import torch

from kernels import available_backends, backend, radius_mask
from kernels.radius_mask import reference
from kernels.radius_mask.op import NO_LIMIT, disc_limit

CPU_BACKENDS = available_backends("radius_mask", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
triton = pytest.mark.skipif(not backend.HAS_TRITON, reason="no triton")
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
GRIDS = [(1, 1), (1, 9), (9, 1), (5, 7), (13, 11), (3, 70)]
RADII = [0, 0.5, 1, math.sqrt(2), 2.3, 5, 100]


def kept(radius, metric="euclidean", grid=(13, 13), **options):
    """Number of cells in the disc of the central patch."""
    n = grid[0] * grid[1]
    out = radius_mask(torch.zeros(1, n, n), grid, radius, metric=metric, **options)
    assert set(out.unique().tolist()) <= {0.0, 0.5}
    return int((out[0, n // 2] > 0).sum())


@each_backend
@pytest.mark.parametrize(("radius", "cells"), [(1, 5), (math.sqrt(2), 9), (2, 13), (3, 29), (4, 49), (5, 81)])
def test_pcre_check_6_disc_sizes(radius, cells, backend):
    assert kept(radius, backend=backend) == cells


@each_backend
def test_metrics(backend):
    assert kept(2, "euclidean_open", backend=backend) == 9
    # sqrt(2)^2 is above 2 in floating point
    assert kept(math.sqrt(2), "euclidean_open", backend=backend) == 5
    assert kept(2, "chebyshev", backend=backend) == 25
    assert kept(0, backend=backend) == 1 and kept(0, "chebyshev", backend=backend) == 1
    assert kept(0, "euclidean_open", backend=backend) == 0
    assert kept(100, backend=backend) == 169 and kept(1e200, backend=backend) == 169


def test_integer_limit_is_the_disc_of_the_reference():
    step = torch.arange(0, 64)
    radii = [0, 1e-5, 1e-9, 0.999999999, 4.9999, 1e200, *(math.sqrt(k) for k in range(1, 200)), *range(1, 20)]
    for metric in reference.METRICS:
        distance = torch.maximum(step[:, None], step) if metric == "chebyshev" else step[:, None] ** 2 + step**2
        for radius in radii:
            inside = reference.near(step[:, None], step, radius, metric)
            assert torch.equal(distance <= disc_limit(radius, metric), inside), (radius, metric)
    assert disc_limit(None) == NO_LIMIT and disc_limit(0, "euclidean_open") == -1


@each_backend
def test_kept_set_by_loop(backend):
    h, w, radius = 4, 7, 2.3
    logits = torch.randn(2, h * w, h * w)
    out = radius_mask(logits, (h, w), radius, backend=backend)
    for i in range(h * w):
        for j in range(h * w):
            inside = math.dist(divmod(i, w), divmod(j, w)) <= radius
            want = torch.sigmoid(logits[:, i, j]) if inside else torch.zeros(2)
            torch.testing.assert_close(out[:, i, j], want, rtol=1e-6, atol=0)


@native
@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("grid", [*GRIDS, (28, 28), (40, 40)])
def test_native_equals_reference(grid, metric):
    n = grid[0] * grid[1]
    logits = 4 * torch.randn(1 if n > 500 else 3, n, n)
    weight = torch.randn_like(logits)
    for radius in (5,) if n > 500 else RADII:
        results = []
        for x, name in ((logits, "native"), (logits.double(), "reference")):
            x = x.clone().requires_grad_()
            out = radius_mask(x, grid, radius, metric=metric, backend=name)
            (grad,) = torch.autograd.grad(out, x, weight.to(x.dtype))
            results.append((out.detach(), grad))
        (got, got_grad), (want, want_grad) = results
        assert torch.equal(got != 0, reference.within(grid, radius, metric, got.device).expand_as(got))
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)  # a few roundings of fp32
        # 1 - p cancels where p is near 1: absolute, in units of the weights
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-6, atol=3e-7)
        assert not got_grad[got == 0].any()


@native
def test_native_sigmoid_at_its_ends():
    values = [0.0, 1e-30, 17, 40, 87, 88, 88.5, 88.8, 100, 1e30, math.inf]
    x = torch.tensor(values + [-v for v in values] + [math.nan])
    out = torch.stack([radius_mask(v.view(1, 1, 1), (1, 1), 0, backend="native").squeeze() for v in x])
    # below -87 the result is subnormal, above 1 - 2^-24 it is 1
    torch.testing.assert_close(out.double(), x.double().sigmoid(), rtol=1e-6, atol=1.2e-38, equal_nan=True)
    assert out[x == -math.inf] == 0 and out[x == math.inf] == 1


@each_backend
def test_gradcheck_and_zero_gradient_outside(backend):
    logits = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    run = lambda x: radius_mask(x, (2, 3), 1.0, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, logits)
    assert torch.autograd.gradgradcheck(run, logits)
    bad = torch.full((1, 6, 6), math.inf)
    bad[0, range(6), range(6)] = 0
    bad.requires_grad_()
    radius_mask(bad, (2, 3), 0.0, backend=backend).sum().backward()
    assert torch.equal(bad.grad[0], 0.25 * torch.eye(6))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_layout_empty_repeat(dtype, backend):
    logits = (3 * torch.randn(2, 35, 35)).to(dtype)
    grad = torch.randn(2, 35, 35).to(dtype)
    results = []
    for x in (logits.clone(), logits.clone(), logits.mT.contiguous().mT):
        x.requires_grad_()
        out = radius_mask(x, (5, 7), 2.0, backend=backend)
        assert out.dtype == dtype
        out.backward(grad if len(results) else grad.mT.contiguous().mT)
        results.append((out.detach(), x.grad))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    want = radius_mask(logits.float(), (5, 7), 2.0, backend="reference")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0].float(), want, rtol=eps, atol=0)
    want = grad.float() * (1 - results[0][0].float()) * results[0][0].float()
    # torch rounds the product to half more than once; subnormal halves are 6e-8 apart
    torch.testing.assert_close(results[0][1].float(), want, rtol=2 * eps, atol=1e-7)
    assert radius_mask(logits[:0], (5, 7), 1.0, backend=backend).shape == (0, 35, 35)
    assert radius_mask(logits[:, :0, :0], (0, 7), 1.0, backend=backend).shape == (2, 0, 0)


@each_backend
def test_compile_fullgraph(backend):
    logits = torch.randn(2, 6, 6, requires_grad=True)
    run = torch.compile(lambda x: radius_mask(x, (2, 3), 1.5, backend=backend) * 2, fullgraph=True, backend="aot_eager")
    want = radius_mask(logits, (2, 3), 1.5, backend=backend) * 2
    assert torch.equal(run(logits), want)
    grads = [torch.autograd.grad(out.sum(), logits)[0] for out in (run(logits), want)]
    assert torch.equal(*grads)


@native
def test_bits_depend_on_neither_threads_nor_batch_nor_memory():
    logits = torch.randn(3, 130, 130, requires_grad=True)

    def run(x):
        out = radius_mask(x, (10, 13), 3.0, backend="native")
        return [out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))]

    want = run(logits)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(run(logits), want, strict=True))
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert all(torch.equal(a, b) for a, b in zip(run(logits), want, strict=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(run(logits[1:2]), want, strict=True))


@native
def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(2, 6, 6, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.wsss.radius_mask.default, (logits, 2, 3, 1, False))
        args = (torch.randn(2, 6, 6, dtype=dtype), torch.rand(2, 6, 6, dtype=dtype), 2, 3, 1, True)
        torch.library.opcheck(torch.ops.wsss.radius_mask_backward.default, args)


@native
def test_direct_call_is_checked():
    with pytest.raises(TypeError, match="radius_mask: logits must be floating point"):
        torch.ops.wsss.radius_mask(torch.zeros(1, 6, 6).int(), 2, 3, 1, False)
    with pytest.raises(ValueError, match=r"radius_mask: logits must be \[B, N, N\]"):
        torch.ops.wsss.radius_mask(torch.zeros(1, 6, 5), 2, 3, 1, False)
    with pytest.raises(ValueError, match=r"radius_mask: grid must have h \* w = 6 patches, got \(2, 2\)"):
        torch.ops.wsss.radius_mask(torch.zeros(1, 6, 6), 2, 2, 1, False)
    with pytest.raises(ValueError, match="radius_mask_backward: grad must be"):
        torch.ops.wsss.radius_mask_backward(torch.zeros(2, 6, 6), torch.zeros(1, 6, 6), 2, 3, 1, False)
    with pytest.raises(TypeError, match="radius_mask_backward: grad must be"):
        torch.ops.wsss.radius_mask_backward(torch.zeros(1, 6, 6).double(), torch.zeros(1, 6, 6), 2, 3, 1, False)


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
    with pytest.raises(ValueError, match="radius_mask: backend 'triton' cannot run on cpu: triton needs a CUDA device"):
        radius_mask(logits, (2, 3), 1.0, backend="triton")


@triton
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("chebyshev", [False, True])
def test_triton_compiles_for_sm_90(dtype, chebyshev):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.radius_mask import triton_impl

    for kernel, pointers in (
        (triton_impl._forward_kernel, ("logits", "out")),
        (triton_impl._backward_kernel, ("grad", "out", "result")),
    ):
        signature = dict.fromkeys(pointers, f"*{dtype}") | {"width": "i32", "patches": "i32", "limit": "i64"}
        constants = {"CHEBYSHEV": chebyshev, "BLOCK": triton_impl.BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        built = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert len(built.asm["cubin"]) > 0


INTERPRETED = """
import torch
from kernels import radius_mask
from kernels.radius_mask import reference, triton_impl
from kernels.radius_mask.op import _triton

triton_impl.BLOCK = 8  # several blocks a row
torch.manual_seed(0)
n = 3 * 5
for radius, metric in ((0.0, "euclidean_open"), (2.3, "euclidean"), (1.0, "chebyshev")):
    results = []
    x, weight = torch.randn(1, n, n), torch.randn(1, n, n)
    for run, dtype in ((_triton, torch.float32), (reference.radius_mask, torch.float64)):
        y = x.to(dtype).requires_grad_()
        out = run(y, (3, 5), radius, metric)
        results.append((out.detach().double(), torch.autograd.grad(out, y, weight.to(dtype))[0].double()))
    assert torch.equal(results[0][0] > 0, results[1][0] > 0)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-7)
checks = ("test_schema", "test_autograd_registration", "test_faketensor")
args = (torch.randn(1, 4, 4, requires_grad=True), 2, 2, 1, False)
torch.library.opcheck(triton_impl.radius_mask, args, test_utils=checks)
y = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda t: _triton(t, (1, 2), 1.0, "euclidean"), y)
half = torch.randn(1, 6, 6).bfloat16()
want = radius_mask(half, (2, 3), 1.0, backend="reference")
torch.testing.assert_close(_triton(half, (2, 3), 1.0, "euclidean"), want, rtol=2**-7, atol=0)
assert _triton(half[:0], (2, 3), 1.0, "euclidean").shape == (0, 6, 6)
"""


@triton
def test_triton_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("metric", reference.METRICS)
def test_cuda_equals_reference(name, metric):
    for grid in (*GRIDS, (40, 40)):
        n = grid[0] * grid[1]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, n, n, device="cuda").to(dtype).requires_grad_()
            got, want = (radius_mask(x, grid, 2.3, metric=metric, backend=b) for b in (name, "reference"))
            assert torch.equal(got > 0, want > 0)
            grads = [torch.autograd.grad(out.sum(), x)[0] for out in (got, want)]
            tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
            torch.testing.assert_close(got, want, **tolerance)
            torch.testing.assert_close(*grads, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
