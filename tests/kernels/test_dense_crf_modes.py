"""The modes ring and exact of dense_crf: native code against the reference in fp64, the true Gaussian sums against the
matrix, and for every mode: equal bits whatever the threads, the batch and the padding."""

import pytest
import torch
import torch.nn.functional as F

from kernels import available_backends, dense_crf
from kernels.dense_crf import accuracy, bench
from kernels.lattice import Lattice, exact_filter, pixel_features

MODES = ("fast", "ring", "exact")
BACKENDS = available_backends("dense_crf", "cpu")
native = pytest.mark.skipif("native" not in BACKENDS, reason="kernels._C is not built")


def scene(b, k, h, w, dead=0):
    """Smooth images with noise, not rounded, so that no pixel ties between two lattice cells; `dead` classes near 0."""
    image = 200 * F.interpolate(torch.rand(b, 3, 4, 5), (h, w), mode="bilinear") + 20 * torch.rand(b, 3, h, w)
    scores = 2 * F.interpolate(torch.randn(b, k, 4, 4), (h, w))
    scores[:, k - dead :] -= 12
    return -scores.log_softmax(1), image


def gaussian_filter(image, planes, *sigmas):
    return torch.ops.wsss.gaussian_filter(image[None], planes[None], *sigmas)[0]


@native
@pytest.mark.parametrize("mode", ["ring", "exact"])
@pytest.mark.parametrize("k", [1, 2, 4, 7, 17, 24, 35])
def test_native_equals_reference(mode, k):
    unary, image = scene(2, k, 23, 30)
    for options in ({}, {"spatial": (0.3, 2.0), "bilateral": (50.3, 9.7, 4.0)}, {"spatial": (40.0, 1.0)}):
        got = dense_crf(unary, image, iterations=3, mode=mode, backend="native", **options)
        want = dense_crf(unary.double(), image, iterations=3, mode=mode, backend="reference", **options)
        assert got.dtype == torch.float32
        # exponents reach 30 and carry 30 units of 1e-7; the lattice cuts fp32 coordinates near 500 into weights
        assert (got - want).abs().max() < (2e-5 if mode == "exact" else 1e-3)
        assert (got - want).abs().mean() < 2e-6


@native
@pytest.mark.parametrize("channels", [1, 3, 8, 13, 21, 29])
def test_gaussian_sums_with_culled_pairs(channels):
    image, planes = scene(1, 2, 41, 53)[1][0], torch.rand(channels, 41, 53)
    features = pixel_features(image.double(), 9.0, 6.0)
    far = (torch.cdist(features, features).square() / 2 > 18).double().mean()
    assert 0.5 < far < 0.95  # 68 tiles, most pairs beyond the cut
    got = gaussian_filter(image, planes, 9.0, 6.0)
    want = exact_filter(features, planes.double().flatten(1).t()).t().reshape(planes.shape)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


@native
@pytest.mark.parametrize("sigmas", [(1e-30, 5.0), (3.0, 1e-30), (1e20, 1e20), (0.5, 1e20), (80.0, 0.1)])
def test_gaussian_sums_at_extreme_deviations(sigmas):
    image = scene(1, 2, 9, 15)[1][0].round()
    planes = torch.rand(3, 9, 15)
    features = pixel_features(image.double(), *sigmas)
    want = exact_filter(features, planes.double().flatten(1).t()).t().reshape(planes.shape)
    torch.testing.assert_close(gaussian_filter(image, planes, *sigmas).double(), want, rtol=2e-6, atol=0)


