"""What fuzzing and the review for it have found, once each: arguments that crashed, hung or gave garbage."""

import math

import pytest
import torch

import kernels
from kernels import available_backends
from kernels.lattice import Lattice, pixel_features

pytestmark = pytest.mark.skipif("native" not in available_backends("par"), reason="kernels._C is not built")
MANY = 2**63 - 1
NOT_FINITE = (math.nan, math.inf, -math.inf)


def region_ops(h, w, limit, n):
    """Calls of the raw region ops on a grid of h x w, for N = n patches."""
    ops, square = torch.ops.wsss, torch.zeros(1, n, n)
    pairs, members = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool)
    winner, flow = torch.zeros(1, 4, 4, dtype=torch.int32), torch.ones(1, 4, 4)
    return {
        "radius_mask": lambda: ops.radius_mask(square, h, w, limit, False),
        "radius_mask_backward": lambda: ops.radius_mask_backward(square, square, h, w, limit, False),
        "select_regions": lambda: ops.select_regions(
            square, torch.ones(1, n, 1), pairs, h, w, limit, 0.0, 0.3, 0.5, 5, 300
        ),
        "max_upsampled_masks": lambda: ops.max_upsampled_masks(square, pairs, members, h, w, 4, 4, limit),
        "max_upsampled_masks_backward": lambda: ops.max_upsampled_masks_backward(
            flow, winner, square, pairs, members, h, w, limit
        ),
    }


REGION_OPS = sorted(region_ops(2, 2, 1, 4))


@pytest.mark.parametrize("name", REGION_OPS)
def test_a_grid_whose_product_overflows(name):
    """It wrapped to N and went through: memory errors."""
    for h, w in ((2**62 + 1, 4), (4, 2**62 + 1), (-2, -2)):
        with pytest.raises(ValueError, match="grid must have h \\* w = 4"):
            region_ops(h, w, 1, 4)[name]()


@pytest.mark.parametrize("name", REGION_OPS)
def test_the_largest_limit(name):
    """The search for the largest square below it never ended."""
    got, want = region_ops(2, 2, MANY, 4)[name](), region_ops(2, 2, 2, 4)[name]()
    for x, y in zip(got, want, strict=True) if isinstance(got, tuple) else ((got, want),):
        assert torch.equal(x, y)


def test_dilation_with_the_largest_limit():
    seeds = torch.rand(1, 2, 5, 70) < 0.01
    for chebyshev in (False, True):
        want = seeds.flatten(2).any(-1)[..., None, None].expand(seeds.shape)
        assert torch.equal(torch.ops.wsss.dilate_regions(seeds, MANY, chebyshev), want)


@pytest.mark.parametrize("dilation", [0, -1, -(2**40)])
def test_par_with_a_dilation_below_1(dilation):
    """The taps left the padded image."""
    with pytest.raises(ValueError, match="par: dilations must be >= 1"):
        torch.ops.wsss.par(torch.rand(1, 3, 5, 5), torch.rand(1, 1, 5, 5), [dilation], [0.1] * 8, 1)


def test_negative_iterations():
    """dense_crf returned memory as it found it."""
    image, maps = torch.rand(1, 3, 5, 5), torch.rand(1, 2, 5, 5)
    with pytest.raises(ValueError, match="dense_crf: iterations must be >= 0, got -1"):
        torch.ops.wsss.dense_crf(maps, image, 3.0, 3.0, 80.0, 13.0, 10.0, -1, 0.0, [])
    with pytest.raises(ValueError, match="par: iterations must be >= 0, got -1"):
        torch.ops.wsss.par(image, maps, [1], [0.1] * 8, -1)


def test_a_walk_without_end():
    with pytest.raises(ValueError, match="random_walk: steps must lie in"):
        torch.ops.wsss.random_walk(torch.rand(1, 1, 3, 3), torch.rand(1, 3, 3), 2, 1.0, 2**62, [], False)


def test_no_maps_of_any_size():
    """The taps of 2^40 rows were asked for; for sizes that torch takes, their product may overflow too."""
    logits, none = torch.zeros(1, 4, 4), torch.zeros(0, 2, dtype=torch.int64)
    nobody = torch.zeros(0, 4, dtype=torch.bool)
    out, _ = torch.ops.wsss.max_upsampled_masks(logits, none, nobody, 2, 2, 2**40, 2**20, 1)
    assert out.shape == (0, 2**40, 2**20)


