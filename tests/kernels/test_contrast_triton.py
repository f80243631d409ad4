"""The Triton kernels of the two contrast losses: they compile for sm_90 and are right in the interpreter."""

import os
import subprocess
import sys

import pytest

from kernels import backend

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="no triton")


# PAIRED off is class_patch_contrast. Compiling takes seconds, so each dtype meets one of the two.
@pytest.mark.parametrize(("dtype", "paired"), [("fp32", True), ("fp32", False), ("bf16", True), ("fp16", False)])
def test_triton_compiles_for_sm_90(dtype, paired):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.patch_token_contrast import triton_impl as t

    tokens = {"x": f"*{dtype}", "y": f"*{dtype}", "x_norm": "*fp32", "y_norm": "*fp32"}
    labels = {"labels": "*i64", "present": "*i64" if paired else "*i1", "ignore": "i32"}
    sizes = dict.fromkeys(("m", "n", "d", "tiles_n"), "i32")
    rest = {"codes": "*u8", "row_sums": "*fp32"}
    shared = {"PAIRED": paired, "HALF": dtype != "fp32", "PRECISION": "ieee", "EPS": 1e-8, "BLOCK": t.BLOCK}
    pairs = tokens | labels | rest | {"tile_sums": "*fp32", "tile_counts": "*i32"} | sizes
    gradient = tokens | labels | rest | {"weights": "*fp32", "gradient": "*fp32"} | sizes
    total = {"tile_sums": "*fp32", "tile_counts": "*i32", "loss": "*fp32", "weights": "*fp32", "count": "i32"}
    for kernel, signature, constants in (
        (t._norm_kernel, {"x": f"*{dtype}", "norm": "*fp32", "d": "i32"}, {"BLOCK": 256}),
        (t._pairs_kernel, pairs, shared | {"GRADIENT": True, "BLOCK_D": t.BLOCK_D}),
        (t._total_kernel, total, {"FACTOR": 1.0, "BLOCK": t.BLOCK_TILES}),
        (t._gradient_kernel, gradient, shared | {"BLOCK_OUT": t.BLOCK_OUT}),
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        built = compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(built.asm["cubin"]) > 0 and built.metadata.shared <= 227 * 1024


INTERPRETED = """
import torch
from kernels.class_patch_contrast import op as class_op, reference as class_reference
from kernels.patch_token_contrast import op, reference, triton_impl
from kernels.patch_token_contrast.bench import example, loss_and_gradient

# several tiles, steps and programs in small tensors
triton_impl.BLOCK, triton_impl.BLOCK_D, triton_impl.BLOCK_OUT, triton_impl.BLOCK_TILES = 16, 16, 16, 4


def near(got, want, tolerance):
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance / 10, atol=0)
    assert (got[1].double() - want[1]).norm() <= tolerance * want[1].norm()


def compare(ours, plain, tokens, rest, tolerance=1e-5):
    wide = [x.double() if x.is_floating_point() else x for x in rest]
    want = loss_and_gradient(lambda x: plain(x, *wide, 255), tokens.double())
    near(loss_and_gradient(lambda x: ours(x, *rest, 255), tokens), want, tolerance)


for b, n, d in ((2, 37, 21), (1, 1, 3)):
    x, y = example(b, n, d, 0.2)
    x[0, 0] = 0
    compare(op._triton, reference.patch_token_contrast, x, [y])
    z, present = example(b, 19, d, 0)[0], torch.arange(19 * b).view(b, 19) % 3 > 0
    compare(class_op._triton, class_reference.class_patch_contrast, z, [x, y, present])
assert op._triton(x[:0], y[:0], 255) == 0.5
loss, gradient = loss_and_gradient(lambda t: op._triton(t, torch.full_like(y, 255), 255), x)
assert loss == 0.5 and not gradient.any()
x, y = example(2, 37, 21, 0.2)
want = loss_and_gradient(lambda t: op._triton(t, y, 255), x)[0]
with torch.no_grad():
    assert torch.equal(op._triton(x, y, 255), want)
triton_impl.HALF_PRODUCTS = False  # the interpreter would multiply bf16 as integers
for dtype in (torch.bfloat16, torch.float16):  # the gradient is rounded to half
    compare(op._triton, reference.patch_token_contrast, x.to(dtype), [y.to(torch.uint8)], torch.finfo(dtype).eps)
z, present = example(2, 9, 21, 0)[0], torch.arange(18).view(2, 9) % 3 > 0
compare(class_op._triton, class_reference.class_patch_contrast, z, [x.bfloat16(), y, present])  # mixed
checks = ("test_schema", "test_autograd_registration", "test_faketensor")
args = (x.requires_grad_(), y, 255, True)
torch.library.opcheck(triton_impl.patch_token_contrast, args, test_utils=checks)
"""


def test_triton_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
