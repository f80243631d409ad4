"""dense_crf: exact mode against matrices in fp64, fast mode against the same iteration over the lattice and against
pydensecrf where it is installed; unary recipes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import dense_crf, dense_crf_unary
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
    for mode in ("fast", "exact"):
        q = dense_crf(torch.full((1, 2, 16, 16), math.log(2)), image, mode=mode)
        torch.testing.assert_close(q, torch.full_like(q, 0.5), rtol=0, atol=1e-6)


def test_pcre_check_12_large_spatial_weight_smooths():
    probs = torch.full((1, 2, 16, 16), 0.2)
    probs[:, 0] = 0.8
    probs[:, :, 8, 8] = probs[:, :, 8, 8].flip(1)  # one pixel of the other class
    image = (torch.rand(1, 3, 16, 16) * 255).to(torch.uint8)
    for mode in ("fast", "exact"):
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


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (2, 3, 1, 9), (1, 2, 1, 1), (0, 2, 4, 4), (1, 2, 0, 4)])
def test_odd_shapes(mode, shape):
    b, k, h, w = shape
    q = dense_crf(torch.rand(shape), torch.rand(b, 3, h, w) * 255, mode=mode)
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
        ({"mode": "ring"}, "dense_crf: mode must be one of fast, exact, got 'ring'"),
        ({"spatial": (0.0, 3.0)}, "dense_crf: spatial sigma_xy must lie in"),
        ({"bilateral": (80.0, -1.0, 10.0)}, "dense_crf: bilateral sigma_rgb must lie in .* got -1"),
        ({"bilateral": (80.0, 13.0, -10.0)}, "dense_crf: bilateral weight must lie in"),
        ({"iterations": -1}, "dense_crf: iterations must be >= 0"),
        ({"bilateral": (80.0, 1e-6, 10.0)}, "standard deviations are too small"),
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
