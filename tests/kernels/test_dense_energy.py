"""dense_energy: the value against a double loop, the gradient against the stated convention."""

import pytest
import torch
import torch.nn.functional as F

from kernels import dense_energy
from kernels.lattice import Lattice, pixel_features


def example(b=2, k=3, h=12, w=16, dtype=torch.float64):
    probs = torch.randn(b, k, h, w, dtype=dtype).softmax(1)
    image = (torch.rand(b, 3, h, w) * 60 + 90).round().to(dtype)
    roi = torch.ones(b, h, w, dtype=dtype)
    roi[:, :3] = 0
    labels = torch.randint(0, k, (b, h, w))
    labels[:, :, ::3] = 255
    return probs, image, roi, labels


def plain(probs, image, roi, labels, sigma_rgb=15.0, sigma_xy=50.0):
    """Value and slope at half size, in fp64, with the kernel as a matrix; inputs at full size."""
    b = len(probs)
    small = F.interpolate(probs, scale_factor=0.5, mode="bilinear", align_corners=False)
    image, roi, labels = image[:, :, ::2, ::2], roi[:, ::2, ::2], labels[:, ::2, ::2]
    value, slopes = 0.0, []
    for n in range(b):
        f = pixel_features(image[n], sigma_xy, sigma_rgb)
        kernel = torch.exp(-0.5 * (f[:, None] - f[None]).square().sum(2))
        gate = (roi[n] - small[n].amax(0)).clamp_min(0)
        gate[labels[n] == 255] = 1
        s = (small[n] * roi[n]).flatten(1)
        smooth = s @ kernel
        value -= 1e-7 / b * (s * gate.flatten() * smooth).sum()
        slopes.append((-2e-7 / b * gate.flatten() * smooth * roi[n].flatten()).view_as(small[n]))
    return value, small, torch.stack(slopes)


def test_true_scale_equals_the_matrix_form():
    probs, image, roi, labels = example()
    want, _, _ = plain(probs, image, roi, labels)
    got = dense_energy(probs, image, roi, labels, scale="true")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_gradient_is_the_stated_convention():
    probs, image, roi, labels = example()
    probs.requires_grad_()
    dense_energy(probs, image, roi, labels, scale="true").mul(3).backward()
    with torch.no_grad():
        _, _, slope = plain(probs, image, roi, labels)
    x = probs.detach().clone().requires_grad_()
    F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False).backward(3 * slope)
    torch.testing.assert_close(probs.grad, x.grad, rtol=1e-10, atol=1e-20)
    assert torch.equal(probs.grad[:, :, :2], torch.zeros_like(probs[:, :, :2]))  # outside the roi


def test_without_gate_the_gradient_is_the_true_derivative():
    # With every pixel unlabelled the gate is 1, and the convention coincides with the derivative.
    probs, image, roi, labels = example(b=1, k=2, h=4, w=6)
    labels = torch.full_like(labels, 255)
    run = lambda p: 1e7 * dense_energy(p, image, roi, labels, scale="true")  # noqa: E731
    assert torch.autograd.gradcheck(run, probs.requires_grad_())


def test_pcre_check_11_certain_and_labelled_has_no_energy():
    probs, image, roi, labels = example()
    probs = torch.zeros_like(probs)
    probs[:, 1] = 1.0
    for scale in ("lattice", "true"):
        assert dense_energy(probs, image, torch.ones_like(roi), torch.ones_like(labels), scale=scale).item() == 0.0


def test_pcre_check_11_all_ignored_opens_the_gate():
    probs, image, roi, labels = example()
    ignored = torch.full_like(labels, 255)
    got = dense_energy(probs, image, roi, ignored, scale="lattice")
    small = F.interpolate(probs, scale_factor=0.5, mode="bilinear") * roi[:, None, ::2, ::2]
    want = 0.0
    for p, i in zip(small, image[:, :, ::2, ::2], strict=True):
        s = p.flatten(1).t().contiguous()
        want -= 1e-7 / 2 * (s * Lattice(pixel_features(i, 50.0, 15.0)).filter(s)).sum()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert got < dense_energy(probs, image, roi, labels, scale="lattice") < 0


def test_lattice_scale_is_a_share_of_the_true_one():
    probs, _, _, labels = example(b=1, h=64, w=64)
    image = F.interpolate(torch.rand(1, 3, 5, 5) * 200, (64, 64), mode="bilinear") + 3 * torch.randn(1, 3, 64, 64)
    args = (probs, image, torch.ones(1, 64, 64), torch.full((1, 64, 64), 255))
    share = dense_energy(*args) / dense_energy(*args, scale="true")
    assert 0.45 < share < 0.7  # documented as about 0.57


def test_odd_sizes_full_size_and_empty():
    probs, image, roi, labels = example(h=13, w=7)
    assert dense_energy(probs, image, roi, labels).item() < 0
    assert dense_energy(probs, image, roi, labels, scale_factor=1.0).item() < 0
    one = example(b=1, h=1, w=1)
    assert torch.isfinite(dense_energy(*one))
    empty = probs[:0].requires_grad_()
    loss = dense_energy(empty, image[:0], roi[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0.0


def test_empty_roi_has_no_energy():
    probs, image, roi, labels = example()
    probs.requires_grad_()
    loss = dense_energy(probs, image, torch.zeros_like(roi), labels)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(probs.grad, torch.zeros_like(probs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    probs, image, roi, labels = example(dtype=torch.float32)
    probs = probs.to(dtype)
    want = dense_energy(probs.float(), image, roi, labels)
    for p in (probs.clone(), probs.mT.contiguous().mT):
        p.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = dense_energy(p, image, roi.bool(), labels.to(torch.uint8))
        got.backward()
        assert got.dtype == torch.float32 and torch.equal(got, want) and p.grad.dtype == dtype


def test_errors():
    probs, image, roi, labels = example()
    with pytest.raises(ValueError, match=r"dense_energy: roi must be \[2, 12, 16\], got \(2, 11, 16\)"):
        dense_energy(probs, image, roi[:, 1:], labels)
    with pytest.raises(ValueError, match="dense_energy: scale must be one of lattice, true, got 'exact'"):
        dense_energy(probs, image, roi, labels, scale="exact")
    with pytest.raises(ValueError, match="dense_energy: sigma_rgb must lie in"):
        dense_energy(probs, image, roi, labels, sigma_rgb=0.0)
    with pytest.raises(ValueError, match="dense_energy: scale_factor must lie in"):
        dense_energy(probs, image, roi, labels, scale_factor=2.0)
    with pytest.raises(TypeError, match="dense_energy: labels must hold integers"):
        dense_energy(probs, image, roi, labels.float())
    with pytest.raises(TypeError, match="dense_energy: image must be floating point"):
        dense_energy(probs, image.to(torch.uint8), roi, labels)
