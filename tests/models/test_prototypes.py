"""The update of the prototypes in one sum, against the loop that defines it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wsss_dist.models.prototypes import PrototypeMemory

C, D = 5, 16


def loop(prototypes, tokens, labels, momentum, normalize_token=False):
    """Eq. 12, image by image: r <- m r + (1 - m) z for each of its tags; then all rows to unit length."""
    prototypes = prototypes.clone()
    for image, tags in zip(tokens, labels, strict=True):
        for c in tags.nonzero().flatten().tolist():
            z = F.normalize(image[c], dim=-1) if normalize_token else image[c]
            prototypes[c] = momentum * prototypes[c] + (1 - momentum) * z
    return F.normalize(prototypes, dim=-1)


def case(images, share, dtype):
    memory = PrototypeMemory(C, D)
    memory.prototypes = memory.prototypes.to(dtype)
    return memory, 25 * torch.randn(images, C, D, dtype=dtype), (torch.rand(images, C) < share).to(dtype)


# share of the tags: none, few, half, each image has all of them
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("normalize_token", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_one_sum_is_the_loop(share, momentum, normalize_token, dtype, close):
    for images in (0, 1, 7, 200):
        memory, tokens, labels = case(images, share, dtype)
        want = loop(memory.prototypes, tokens, labels, momentum, normalize_token)
        memory.update(tokens, labels, momentum, normalize_token)
        assert memory.prototypes.dtype == dtype
        # of unit vectors; float32 sums up to 200 terms in another order; the shares are float32 powers
        torch.testing.assert_close(memory.prototypes, want, rtol=0, atol=close)


def test_the_order_of_the_images_counts():
    memory, tokens, labels = case(6, 1.0, torch.float64)
    other = PrototypeMemory(C, D)
    other.prototypes = memory.prototypes.clone()
    memory.update(tokens, labels, 0.9)
    other.update(tokens.flip(0), labels, 0.9)
    assert (memory.prototypes - other.prototypes).abs().max() > 0.05


class _Counted(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_the_update_is_no_loop_over_the_images():
    found = []
    for images in (8, 1024):
        memory, tokens, labels = case(images, 0.1, torch.float32)
        with _Counted() as counted:
            memory.update(tokens, labels, 0.99)
        found.append(counted.operations)
    assert found[0] == found[1] < 50
