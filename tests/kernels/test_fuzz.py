"""Random arguments for every native CPU op. Public functions: good arguments give finite results that agree with the
reference, bad ones raise. WSSS_FUZZ_EXAMPLES=10000 sets the number of examples of each test (CONTRIBUTING.md).
"""

import contextlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kernels
from kernels import available_backends
from kernels.backend import AUTO
from tests.kernels.fuzzing import (
    FLOATS,
    INTEGERS,
    METRICS,
    RADII,
    SIZES,
    anything,
    bools,
    fuzz,
    or_other,
    tensors,
    threads,
)

FINITE = ("tame", "unit", "zero", "steps", "huge", "denormal")
HALF_OR_SINGLE = FLOATS[:3]
pytestmark = pytest.mark.skipif("native" not in available_backends("par"), reason="kernels._C is not built")


def call(op, *args, spoil=None, backend="native", **kwargs):
    """The result of the public `op`. With `spoil` (index, other value) one argument is wrong, most likely: then an
    exception of the right kind is fine, and None comes back."""
    if spoil is None:
        return getattr(kernels, op)(*args, backend=backend, **kwargs)
    args = [*args[: spoil[0]], spoil[1], *args[spoil[0] + 1 :]]
    with contextlib.suppress(ValueError, TypeError):
        return getattr(kernels, op)(*args, backend=backend, **kwargs)
    return None


def spoils(count):
    """None, or now and then the index of one of the first `count` arguments, tensors, and what to put in its place."""
    other = anything() | st.sampled_from((None, [], 1.5, "x"))
    return or_other(st.none(), st.tuples(st.integers(0, count - 1), other))


def same(got, want, rtol, atol):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


def all_finite(*xs):
    assert all(x.isfinite().all() for x in xs)


def test_every_native_op_is_here():
    assert {op for op in AUTO if "native" in AUTO[op].get("cpu", ())} == {
        name.removeprefix("test_fuzz_") for name in globals() if name.startswith("test_fuzz_")
    }


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_par(data, count, spoil):
    b, c, h, w = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 5), SIZES, st.integers(0, 35)))
    kinds = data.draw(st.sampled_from((("unit",), FINITE)))
    image = data.draw(tensors((b, 3, h, w), kinds, HALF_OR_SINGLE))
    maps = data.draw(tensors((b, c, h, w), kinds, HALF_OR_SINGLE))
    assume(image.isfinite().all() and maps.isfinite().all())
    dilations = data.draw(st.lists(st.sampled_from((1, 2, 3, 8, 24, 2**31 - 1)), min_size=1, max_size=4))
    options = {"dilations": dilations, "iterations": data.draw(st.integers(0, 3))}
    with threads(count):
        out = call("par", image, maps, spoil=spoil, **options)
    if spoil is not None:
        return
    assert out.shape == (b, c, h, w) and out.dtype == torch.float32
    all_finite(out)
    if kinds == ("unit",):
        same(out, kernels.par(image.double(), maps.double(), backend="reference", **options), 0, 1e-5)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_dense_crf(data, count, spoil):
    b, k, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 12), SIZES, st.integers(0, 20)))
    kinds = data.draw(st.sampled_from((("tame",), FINITE)))
    unary = data.draw(tensors((b, k, h, w), kinds, HALF_OR_SINGLE))
    image = data.draw(tensors((b, 3, h, w), ("unit",), (*HALF_OR_SINGLE, torch.uint8))) * 200
    assume(unary.isfinite().all())
    sizes = data.draw(st.none() | st.lists(st.tuples(st.integers(0, h), st.integers(0, w)), min_size=b, max_size=b))
    sigma = st.sampled_from((0.5, 3.0, 80.0, 1e20))
    options = {
        "spatial": data.draw(st.tuples(sigma, st.sampled_from((0.0, 3.0)))),
        "bilateral": data.draw(st.tuples(sigma, sigma, st.sampled_from((0.0, 4.0)))),
        "iterations": data.draw(st.integers(0, 3)),
        "prune": data.draw(st.sampled_from((0.0, 0.0, 1e-3, 0.1))),
        "mode": data.draw(st.sampled_from(("fast", "ring", "exact"))),
        "sizes": sizes,
    }
    with threads(count):
        q = call("dense_crf", unary, image, spoil=spoil, **options)
    if spoil is not None:
        return
    assert q.shape == unary.shape and q.dtype == torch.float32
    inside = torch.zeros(b, h, w)
    for i, (own_h, own_w) in enumerate(sizes or [(h, w)] * b):
        inside[i, :own_h, :own_w] = 1
    same(q.sum(1), inside, 0, 2e-6)
    assert (q >= 0).all()
    if kinds == ("tame",) and options["prune"] == 0:
        # A weight of 7 in the exponent turns rounding errors of 1e-6 in a message into up to 1e-4 after three sweeps.
        same(q, kernels.dense_crf(unary.float(), image.float(), backend="reference", **options), 0, 2e-4)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(4))