@pytest.mark.parametrize("width", [7, 8, 70])
def test_bools_of_other_bytes(width):
    """A view of bytes as bool holds True in other ways than 1; they got into the neighbours' bits."""
    values = torch.randint(0, 4, (2, 3, 6, width)) * 80
    odd, plain = values.to(torch.uint8).view(torch.bool), values > 0
    assert torch.equal(kernels.dilate_regions(odd, 1.0, backend="native"), kernels.dilate_regions(plain, 1.0))
    logits, pairs = torch.randn(1, 6 * width, 6 * width), torch.zeros(6, 2, dtype=torch.int64)
    maps = [
        kernels.max_upsampled_masks(
            logits, kernels.RegionSelection(pairs, x.view(6, -1), None), grid=(6, width), size=(9, 9), backend="native"
        )
        for x in (odd, plain)
    ]
    assert torch.equal(*maps)
    tokens, labels = torch.randn(2, width + 6, 16), torch.randint(0, 19, (2, 6))
    losses = [
        kernels.class_patch_contrast(tokens[:, :-6], tokens[:, -6:], labels, x[:, 0, 0], backend="native")
        for x in (odd, plain)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("classes", [2, 12])
@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_scores_that_have_no_order(classes, wrong):
    """The order of the candidates was open, on CUDA their list had holes; now such a patch is a candidate of none."""
    logits, scores, present = torch.randn(2, 20, 20), torch.rand(2, 20, classes) + 0.1, torch.ones(2, classes)
    scores[0, 0, 0] = scores[0, 7, 1] = scores[1, 3, classes - 1] = wrong
    got, want = (
        kernels.select_regions(logits, scores, present, grid=(4, 5), backend=b) for b in ("native", "reference")
    )
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert got.members.any()
    if wrong != -math.inf:
        assert not (got.members & torch.eye(20, dtype=torch.bool)[[0]])[got.pairs[:, 0] == 0].any()
        assert not ((got.seeds == 7) & (got.pairs[:, :1] == 0)).any()


@pytest.mark.parametrize("wrong", NOT_FINITE)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_images_that_are_not_finite(backend, wrong):
    """par made plain weights of a NaN without a word; dense_energy blamed the standard deviations."""
    image, maps = torch.rand(1, 3, 5, 5), torch.rand(1, 2, 5, 5)
    image[0, 1, 2, 3] = wrong
    with pytest.raises(ValueError, match="par: image must be finite, got NaN or infinity"):
        kernels.par(image, maps, backend=backend)
    with pytest.raises(ValueError, match="dense_energy: image must be finite, got NaN or infinity"):
        kernels.dense_energy(maps, image, torch.ones(1, 5, 5), torch.zeros(1, 5, 5, dtype=torch.int64), backend=backend)


def test_sparse_and_complex_tensors():
    """They got past the checks and failed somewhere inside, with another kind of exception."""
    image, maps, scores = torch.rand(1, 3, 5, 5), torch.rand(1, 2, 5, 5), torch.rand(1, 4, 2)
    with pytest.raises(TypeError, match="par: image must be a dense tensor, got torch.sparse_coo"):
        kernels.par(image.to_sparse(), maps)
    with pytest.raises(TypeError, match="select_regions: present must hold real numbers, got torch.complex64"):
        kernels.select_regions(torch.zeros(1, 4, 4), scores, torch.ones(1, 2, dtype=torch.complex64), grid=(2, 2))
    roi = torch.ones(1, 5, 5, dtype=torch.complex64)
    with pytest.raises(TypeError, match="dense_energy: roi must hold real numbers"):
        kernels.dense_energy(maps, image, roi, torch.zeros(1, 5, 5, dtype=torch.int64))


def test_par_with_a_dilation_beyond_int64():
    with pytest.raises(ValueError, match="par: dilations must be 1 to 32 integers >= 1 and < 2\\^31"):
        kernels.par(torch.rand(1, 3, 5, 5), torch.rand(1, 1, 5, 5), dilations=(10**30,))


def test_lattice_far_from_the_origin():
    """Wide enough to fill the keys and far away: the key of the origin, as one number, overflowed."""
    image = 9e4 + 1000 * torch.rand(1, 3, 6, 7)
    planes = torch.rand(1, 2, 6, 7)
    lattice = Lattice(pixel_features(image[0], 1.0, 1.0))
    want = lattice.filter(planes[0].flatten(1).t().contiguous()).t().view(planes.shape)
    torch.testing.assert_close(torch.ops.wsss.lattice_filter(image, planes, 1.0, 1.0), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", NOT_FINITE)
def test_features_out_of_range(wrong):
    """Their cells were computed all the same, with integers that overflowed."""
    image = torch.rand(1, 3, 4, 4)
    image[0, 0, 1, 1] = wrong
    with pytest.raises(ValueError, match="lattice: the features span too many cells"):
        torch.ops.wsss.lattice_filter(image, torch.rand(1, 2, 4, 4), 1.0, 1.0)
