"""class_patch_contrast: against a loop over pairs, its gradient, and its corner cases."""

import pytest
import torch

from kernels import class_patch_contrast


def example(dtype=torch.float64):
    z, f = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 8, 5, dtype=dtype)
    labels = torch.tensor([[0, 1, 1, 2, 255, 3, 0, 2], [0, 0, 3, 3, 255, 255, 1, 0]])
    return z, f, labels, torch.tensor([[1, 1, 0], [0, 0, 1]])


def loop_loss(z, f, labels, present):
    sums, counts = [0.0, 0.0], [0, 0]
    for b in range(len(z)):
        for c in range(z.shape[1]):
            for i in range(f.shape[1]):
                if present[b, c] and labels[b, i] != 255:
                    kind = int(labels[b, i] != c + 1)
                    sums[kind] = sums[kind] + torch.cosine_similarity(z[b, c], f[b, i], dim=0).abs()
                    counts[kind] += 1
    return 0.5 * (1 - sums[0] / (counts[0] + 1)) + 0.5 * sums[1] / (counts[1] + 1)


def test_equals_the_loop():
    args = example()
    torch.testing.assert_close(class_patch_contrast(*args), loop_loss(*args), rtol=1e-12, atol=0)


def test_gradient_reaches_the_class_tokens_alone():
    z, f, labels, present = example()
    z.requires_grad_(), f.requires_grad_()
    class_patch_contrast(z, f, labels, present).backward()
    assert f.grad is None
    assert (z.grad[present > 0].abs().sum(1) > 0).all()
    assert (z.grad[present == 0] == 0).all()


def test_gradcheck():
    z, f, labels, present = example()
    assert torch.autograd.gradcheck(lambda t: class_patch_contrast(t, f, labels, present), z.requires_grad_())


def test_nothing_to_compare_gives_half_and_zero_gradient():
    z, f, labels, present = example(torch.float32)
    for y, p in ((torch.full_like(labels, 255), present), (labels, torch.zeros_like(present))):
        token = z.clone().requires_grad_()
        loss = class_patch_contrast(token, f, y, p)
        loss.backward()
        assert loss.item() == 0.5 and torch.equal(token.grad, torch.zeros_like(z))
    empty = class_patch_contrast(z[:0], f[:0], labels[:0], present[:0])
    assert empty.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_fp32(dtype):
    z, f, labels, present = example(dtype)
    loss = class_patch_contrast(z, f, labels, present)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, class_patch_contrast(z.float(), f.float(), labels, present.bool()))


def test_layout_repeat_and_compile():
    z, f, labels, present = example(torch.float32)
    want = class_patch_contrast(z, f, labels, present)
    assert torch.equal(want, class_patch_contrast(z.mT.contiguous().mT, f.mT.contiguous().mT, labels, present.float()))
    run = torch.compile(class_patch_contrast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(z, f, labels, present), want, rtol=1e-6, atol=0)


def test_errors():
    z, f, labels, present = example()
    with pytest.raises(ValueError, match=r"class_patch_contrast: patch_tokens must be \[2, N, 5\], got \(2, 8, 4\)"):
        class_patch_contrast(z, f[..., 1:], labels, present)
    with pytest.raises(ValueError, match=r"class_patch_contrast: present must be \[2, 3\]"):
        class_patch_contrast(z, f, labels, present[:, 1:])
    with pytest.raises(TypeError, match="class_patch_contrast: labels must hold integers"):
        class_patch_contrast(z, f, labels.double(), present)