def test_fuzz_dense_energy(data, count, spoil):
    b, k, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 10), SIZES, SIZES))
    assume(min(b, k, h, w) > 0 or max(h, w) > 0)
    probs = data.draw(tensors((b, k, h, w), ("unit", "zero", "denormal"), HALF_OR_SINGLE)).detach().requires_grad_()
    image = data.draw(tensors((b, 3, h, w), ("unit", "zero"), HALF_OR_SINGLE)) * 200
    roi = data.draw(bools((b, h, w), 0.8)) > 0
    labels = torch.where(data.draw(bools((b, h, w))), 255, 1)
    sigma = st.sampled_from((2.0, 15.0, 100.0, 1e20))
    options = {
        "sigma_rgb": data.draw(sigma),
        "sigma_xy": data.draw(sigma),
        "scale_factor": data.draw(st.sampled_from((1e-3, 0.3, 0.5, 1.0))),
        "scale": data.draw(st.sampled_from(("lattice", "lattice", "true"))),
    }
    with threads(count):
        value = call("dense_energy", probs, image, roi, labels, spoil=spoil, **options)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(value, probs)
    assert value.shape == () and grad.shape == probs.shape and grad.dtype == probs.dtype
    all_finite(value, grad)
    twin = probs.detach().float().requires_grad_()
    want = kernels.dense_energy(twin, image, roi, labels, backend="reference", **options)
    same(value, want, 1e-4, 1e-12)
    # The gradient comes in the dtype of `probs`; bf16 keeps 8 bits of it, and fp16 has steps of 6e-8.
    same(grad, *torch.autograd.grad(want, twin), 1e-4 if probs.dtype == torch.float32 else 1e-2, 1e-7)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_random_walk(data, count, spoil):
    b, c, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 6), SIZES, st.integers(0, 35)))
    seeds = data.draw(tensors((b, c, h, w), FINITE, HALF_OR_SINGLE))
    assume(seeds.isfinite().all())
    seeds = seeds.detach().requires_grad_()
    edges = data.draw(tensors((b, h, w), ("unit", "steps", "zero"), HALF_OR_SINGLE)).clamp(0, 1)
    options = {
        "radius": data.draw(st.sampled_from((1, 2, 5, 16))),
        "beta": data.draw(st.sampled_from((0.1, 1.0, 10.0, 1e6))),
        "log2_steps": data.draw(st.sampled_from((0, 1, 4, 7))),
        "method": data.draw(st.sampled_from(("chebyshev", "stepped"))),
    }
    with threads(count):
        out = call("random_walk", seeds, edges, spoil=spoil, **options)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(out.sum(), seeds)
    assert out.shape == seeds.shape and out.dtype == torch.float32 and grad.shape == seeds.shape
    all_finite(out, grad)
    if seeds.numel() == 0:
        return
    top = seeds.detach().abs().max().float()
    assert out.abs().max() <= top * (1 + 1e-4) + 1e-30  # weighted means
    want = kernels.random_walk(seeds.double(), edges.double(), backend="reference", **options)
    same(out, want, 0, 1e-4 * top.item() + 1e-30)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(1))
