"""dense_crf: exact mode against matrices in fp64, fast mode against the same iteration over the lattice and against
pydensecrf where it is installed; native code against the reference; unary recipes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import available_backends, dense_crf, dense_crf_unary
from kernels.lattice import Lattice


def scene(b, k, h, w):
    """An 8-bit image of two flat regions plus noise, and blocky unaries that roughly follow it."""
    image = torch.full((b, 3, h, w), 60.0)
    image[..., w // 2 :] = 170.0
    image = (image + 8 * torch.randn(b, 3, h, w)).clamp(0, 255).round().to(torch.uint8)
    scores = F.interpolate(2 * torch.randn(b, k, 4, 4), (h, w))
    scores[:, 0, :, : w // 2] += 1.0
    scores[:, 1, :, w // 2 :] += 1.0
    return -scores.log_softmax(1), image


def mean_field(unary, image, spatial, bilateral, iterations, kernel_sums):
    """The iteration with the kernels as dense matrices or as functions; one image, [K, H, W] fp64."""
    k, h, w = unary.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([x, y], -1).reshape(-1, 2).double()
    colour = image.permute(1, 2, 0).reshape(-1, 3).double()
    features = [place / spatial[0], torch.cat([place / bilateral[0], colour / bilateral[1]], 1)]
    negative = -unary.reshape(k, -1).t().double()
    q = negative.softmax(1)
    for _ in range(iterations):
        total = negative.clone()
        for f, weight in zip(features, (spatial[1], bilateral[2]), strict=True):
            norm = (kernel_sums(f, torch.ones(h * w, 1, dtype=torch.float64)) + 1e-20).rsqrt()
            total += weight * norm * kernel_sums(f, norm * q)
        q = total.softmax(1)
    return q.t().reshape(k, h, w)


def dense_sums(f, v):
    return torch.exp(-0.5 * (f[:, None] - f[None]).square().sum(2)) @ v


def lattice_sums(f, v):
    return Lattice(f).filter(v)


SETTINGS = {"spatial": (3.0, 3.0), "bilateral": (20.0, 13.0, 10.0), "iterations": 4}


def test_pcre_check_12_exact_mode_agrees_with_the_oracle():
    unary, image = scene(1, 3, 11, 14)
    want = mean_field(unary[0], image[0], **SETTINGS, kernel_sums=dense_sums)
    got = dense_crf(unary.double(), image, **SETTINGS, mode="exact")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-12)
    # fp32: the exponents reach 30, so probabilities carry up to 30 units of 1e-7
    assert (dense_crf(unary, image, **SETTINGS, mode="exact")[0] - want).abs().max() < 1e-5


def test_fast_mode_is_the_iteration_over_the_lattice():
    unary, image = scene(1, 3, 23, 18)
    want = mean_field(unary[0], image[0], **SETTINGS, kernel_sums=lattice_sums)
    torch.testing.assert_close(dense_crf(unary.double(), image, **SETTINGS)[0], want, rtol=0, atol=1e-12)
    assert (dense_crf(unary, image, **SETTINGS)[0] - want).abs().max() < 1e-3  # fp32 vertices at rounding ties


def test_pcre_check_12_uniform_stays_uniform():
    image = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    for mode in ("fast", "ring", "exact"):
        q = dense_crf(torch.full((1, 2, 16, 16), math.log(2)), image, mode=mode)
        torch.testing.assert_close(q, torch.full_like(q, 0.5), rtol=0, atol=1e-6)


def test_pcre_check_12_large_spatial_weight_smooths():
    probs = torch.full((1, 2, 16, 16), 0.2)
    probs[:, 0] = 0.8
    probs[:, :, 8, 8] = probs[:, :, 8, 8].flip(1)  # one pixel of the other class
    image = (torch.rand(1, 3, 16, 16) * 255).to(torch.uint8)
    for mode in ("fast", "ring", "exact"):
        kept = dense_crf(-probs.log(), image, spatial=(3.0, 0.0), bilateral=(80.0, 13.0, 0.0), mode=mode)
        assert kept[0, :, 8, 8].argmax() == 1
        smooth = dense_crf(-probs.log(), image, spatial=(3.0, 10.0), bilateral=(80.0, 13.0, 0.0), mode=mode)
        assert smooth[0, :, 8, 8].argmax() == 0


def test_fast_and_exact_give_nearly_the_same_labels():
    unary, image = scene(1, 4, 40, 48)
    fast, exact = (dense_crf(unary, image, mode=m).argmax(1) for m in ("fast", "exact"))
    assert (fast != exact).float().mean() < 0.03  # the lattice filter is off by 2 to 4 %; flips sit at boundaries
    assert (exact != unary.argmin(1)).float().mean() > 0.03  # and the CRF does change labels


def test_noise_is_removed_along_the_edge():
    _, image = scene(1, 2, 40, 40)
    truth = (torch.arange(40) >= 20).long().expand(40, 40)
    noisy = torch.where(torch.rand(40, 40) < 0.2, 1 - truth, truth)
    assert torch.equal(dense_crf(dense_crf_unary(noisy[None], 2), image)[0].argmax(0), truth)


def test_equals_pydensecrf():
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    unary, image = scene(1, 5, 37, 52)
    peer = densecrf.DenseCRF2D(52, 37, 5)
    peer.setUnaryEnergy(unary[0].reshape(5, -1).contiguous().numpy())
    peer.addPairwiseGaussian(sxy=3, compat=3)
    peer.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image[0].permute(1, 2, 0).contiguous().numpy(), compat=10)
    want = torch.tensor(np.array(peer.inference(10))).reshape(5, 37, 52)
    assert (dense_crf(unary, image)[0] - want).abs().max() < 1e-3  # both fp32; vertices at rounding ties may differ


@pytest.mark.parametrize("backend", available_backends("dense_crf", "cpu"))
@pytest.mark.parametrize("mode", ["fast", "ring", "exact"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (2, 3, 1, 9), (2, 3, 9, 1), (1, 2, 1, 1), (0, 2, 4, 4), (1, 2, 0, 4)])
def test_odd_shapes(mode, shape, backend):
    b, k, h, w = shape
    q = dense_crf(torch.rand(shape), torch.rand(b, 3, h, w) * 255, mode=mode, backend=backend)
    assert q.shape == shape
    torch.testing.assert_close(q.sum(1), torch.ones(b, h, w), rtol=0, atol=1e-5)


def test_batch_layout_dtype_repeat():
    unary, image = scene(3, 2, 12, 17)
    want = dense_crf(unary, image)
    assert torch.equal(want, dense_crf(unary, image))
    assert torch.equal(want[2:], dense_crf(unary[2:], image[2:]))
    assert torch.equal(want, dense_crf(unary.mT.contiguous().mT, image.float()))
    half = dense_crf(unary.bfloat16(), image)
    assert half.dtype == torch.float32 and torch.equal(half, dense_crf(unary.bfloat16().float(), image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(want, dense_crf(unary, image))


def test_no_iteration_is_the_softmax():
    unary, image = scene(1, 3, 6, 7)
    torch.testing.assert_close(dense_crf(unary, image, iterations=0), (-unary).softmax(1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "slow"}, "dense_crf: mode must be one of fast, ring, exact, got 'slow'"),
        ({"mode": "ring", "bilateral": (80.0, 1e-6, 10.0)}, "standard deviations are too small"),
        ({"spatial": (0.0, 3.0)}, "dense_crf: spatial sigma_xy must lie in"),
        ({"bilateral": (80.0, -1.0, 10.0)}, "dense_crf: bilateral sigma_rgb must lie in .* got -1"),
        ({"bilateral": (80.0, 13.0, -10.0)}, "dense_crf: bilateral weight must lie in"),
        ({"iterations": -1}, "dense_crf: iterations must be >= 0"),
        ({"bilateral": (80.0, 1e-6, 10.0)}, "standard deviations are too small"),
        ({"prune": 0.2}, r"dense_crf: prune must lie in \[0.0, 0.1\], got 0.2"),
        ({"sizes": [(5, 7)]}, r"dense_crf: sizes must be 1 pairs \(h, w\) up to \(5, 6\), got"),
        ({"sizes": [(5, 6), (5, 6)]}, "dense_crf: sizes must be 1 pairs"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        dense_crf(*scene(1, 2, 5, 6), **options)


def test_bad_inputs():
    unary, image = scene(1, 2, 5, 6)
    with pytest.raises(ValueError, match=r"dense_crf: image must be \[1, 3, 5, 6\], got \(1, 3, 6, 5\)"):
        dense_crf(unary, image.mT)
    with pytest.raises(ValueError, match="dense_crf: unary must be finite"):
        dense_crf(torch.where(unary > 0.5, math.nan, unary), image)
    with pytest.raises(TypeError, match="dense_crf: image must be floating point"):
        dense_crf(unary, image.int())


def test_unary_from_probs():
    probs = torch.tensor([0.0, 0.25, 0.75]).view(1, 3, 1, 1)
    got = dense_crf_unary(probs, 3).flatten()
    torch.testing.assert_close(got, -torch.tensor([1e-5, 0.25, 0.75]).log())
    mixed = dense_crf_unary(probs, 3, 0.4).flatten()
    torch.testing.assert_close(mixed, -torch.tensor([0.2, 0.3, 0.5]).log())


def test_unary_from_labels():
    got = dense_crf_unary(torch.tensor([[[2, 255]]]), 3, 0.8)
    assert got.shape == (1, 3, 1, 2)
    torch.testing.assert_close(got[0, :, 0, 0], -torch.tensor([0.1, 0.1, 0.8]).log())
    torch.testing.assert_close(got[0, :, 0, 1], -torch.full((3,), 1 / 3).log())
    torch.testing.assert_close(
        dense_crf_unary(torch.zeros(1, 1, 1, dtype=torch.uint8), 2)[0, 0], -torch.tensor([[0.7]]).log()
    )


def test_unary_errors():
    labels = torch.tensor([[[0, 3]]])
    with pytest.raises(ValueError, match=r"dense_crf_unary: labels must lie in 0..2 or be 255"):
        dense_crf_unary(labels, 3)
    with pytest.raises(ValueError, match="dense_crf_unary: confidence must lie in"):
        dense_crf_unary(labels, 4, 1.0)
    with pytest.raises(ValueError, match=r"dense_crf_unary: labels_or_probs must be \[B, 4, H, W\]"):
        dense_crf_unary(torch.rand(1, 3, 2, 2), 4)
    with pytest.raises(ValueError, match="dense_crf_unary: clip must lie in"):
        dense_crf_unary(torch.rand(1, 3, 2, 2), 3, clip=0.0)


# ------------------------------------------------------------------------------------------------ native


CPU_BACKENDS = available_backends("dense_crf", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")


def both(unary, image, **options):
    """Native result, reference in fp32, reference in fp64."""
    got = dense_crf(unary, image, backend="native", **options)
    plain = dense_crf(unary, image, backend="reference", **options)
    return got, plain, dense_crf(unary.double(), image, backend="reference", **options)


def few_alive(b, k, h, w, alive=3):
    """As `scene`, with all but some classes at probabilities near 1e-5."""
    unary, image = scene(b, k, h, w)
    unary[:, alive:] += 11.5
    return unary, image


@native
@pytest.mark.parametrize("size", [(24, 31), (33, 17), (1, 40), (40, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 21, 51])
def test_native_equals_reference(size, k):
    unary, image = scene(2, k, *size)
    for options in ({}, {"spatial": (1.0, 1.0), "bilateral": (140.0, 1.0, 7.0)}, {"bilateral": (50.0, 5.0, 10.0)}):
        got, plain, want = both(unary, image, iterations=3, **options)
        assert got.dtype == torch.float32
        # Against fp64, ties of the lattice cells fall to either side; the native code breaks them as the reference in
        # fp32 does, so that only rounding is left. Exponents reach 30, and a pixel that wavers amplifies it.
        assert (got - want).abs().max() < 2e-2 and (got - want).abs().mean() < 1e-4
        assert (got - plain).abs().max() < 5e-4 and (got - plain).abs().mean() < 2e-6


@native
def test_native_equals_reference_in_fp64_away_from_ties():
    unary, image = scene(2, 6, 24, 31)
    got, _, want = both(unary, image.float() + torch.rand(2, 3, 24, 31), bilateral=(40.3, 17.7, 6.0), iterations=3)
    assert (got - want).abs().max() < 1e-4


@native
def test_native_one_class_and_weights_of_zero():
    unary, image = scene(1, 3, 12, 13)
    assert torch.equal(dense_crf(unary[:, :1], image, backend="native"), torch.ones(1, 1, 12, 13))
    off = {"spatial": (3.0, 0.0), "bilateral": (80.0, 13.0, 0.0)}
    for options in (off, {"spatial": (3.0, 0.0)}, {"bilateral": (80.0, 13.0, 0.0)}, {"iterations": 0}):
        got, plain, _ = both(unary, image, **options)
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(dense_crf(unary, image, **off, prune=0.1), (-unary).softmax(1), rtol=0, atol=1e-6)


@native
def test_native_large_and_small_energies():
    unary, image = scene(1, 4, 12, 13)
    for u in (1000 * unary, unary + 1e4, -50 * unary):
        got, plain, _ = both(u, image)
        torch.testing.assert_close(got, plain, rtol=0, atol=2e-3)  # energies of 1e4 carry 1e-3 in fp32
        torch.testing.assert_close(got.sum(1), torch.ones(1, 12, 13), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestEachBackend:
    def test_too_small_deviations(self, backend):
        unary, image = scene(1, 2, 9, 8)
        for options in ({"bilateral": (80.0, 1e-4, 10.0)}, {"bilateral": (80.0, 0.01, 10.0)}, {"spatial": (1e-7, 3.0)}):
            with pytest.raises(ValueError, match="lattice: the features span too many cells"):
                dense_crf(unary, image, backend=backend, **options)

    def test_layouts_and_dtypes(self, backend):
        unary, image = scene(2, 3, 11, 14)
        want = dense_crf(unary, image, backend=backend)
        last = unary.contiguous(memory_format=torch.channels_last)
        assert torch.equal(want, dense_crf(last, image.mT.contiguous().mT, backend=backend))
        wide = torch.zeros(2, 3, 22, 28)
        wide[:, :, ::2, ::2] = unary
        assert torch.equal(want, dense_crf(wide[:, :, ::2, ::2], image.float(), backend=backend))
        for dtype in (torch.bfloat16, torch.float16):
            half = dense_crf(unary.to(dtype), image.to(dtype), backend=backend)
            assert half.dtype == torch.float32
            assert torch.equal(half, dense_crf(unary.to(dtype).float(), image.to(dtype).float(), backend=backend))

    def test_empty(self, backend):
        for shape in ((0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)):
            b, _, h, w = shape
            q = dense_crf(torch.zeros(shape), torch.zeros(b, 3, h, w), prune=1e-3, backend=backend)
            assert q.shape == shape

    def test_sizes(self, backend):
        sizes = [(9, 14), (11, 7), (11, 14), (0, 5), (9, 14)]
        unary, image = few_alive(5, 6, 11, 14)
        for prune in (0.0, 1e-3):
            got = dense_crf(unary, image, sizes=sizes, prune=prune, backend=backend)
            outside = torch.ones(11, 14, dtype=torch.bool)
            for n, (h, w) in enumerate(sizes):
                alone = dense_crf(
                    unary[n : n + 1, :, :h, :w], image[n : n + 1, :, :h, :w], prune=prune, backend=backend
                )
                assert torch.equal(got[n, :, :h, :w], alone[0])
                padding = outside.clone()
                padding[:h, :w] = False
                assert torch.equal(got[n, :, padding], torch.zeros(6, int(padding.sum())))
        noisy = unary.clone()
        noisy[1, :, :, 7:] = 77.0
        image = image.clone()
        image[1, :, :, 7:] = 0
        assert torch.equal(got, dense_crf(noisy, image, sizes=sizes, prune=1e-3, backend=backend))

    def test_prune(self, backend):
        unary, image = few_alive(2, 12, 30, 26)
        unary[1, 5] -= 11.5  # alive in the second image alone
        settings = {"iterations": 1, "backend": backend}
        for full, prune in ((dense_crf(unary, image, **settings), p) for p in (1e-4, 1e-3, 0.1)):
            got = dense_crf(unary, image, prune=prune, **settings)
            torch.testing.assert_close(got.sum(1), torch.ones(2, 30, 26), rtol=0, atol=1e-5)
            # the documented bound for one iteration; 1e-5 for rounding
            assert (got.log() - full.log()).abs().max() < 1.12 * prune + 1e-5
        assert not torch.equal(got, full)  # something was dropped
        assert torch.equal(got[1:], dense_crf(unary[1:], image[1:], prune=prune, **settings))
        full, got = (dense_crf(unary, image, prune=p, backend=backend) for p in (0.0, 1e-3))
        assert (got - full).abs().max() < 5e-3 and (got.argmax(1) != full.argmax(1)).float().mean() < 1e-3

    def test_prune_that_drops_nothing_changes_no_bit(self, backend):
        unary, image = scene(1, 6, 15, 22)
        want = dense_crf(unary, image, backend=backend)
        assert torch.equal(want, dense_crf(unary, image, prune=0.0, backend=backend))
        assert torch.equal(want, dense_crf(unary, image, prune=1e-6, backend=backend))

    def test_prune_of_every_class(self, backend):
        unary, image = scene(1, 3, 6, 5)
        got = dense_crf(unary, image, spatial=(3.0, 1e-3), bilateral=(80.0, 13.0, 1e-3), prune=0.1, backend=backend)
        torch.testing.assert_close(got, (-unary).softmax(1), rtol=0, atol=1e-6)

    def test_second_run_and_batch_position(self, backend):
        unary, image = few_alive(3, 9, 13, 21)
        want = dense_crf(unary, image, prune=1e-3, backend=backend)
        assert torch.equal(want, dense_crf(unary, image, prune=1e-3, backend=backend))
        order = [2, 0, 1]
        assert torch.equal(want[order], dense_crf(unary[order], image[order], prune=1e-3, backend=backend))

    def test_inputs_are_untouched_and_no_gradient(self, backend):
        unary, image = scene(1, 3, 8, 9)
        before = unary.clone(), image.clone()
        assert not dense_crf(unary.requires_grad_(), image, backend=backend).requires_grad
        assert torch.equal(unary, before[0]) and torch.equal(image, before[1])


@native
@pytest.mark.parametrize("prune", [0.0, 1e-3])
@pytest.mark.parametrize("k", [3, 6, 21])
def test_thread_count_changes_no_bit(k, prune):
    unary, image = few_alive(3, k, 61, 83)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results += [dense_crf(unary, image, prune=prune, iterations=3, backend="native")]
            results += [
                torch.cat(
                    [dense_crf(u[None], i[None], prune=prune, iterations=3) for u, i in zip(unary, image, strict=True)]
                )
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@native
def test_native_in_double():
    unary, image = scene(1, 3, 8, 9)
    for mode in ("fast", "ring", "exact"):
        with pytest.raises(TypeError, match="dense_crf: the native backend computes in fp32"):
            dense_crf(unary.double(), image, mode=mode, backend="native")


@native
def test_opcheck_and_compile():
    unary, image = few_alive(2, 5, 9, 8)
    args = (unary, image.float(), 3.0, 3.0, 80.0, 13.0, 10.0, 2, 1e-3, [9, 8, 5, 6])
    torch.library.opcheck(torch.ops.wsss.dense_crf.default, args)
    run = torch.compile(lambda *a: torch.ops.wsss.dense_crf(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*args), torch.ops.wsss.dense_crf(*args) + 1)


@native
def test_poisoned_memory():
    unary, image = few_alive(1, 5, 13, 11)
    want = dense_crf(unary, image, prune=1e-3, backend="native")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.equal(want, dense_crf(unary, image, prune=1e-3, backend="native"))
    finally:
        torch.use_deterministic_algorithms(before)


@native
def test_direct_call_is_checked():
    unary, image, rest = torch.rand(1, 2, 4, 5), torch.rand(1, 3, 4, 5), (3.0, 3.0, 80.0, 13.0, 10.0, 1, 0.0)
    with pytest.raises(TypeError, match="dense_crf: unary must be float32"):
        torch.ops.wsss.dense_crf(unary.double(), image, *rest, [])
    with pytest.raises(ValueError, match="dense_crf: image does not fit unary"):
        torch.ops.wsss.dense_crf(unary, image[..., :3], *rest, [])
    with pytest.raises(ValueError, match="dense_crf: sizes must be empty or hold"):
        torch.ops.wsss.dense_crf(unary, image, *rest, [4])
    with pytest.raises(ValueError, match="dense_crf: sizes must lie inside the batch"):
        torch.ops.wsss.dense_crf(unary, image, *rest, [5, 4])
    with pytest.raises(ValueError, match="dense_crf: the standard deviations must be > 0"):
        torch.ops.wsss.dense_crf(unary, image, 0.0, *rest[1:], [])
    with pytest.raises(ValueError, match="lattice: the features span too many cells"):
        torch.ops.wsss.dense_crf(unary, image * torch.nan, *rest, [])


@pytest.mark.gpu
class TestOnTheGpu:
    """The kernels themselves run in test_lattice_serial.py without a GPU."""

    @pytest.mark.parametrize("size", [(24, 31), (1, 40), (1, 1), (61, 83)])
    @pytest.mark.parametrize("k", [1, 3, 4, 21, 51])
    def test_equals_the_reference_in_fp64(self, size, k):
        unary, image = scene(2, k, *size) if k > 1 else (torch.rand(2, 1, *size), 255 * torch.rand(2, 3, *size))
        image = image.float() + torch.rand(image.shape)  # away from ties of the lattice cells
        settings = {"spatial": (3.1, 3.0), "bilateral": (40.3, 17.7, 6.0), "iterations": 3}
        for prune in (0.0, 1e-3):
            want = dense_crf(unary.double(), image.double(), **settings, prune=prune, backend="reference")
            got = dense_crf(unary.cuda(), image.cuda(), **settings, prune=prune, backend="native")
            assert got.dtype == torch.float32
            assert (got.cpu() - want).abs().max() < 1e-4

    def test_equals_the_cpu_at_ties(self):
        unary, image = scene(2, 5, 61, 83)
        want = dense_crf(unary, image, iterations=3, backend="native")
        got = dense_crf(unary.cuda(), image.cuda(), iterations=3, backend="native")
        assert (got.cpu() - want).abs().max() < 5e-4 and (got.cpu() - want).abs().mean() < 2e-6

    def test_twenty_runs_batch_position_and_sizes(self):
        unary, image = few_alive(3, 9, 61, 83)
        unary, image = unary.cuda(), image.cuda()
        sizes = [(61, 83), (40, 83), (61, 20)]
        settings = {"prune": 1e-3, "backend": "native"}
        want = dense_crf(unary, image, sizes=sizes, **settings)
        for _ in range(20):
            assert torch.equal(want, dense_crf(unary, image, sizes=sizes, **settings))
        order = [2, 0, 1]
        moved = dense_crf(unary[order], image[order], sizes=[sizes[i] for i in order], **settings)
        assert torch.equal(want[order], moved)
        for n, (h, w) in enumerate(sizes):
            alone = dense_crf(unary[n : n + 1, :, :h, :w], image[n : n + 1, :, :h, :w], **settings)
            assert torch.equal(want[n, :, :h, :w], alone[0])

    def test_default_backend_stream_errors_and_empty(self):
        unary, image = (x.cuda() for x in scene(2, 3, 11, 14))
        want = dense_crf(unary, image, backend="native")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = dense_crf(unary, image)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(want, got)
        with pytest.raises(ValueError, match="lattice: the features span too many cells"):
            dense_crf(unary, image, bilateral=(80.0, 0.01, 10.0), backend="native")
        assert dense_crf(unary[:0], image[:0], backend="native").shape == (0, 3, 11, 14)
