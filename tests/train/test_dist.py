"""Collectives with gradient: the mean over ranks of the gradients is the gradient of one rank with the whole batch."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from tests.train.ranks import run_ranks
from wsss_dist import dist
from wsss_dist.errors import UserError

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


def _share(total: int, block: int, done: Path | None = None) -> list[int]:
    """What this rank takes; with a file to count in, rank 0 keeps its first number until the others have done 30."""
    taken = []
    with dist.shared(total, block) as mine:
        for k in mine:
            taken.append(k)
            if done is not None and dist.rank() > 0:
                with open(done, "ab") as file:
                    file.write(b"x")
            elif done is not None:
                end = time.monotonic() + 50
                while not (done.is_file() and done.stat().st_size >= 30):
                    assert time.monotonic() < end, "the others did not take what rank 0 keeps waiting"
                    time.sleep(0.01)
    return taken


def _shares(done: Path) -> list[list[int]]:
    return [_share(23, 3), _share(2, 3), _share(0, 3), _share(40, 1, done)]


def test_every_number_is_handed_to_one_rank_and_a_slow_one_gets_fewer(tmp_path):
    assert _share(5, 2) == [0, 1, 2, 3, 4]
    ranks = run_ranks(3, tmp_path, _shares, tmp_path / "done")
    for total, parts in zip((23, 2, 0, 40), zip(*ranks, strict=True), strict=True):
        assert sorted(k for part in parts for k in part) == list(range(total))
        assert all(part == sorted(part) for part in parts)
    whole = [{k // 3 for k in part} for part, *_ in ranks]
    assert sum(map(len, whole)) == 8 == len(set.union(*whole)), "a block is not split"
    assert len(ranks[0][3]) <= 10


def _share_and_fail(failing: dict[int, str]) -> tuple[list[str], int]:
    """Messages of two attempts, and how many numbers this rank took in the first one."""
    messages, taken = [], 0
    for fails, total in ((failing, 100_000), ({}, 30)):
        try:
            with dist.shared(total, 1) as mine:
                for k in mine:
                    taken += bool(fails)
                    if k >= 20 and dist.rank() in fails:
                        raise UserError(fails[dist.rank()])
                    time.sleep(0.001)
        except UserError as error:
            messages.append(str(error))
    return messages, taken


def test_an_error_on_one_rank_is_one_message_on_all_and_ends_the_work(tmp_path):
    for failing in ({1: "one"}, {1: "one", 2: "two"}):
        ends = run_ranks(3, tmp_path, _share_and_fail, failing)
        assert [messages for messages, _ in ends] in ([["one"]] * 3, [["two"]] * 3)
        assert sum(taken for _, taken in ends) < 50_000, "the others go on although the work has failed"