def test_fuzz_radius_mask(data, count, spoil):
    b, h, w = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 6)))
    kinds = data.draw(st.sampled_from((FINITE, ("broken",))))
    logits = data.draw(tensors((b, h * w, h * w), kinds, FLOATS)).detach().requires_grad_()
    radius, options = data.draw(RADII), {"metric": data.draw(METRICS)}
    with threads(count):
        out = call("radius_mask", logits, (h, w), radius, spoil=spoil, **options)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(out, logits, torch.ones_like(out))
    twin = logits.detach().double().requires_grad_()
    want = kernels.radius_mask(twin, (h, w), radius, backend="reference", **options)
    assert out.shape == logits.shape and out.dtype == grad.dtype == logits.dtype
    eps = max(torch.finfo(logits.dtype).eps, 1e-6 if logits.dtype == torch.float32 else 0)
    torch.testing.assert_close(out.double(), want, rtol=eps, atol=1e-7, equal_nan=True)
    # 1 - y of a y that was rounded
    torch.testing.assert_close(
        grad.double(), *torch.autograd.grad(want, twin, torch.ones_like(want)), rtol=0, atol=2 * eps, equal_nan=True
    )


@fuzz
@given(st.data(), st.integers(1, 2), spoils(1))
def test_fuzz_dilate_regions(data, count, spoil):
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 12), SIZES, st.integers(0, 9) | st.integers(55, 140)))
    seeds = data.draw(bools(shape, data.draw(st.sampled_from((0.0, 0.02, 0.5, 1.0)))))
    radius, options = data.draw(RADII), {"metric": data.draw(METRICS)}
    with threads(count):
        out = call("dilate_regions", seeds, radius, spoil=spoil, **options)
    if spoil is None:
        assert torch.equal(out, kernels.dilate_regions(seeds, radius, backend="reference", **options))


@st.composite
def selections(draw):
    """Arguments and options of select_regions."""
    b, h, w, c = draw(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 6), st.integers(0, 20)))
    logits = draw(tensors((b, h * w, h * w), ("tame", "steps", "huge", "broken"), FLOATS))
    scores = draw(tensors((b, h * w, c), ("unit", "steps", "tame", "denormal", "broken"), FLOATS))
    present = draw(tensors((b, c), ("tame", "unit"), (torch.float32, torch.bool, torch.int64)))
    ends = sorted(draw(st.tuples(*[st.sampled_from((0.0, 0.3, 0.5, 1.0))] * 2)))
    return (logits, scores, present), {
        "grid": (h, w),
        "radius": draw(st.none() | RADII),
        "tau": draw(st.sampled_from((1e-6, 0.5, 0.7, 0.999))),
        "overlap": tuple(ends),
        "max_seeds": draw(st.sampled_from((1, 2, 5, 40))),
        "top": draw(st.sampled_from((1, 3, 300))),
    }


@fuzz
@given(selections(), st.integers(1, 2), spoils(3))
def test_fuzz_select_regions(case, count, spoil):
    args, options = case
    with threads(count):
        got = call("select_regions", *args, spoil=spoil, **options)
    if spoil is None:
        want = kernels.select_regions(*args, backend="reference", **options)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@fuzz
@given(st.data(), st.integers(1, 2), spoils(1))
def test_fuzz_max_upsampled_masks(data, count, spoil):
    b, h, w, p = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)))
    n, p = h * w, p if b else 0
    logits = data.draw(tensors((b, n, n), FINITE, FLOATS))
    assume(logits.isfinite().all())
    logits = logits.detach().requires_grad_()
    pairs = torch.tensor(data.draw(st.lists(st.integers(0, max(b - 1, 0)), min_size=p, max_size=p)), dtype=torch.int64)
    members = data.draw(bools((p, n), data.draw(st.sampled_from((0.0, 0.1, 1.0)))))
    selection = kernels.RegionSelection(torch.stack([pairs, 0 * pairs], 1), members, None)
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    options = {"grid": (h, w), "size": size, "radius": data.draw(st.none() | RADII)}
    with threads(count):
        out = call("max_upsampled_masks", logits, selection, spoil=spoil, **options)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(out, logits, torch.ones_like(out))
    assert out.shape == (p, *size) and grad.shape == logits.shape and grad.dtype == logits.dtype
    all_finite(out, grad)
    if n > 0:
        twin = logits.detach().double()
        same(out, kernels.max_upsampled_masks(twin, selection, backend="reference", **options), 0, 2e-6)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_patch_token_contrast(data, count, spoil):
    b, n, d = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 40)))
    tokens = data.draw(tensors((b, n, d), ("tame", "unit", "zero"), HALF_OR_SINGLE)).detach().requires_grad_()
    labels = data.draw(tensors((b, n), ("steps",), INTEGERS))
    ignore = data.draw(st.sampled_from((0, 1, 255)))
    with threads(count):
        loss = call("patch_token_contrast", tokens, labels, spoil=spoil, ignore_index=ignore)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(loss, tokens)
    assert loss.shape == () and grad.shape == tokens.shape and grad.dtype == tokens.dtype
    all_finite(loss, grad)
    want = kernels.patch_token_contrast(tokens.double(), labels, ignore_index=ignore, backend="reference")
    same(loss, want, 1e-6, 1e-6)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(4))