@native
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (3, 2), (31, 34), (32, 1)])
@pytest.mark.parametrize("sigma", [0.01, 0.4, 3.0, 500.0])
def test_spatial_kernel_alone(size, sigma):
    unary, image = scene(1, 5, *size)
    options = {"spatial": (sigma, 4.0), "bilateral": (80.0, 13.0, 0.0), "iterations": 2}
    want = dense_crf(unary.double(), image, mode="exact", backend="reference", **options)
    for mode in ("ring", "exact"):
        got = dense_crf(unary, image, mode=mode, backend="native", **options)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_the_spatial_kernel_of_the_reference_is_the_matrix():
    unary, image = scene(1, 3, 7, 9)
    features = pixel_features(image[0].double(), 2.0, None)
    kernel = exact_filter(features, torch.eye(63, dtype=torch.float64))
    norm = (kernel.sum(1, keepdim=True) + 1e-20).rsqrt()
    negative = -unary[0].double().flatten(1).t()
    want = (negative + 5 * norm * (kernel @ (norm * negative.softmax(1)))).softmax(1)
    options = {"spatial": (2.0, 5.0), "bilateral": (80.0, 13.0, 0.0), "iterations": 1, "backend": "reference"}
    got = dense_crf(unary.double(), image.double(), mode="exact", **options)[0].flatten(1).t()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ring_is_nearer_to_exact_than_fast(backend):
    unary, image = scene(1, 5, 48, 60)
    oracle = dense_crf(unary.double(), image, bilateral=(40.0, 5.0, 5.0), mode="exact", backend="reference")
    fast, ring = (
        (dense_crf(unary, image, bilateral=(40.0, 5.0, 5.0), mode=m, backend=backend) - oracle).abs().mean()
        for m in ("fast", "ring")
    )
    assert ring < 0.8 * fast


@native
def test_native_ring_lattice_has_room_at_its_rim():
    # two far points per axis, so that ghosts and their neighbours lie at the ends of the keys
    image = torch.zeros(1, 3, 1, 2)
    image[..., 1] = 255.0
    unary = torch.rand(1, 2, 1, 2)
    for sigma in (0.7, 3.0, 100.0):
        options = {"mode": "ring", "bilateral": (1.0, sigma, 3.0), "spatial": (3.0, 0.0)}
        want = dense_crf(unary, image, backend="reference", **options)
        torch.testing.assert_close(dense_crf(unary, image, backend="native", **options), want, rtol=0, atol=1e-6)
    assert Lattice(pixel_features(image[0], 1.0, 0.7), ring=True).num_vertices > 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["ring", "exact"])
def test_prune(mode, backend):
    unary, image = scene(2, 9, 26, 21, dead=4)
    settings = {"iterations": 1, "mode": mode, "backend": backend}
    full, got = (dense_crf(unary, image, prune=p, **settings) for p in (0.0, 1e-2))
    assert (got.log() - full.log()).abs().max() < 1.12e-2 + 1e-5  # the documented bound for one iteration
    assert not torch.equal(got, full)  # something was dropped
    torch.testing.assert_close(got.sum(1), torch.ones(2, 26, 21), rtol=0, atol=1e-5)
    assert torch.equal(full, dense_crf(unary, image, prune=1e-9, **settings))
    options = {"spatial": (3.0, 1e-4), "bilateral": (80.0, 13.0, 1e-4), "prune": 0.1}
    torch.testing.assert_close(dense_crf(unary, image, **options, **settings), (-unary).softmax(1), rtol=0, atol=1e-6)


@native
@pytest.mark.parametrize("prune", [0.0, 1e-3])
@pytest.mark.parametrize("mode", MODES)
def test_equal_bits_in_every_batch_padding_and_thread_count(mode, prune):
    sizes = [(37, 50), (21, 33), (37, 50), (0, 4), (1, 1)]
    unary, image = scene(5, 6, 37, 50, dead=2)
    threads = torch.get_num_threads()
    options = {"mode": mode, "prune": prune, "iterations": 2, "backend": "native"}
    want = [
        dense_crf(unary[n, None, :, :h, :w], image[n, None, :, :h, :w], **options)[0] for n, (h, w) in enumerate(sizes)
    ]
    noisy, painted = unary.clone(), image.clone()
    for n, (h, w) in enumerate(sizes):
        for x in (noisy, painted):
            x[n, :, h:] = 77.0
            x[n, :, :, w:] = 77.0
    try:
        for attempt in range(20):
            torch.set_num_threads(1 + attempt % 2)
            order = torch.randperm(5).tolist()
            got = dense_crf(noisy[order], painted[order], sizes=[sizes[n] for n in order], **options)
            for place, n in enumerate(order):
                h, w = sizes[n]
                assert torch.equal(got[place, :, :h, :w], want[n])
                assert got[place, :, h:].abs().sum() == 0 and got[place, :, :, w:].abs().sum() == 0
            alone = attempt % len(sizes)
            h, w = sizes[alone]
            got = dense_crf(unary[alone, None, :, :h, :w], image[alone, None, :, :h, :w], **options)
            assert torch.equal(got[0], want[alone])
    finally:
        torch.set_num_threads(threads)


