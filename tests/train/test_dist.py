"""Collectives with gradient: the mean over ranks of the gradients is the gradient of one rank with the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.train.ranks import run_ranks
from wsss_dist import dist

WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def _images(largest: int) -> Tensor:
    """[4, 3] float64; the largest entry is one of image `largest`."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[largest, 1] += 9
    return x


def _gradient(loss_of, largest: int) -> tuple[list, list]:
    """(loss, gradient) at a shared weight, averaged over ranks as the engines do; the images are split over them."""
    weight = WEIGHT.clone().requires_grad_()
    images = _images(largest).chunk(dist.world_size())[dist.rank()]
    loss = loss_of(images * weight)
    loss.backward()
    return dist.all_reduce_mean(loss).item(), dist.all_reduce_mean(weight.grad).tolist()


def _pairs(x: Tensor) -> Tensor:
    """Every pair of images of the global batch counts."""
    every = dist.gather_batch(x)
    return (every @ every.t()).sin().sum()


def _over_maximum(x: Tensor) -> Tensor:
    return (x / dist.batch_max(x.max())).square().sum(1).mean()


def _both(largest: int) -> list:
    return [_gradient(_pairs, largest), _gradient(_over_maximum, largest)]


def test_two_ranks_give_the_loss_and_the_gradient_of_one(tmp_path):
    for largest in (0, 3):  # on rank 0, on rank 1
        one = run_ranks(1, tmp_path, _both, largest)[0]
        for two in run_ranks(2, tmp_path, _both, largest):
            torch.testing.assert_close(two, one, rtol=1e-12, atol=0)


def _tie() -> list[float]:
    value = torch.tensor(2.0, requires_grad=True)
    (3.0 * dist.batch_max(value)).backward()
    return [dist.all_reduce_sum(value.grad).item(), value.grad.item()]


def test_ranks_with_the_same_maximum_share_its_gradient(tmp_path):
    assert run_ranks(2, tmp_path, _tie) == [[6.0, 3.0]] * 2


def test_without_a_group_they_are_the_identity():
    x = _images(0).requires_grad_()
    assert torch.equal(dist.gather_batch(x), x) and torch.equal(dist.batch_max(x), x)
    (grad,) = torch.autograd.grad(dist.gather_batch(x).sum() + 2 * dist.batch_max(x).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3.0))