def test_fuzz_class_patch_contrast(data, count, spoil):
    b, c, n, d = data.draw(st.tuples(*(st.integers(0, high) for high in (3, 20, 70, 40))))
    tokens = data.draw(tensors((b, c, d), ("tame", "unit", "zero"), HALF_OR_SINGLE)).detach().requires_grad_()
    patches = data.draw(tensors((b, n, d), ("tame", "unit", "zero"), HALF_OR_SINGLE))
    labels, present = data.draw(tensors((b, n), ("steps",), INTEGERS)), data.draw(bools((b, c), 0.5))
    with threads(count):
        loss = call("class_patch_contrast", tokens, patches, labels, present, spoil=spoil)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(loss, tokens)
    assert loss.shape == () and grad.shape == tokens.shape and grad.dtype == tokens.dtype
    all_finite(loss, grad)
    want = kernels.class_patch_contrast(tokens.double(), patches.double(), labels, present, backend="reference")
    same(loss, want, 1e-6, 1e-6)


def edge_labels(b, h, w):
    """Few labels, 3 stands for an ignored one."""
    return tensors((b, h, w), ("steps", "zero", "unit"), INTEGERS).map(lambda x: x.long().remainder(4).to(x.dtype))


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_path_affinity_loss(data, count, spoil):
    b, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 45)))
    logits = data.draw(tensors((b, h, w), FINITE, HALF_OR_SINGLE))
    assume(logits.isfinite().all())
    logits, labels = logits.detach().requires_grad_(), data.draw(edge_labels(b, h, w))
    options = {"radius": data.draw(st.sampled_from((1, 2, 3, 5, 10, 16))), "ignore_index": 3}
    if data.draw(st.booleans()):
        options["counts"] = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3)))
    with threads(count):
        loss = call("path_affinity_loss", logits, labels, spoil=spoil, **options)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss.shape == () and grad.shape == logits.shape and grad.dtype == logits.dtype
    all_finite(loss, grad)
    twin = logits.detach().float().requires_grad_()
    want = kernels.path_affinity_loss(twin, labels, backend="reference", **options)
    same(loss, want, 1e-6, 1e-12)
    # The gradient comes in the dtype of the logits; bf16 keeps 8 bits of it, and fp16 has steps of 6e-8.
    same(grad, *torch.autograd.grad(want, twin), 1e-6 if logits.dtype == torch.float32 else 1e-2, 1e-7)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(1))
def test_fuzz_path_affinity_counts(data, count, spoil):
    b, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 150)))
    labels = data.draw(edge_labels(b, h, w))
    options = {"radius": data.draw(st.sampled_from((1, 2, 3, 5, 10, 16))), "ignore_index": 3}
    with threads(count):
        out = call("path_affinity_counts", labels, spoil=spoil, **options)
    if spoil is None:
        assert torch.equal(out, kernels.path_affinity_counts(labels, backend="reference", **options))