@native
@pytest.mark.parametrize("mode", ["ring", "exact"])
def test_opcheck_compile_and_poisoned_memory(mode):
    unary, image = scene(2, 5, 9, 8, dead=2)
    args = (unary, image, 3.0, 3.0, 80.0, 13.0, 10.0, 2, 1e-3, [9, 8, 5, 6], mode)
    torch.library.opcheck(torch.ops.wsss.dense_crf.default, args)
    want = torch.ops.wsss.dense_crf(*args)
    run = torch.compile(lambda *a: torch.ops.wsss.dense_crf(*a) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*args), want + 1)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor with NaN
        assert torch.equal(torch.ops.wsss.dense_crf(*args), want)
    finally:
        torch.use_deterministic_algorithms(before)


@native
def test_opcheck_of_the_gaussian_filter():
    image, planes = torch.rand(2, 3, 6, 7) * 255, torch.rand(2, 4, 6, 7)
    torch.library.opcheck(torch.ops.wsss.gaussian_filter.default, (image, planes, 9.0, 5.0))
    assert torch.ops.wsss.gaussian_filter(image[:0], planes[:0], 9.0, 5.0).shape == (0, 4, 6, 7)


@native
def test_direct_calls_are_checked():
    unary, image, rest = torch.rand(1, 2, 4, 5), torch.rand(1, 3, 4, 5), (3.0, 3.0, 80.0, 13.0, 10.0, 1, 0.0, [])
    with pytest.raises(ValueError, match="dense_crf: mode must be fast, ring or exact, got slow"):
        torch.ops.wsss.dense_crf(unary, image, *rest, "slow")
    for value in (torch.nan, torch.inf):
        broken = image.clone()
        broken[0, 1, 2, 3] = value
        with pytest.raises(ValueError, match="gaussian: the image must be finite"):
            torch.ops.wsss.dense_crf(unary, broken, *rest, "exact")
        with pytest.raises(ValueError, match="lattice: the features span too many cells"):
            torch.ops.wsss.dense_crf(unary, broken, *rest, "ring")
    with pytest.raises(TypeError, match="gaussian_filter: planes must be float32"):
        torch.ops.wsss.gaussian_filter(image, unary.double(), 9.0, 5.0)
    with pytest.raises(ValueError, match="gaussian_filter: image does not fit planes"):
        torch.ops.wsss.gaussian_filter(image[..., :4], unary, 9.0, 5.0)
    with pytest.raises(ValueError, match="gaussian_filter: the standard deviations must be > 0"):
        torch.ops.wsss.gaussian_filter(image, unary, 9.0, 0.0)


@native
def test_accuracy_table():
    rows = accuracy.measure("mixed", (40, 48), 5, ["fast", "ring", "exact"], "fp64")
    fast, ring, exact = rows
    assert abs(fast["occupancy"] - 0.08) < 0.01
    assert exact["tv"] < 1e-6 and exact["worst"] < 1e-4 and exact["margin"] < 1e-4  # labels differ at ties alone
    assert exact["filter_l2"] < 1e-5 and exact["filter_worst"] < 1e-5
    assert 1e-4 < ring["filter_l2"] < fast["filter_l2"] and fast["tv"] > 1e-4


@native
def test_benchmark_cases(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 5, 20, 24, 3))
    assert bench.check("tiny", cpu, "native") < 1e-2  # pruned, after 10 iterations
    ours = bench.run("tiny", cpu, "native")()
    assert ours.shape == (2, 5, 20, 24)
    for peer in bench.peers("tiny", cpu).values():
        assert (peer() - ours).abs().max() < 2e-2
    assert bench.cost("tiny") == (4 * 960 * 13, 10 * 960 * 3 * 46)
