"""patch_token_contrast: against a loop over pairs, against its closed-form gradient, and its corner cases."""

import pytest
import torch

from kernels import patch_token_contrast
from kernels.patch_token_contrast.reference import pair_sets


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
