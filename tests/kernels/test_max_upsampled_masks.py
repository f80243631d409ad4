"""max_upsampled_masks against stack-and-max, its gradient against autograd, and pixels where the map is zero."""

import pytest
import torch
import torch.nn.functional as F

from kernels import RegionSelection, max_upsampled_masks, radius_mask
from kernels.max_upsampled_masks import reference

GRID, SIZE = (4, 5), (19, 27)


def example(dtype=torch.float32):
    """Three pairs of two images, the last without members."""
    logits = torch.randn(2, 20, 20, dtype=dtype)
    members = torch.rand(3, 20) < 0.4
    members[2] = False
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2]])
    return logits, RegionSelection(pairs, members, torch.full((3, 5), -1))


def naive(logits, selection, radius):
    """All members upsampled at once; autograd does the rest."""
    masks = torch.sigmoid(logits) if radius is None else radius_mask(logits, GRID, radius)
    rows = []
    for (b, _), chosen in zip(selection.pairs.tolist(), selection.members, strict=True):
        if not chosen.any():
            rows.append(logits.new_zeros(SIZE))
            continue
        grids = masks[b, chosen].view(-1, 1, *GRID)
        rows.append(F.interpolate(grids, SIZE, mode="bilinear", align_corners=False).squeeze(1).amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("radius", [None, 0.0, 1.5])
def test_pcre_check_8_equals_stack_and_max_bit_for_bit(radius):
    logits, selection = example()
    got = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=radius)
    assert torch.equal(got, naive(logits, selection, radius))
    assert torch.equal(got[2], torch.zeros(SIZE))


@pytest.mark.parametrize("chunk", [1, 3 * 19 * 27])
def test_chunks_of_members(chunk, monkeypatch):
    logits, selection = example()
    monkeypatch.setattr(reference, "CHUNK_VALUES", chunk)
    got = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.5)
    # The framework's resize rounds differently for another number of planes: one or two units of fp32 below 1.
    assert (got - naive(logits, selection, 1.5)).abs().max() <= 2.4e-7


@pytest.mark.parametrize("radius", [None, 1.0])
def test_gradient_equals_autograd_of_the_naive_form(radius):
    logits, selection = example(torch.float64)
    weight = torch.randn(3, *SIZE, dtype=torch.float64)
    grads = []
    for run in (lambda x: max_upsampled_masks(x, selection, grid=GRID, size=SIZE, radius=radius), naive):
        x = logits.clone().requires_grad_()
        out = run(x) if run is not naive else naive(x, selection, radius)
        # Where the map is 0 the naive form spreads its gradient over tied members, all with a zero factor behind it.
        (out * weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


def test_gradcheck():
    logits, selection = example(torch.float64)

    def run(x):
        return max_upsampled_masks(x, selection, grid=GRID, size=(6, 7), radius=1.5)

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@pytest.mark.parametrize("size", [(4, 5), (2, 3), (1, 1), (3, 11)])
def test_gradcheck_at_other_sizes(size):
    logits, selection = example(torch.float64)
    run = lambda x: max_upsampled_masks(x, selection, grid=GRID, size=size)  # noqa: E731
    assert torch.autograd.gradcheck(run, logits.requires_grad_())


def test_zero_pixels_swallow_any_gradient():
    logits, selection = example()
    logits[:, :, 3] = -200.0  # the sigmoid underflows to 0
    logits.requires_grad_()
    out = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.0)
    assert (out == 0).any()
    grad = torch.where(out == 0, torch.nan, 1.0)  # what a BCE in low precision may send back
    out.backward(grad)
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_bce_has_no_nan():
    logits, selection = example()
    logits.requires_grad_()
    out = max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=1.0)
    F.binary_cross_entropy(out, torch.ones_like(out)).backward()
    assert torch.isfinite(logits.grad).all()


def test_no_pairs():
    logits, _ = example()
    none = RegionSelection(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 20, dtype=torch.bool), None)
    logits.requires_grad_()
    out = max_upsampled_masks(logits, none, grid=GRID, size=SIZE)
    assert out.shape == (0, *SIZE)
    out.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    logits, selection = example()
    logits = logits.to(dtype)
    want = max_upsampled_masks(logits.float(), selection, grid=GRID, size=SIZE, radius=2.0)
    grads = []
    for x in (logits.clone(), logits.mT.contiguous().mT):
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = max_upsampled_masks(x, selection, grid=GRID, size=SIZE, radius=2.0)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        got.square().sum().backward()
        assert x.grad.dtype == dtype
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_errors():
    logits, selection = example()
    with pytest.raises(ValueError, match=r"max_upsampled_masks: selection.members must be \[3, 20\], got \(2, 20\)"):
        bad = selection._replace(members=selection.members[1:])
        max_upsampled_masks(logits, bad, grid=GRID, size=SIZE)
    with pytest.raises(ValueError, match="max_upsampled_masks: size must be"):
        max_upsampled_masks(logits, selection, grid=GRID, size=(0, 4))
    with pytest.raises(ValueError, match="max_upsampled_masks: radius must lie in"):
        max_upsampled_masks(logits, selection, grid=GRID, size=SIZE, radius=-1)
    with pytest.raises(ValueError, match="max_upsampled_masks: grid must have"):
        max_upsampled_masks(logits, selection, grid=(5, 5), size=SIZE)