@fuzz
@given(st.data(), st.integers(1, 2), spoils(4))
def test_fuzz_psl_loss(data, count, spoil):
    b, k, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 24), SIZES, st.integers(0, 45)))
    logits = data.draw(tensors((b, k, h, w), FINITE, HALF_OR_SINGLE))
    assume(logits.isfinite().all())
    confidences = data.draw(tensors((b, k - 1), ("unit", "zero"), HALF_OR_SINGLE))
    labels = data.draw(tensors((b, h, w), ("steps", "zero", "unit"), INTEGERS)).long().remainder(k + 1)
    rest = confidences, labels, data.draw(bools((b, k - 1), 0.6))
    logits = logits.detach().requires_grad_()
    with threads(count):
        out = call("psl_loss", logits, *rest, spoil=spoil, ignore_index=k)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad((out.labelled + out.online).sum(), logits)
    assert out.labelled.shape == (b,) and out.mask.shape == (b, h, w)
    assert grad.shape == logits.shape and grad.dtype == logits.dtype
    all_finite(out.labelled, out.online, grad)
    twin = logits.detach().float().requires_grad_()
    want = kernels.psl_loss(twin, *rest, ignore_index=k, backend="reference")
    assert all(torch.equal(x, y) for x, y in zip(out[2:], want[2:], strict=True))
    for x, y in zip(out[:2], want[:2], strict=True):
        same(x, y, 1e-5, 1e-5)
    # The gradient comes in the dtype of the logits; bf16 keeps 8 bits of it, and fp16 has steps of 6e-8.
    (own,) = torch.autograd.grad((want.labelled + want.online).sum(), twin)
    same(grad, own, 1e-5 if logits.dtype == torch.float32 else 1e-2, 2e-6)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_erase(data, count, spoil):
    b, height, width = data.draw(st.tuples(st.integers(0, 3), SIZES, st.integers(0, 35)))
    h, w = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    kinds = data.draw(st.sampled_from((("tame", "steps"), FINITE)))
    images = data.draw(tensors((b, 3, height, width), kinds, FLOATS))
    maps = data.draw(tensors((b, h, w), kinds, FLOATS)).detach().requires_grad_()
    assume(images.isfinite().all() and maps.isfinite().all())
    threshold = data.draw(st.sampled_from((0.0, 0.2, 0.5, 1.0)))
    with threads(count):
        kept = call("erase_hard", images, maps, threshold=threshold, spoil=spoil)
        out = call("erase_soft", images, maps, spoil=spoil)
        if spoil is not None:
            return
        (grad,) = torch.autograd.grad(out.float(), maps, torch.full(out.shape, 1e-2))
    assert out.shape == kept.shape == images.shape and out.dtype == kept.dtype == images.dtype
    assert ((kept == 0) | (kept == images)).all() and grad.shape == maps.shape and grad.dtype == maps.dtype
    all_finite(out)
    twin = maps.detach().double().requires_grad_()
    want = kernels.erase_soft(images.double(), twin, backend="reference")
    eps = 2 * max(torch.finfo(images.dtype).eps, 0 if maps.dtype == torch.float64 else 2e-6)
    same(out, want, 0, eps * images.detach().double().abs().max().item() + 1e-30 if images.numel() else 0)
    if kinds != FINITE and maps.dtype == torch.float32 == images.dtype:
        # Where values tie in fp64, those of fp32 may not, and the gradient through the maximum goes to other cells.
        ones = torch.full(out.shape, 1e-2, dtype=torch.float64)
        (theirs,) = torch.autograd.grad(want, twin, ones)
        same(grad.sum(), theirs.sum(), 1e-4, 1e-4)


@fuzz
@given(st.data(), st.integers(1, 2), spoils(2))
def test_fuzz_c2am_pool(data, count, spoil):
    b, d, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 6), st.integers(1, 6)))
    kinds = data.draw(st.sampled_from((("tame",), FINITE)))
    features = data.draw(tensors((b, d, h, w), kinds, FLOATS)).detach().requires_grad_()
    logits = data.draw(tensors((b, 1, h, w), kinds, FLOATS)).detach().requires_grad_()
    assume(features.isfinite().all() and logits.isfinite().all())
    with threads(count):
        out = call("c2am_pool", features, logits, spoil=spoil)
        if spoil is not None:
            return
        grads = torch.autograd.grad(out, (features, logits), [torch.ones_like(x) / (k + 1) for k, x in enumerate(out)])
    for grad, x in zip(grads, (features, logits), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
    all_finite(*out)
    want = kernels.c2am_pool(features.double(), logits.double(), backend="reference")
    scale = features.detach().double().abs().max().item() if features.numel() else 0
    for ours, theirs in zip(out, want, strict=True):
        assert ours.shape == (b, d)
        same(ours, theirs, 0, 2e-6 * scale + 1e-30)
