"""Collectives with gradient: the mean over ranks of the gradients is the gradient of one rank with the whole batch."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train import work
from tests.train.ranks import run_ranks
from wsss_dist import dist
from wsss_dist.command import run_command
from wsss_dist.errors import BadFile, UserError
from wsss_dist.signals import interruptible, received

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


class Unsent(Exception):
    """Cannot be made again from what it says."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


ERRORS: dict = {
    "user": UserError,
    "bad file": lambda text: BadFile("a.png", "empty", f"data: {text}", [("a.png", text)]),
    "full": lambda text: OSError(errno.ENOSPC, "No space left on device", f"/disk/{text}"),
    "unsent": lambda text: Unsent(text, "bad"),
}


def _share_and_fail(failing: dict[int, str], kind: str = "user") -> tuple[list[tuple[str, str]], int]:
    """Types and messages of two attempts, and how many numbers this rank took in the first one."""
    errors, taken = [], 0
    for fails, total in ((failing, 100_000), ({}, 30)):
        try:
            with dist.shared(total, 1) as mine:
                for k in mine:
                    taken += bool(fails)
                    if k >= 20 and dist.rank() in fails:
                        raise ERRORS[kind](fails[dist.rank()])
                    time.sleep(0.001)
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    return errors, taken


def test_an_error_on_one_rank_is_one_message_on_all_and_ends_the_work(tmp_path):
    for failing in ({1: "one"}, {1: "one", 2: "two"}):
        ends = run_ranks(3, tmp_path, _share_and_fail, failing)
        assert [errors for errors, _ in ends] in ([[("UserError", text)]] * 3 for text in ("one", "two"))
        assert sum(taken for _, taken in ends) < 50_000, "the others go on although the work has failed"


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("bad file", ("BadFile", "data: x"), ("BadFile", "data: x")),
        ("full", *[("OSError", "[Errno 28] No space left on device: '/disk/x'")] * 2),
        ("unsent", ("Unsent", "x bad"), ("RuntimeError", "rank 1: Unsent: x bad")),
    ],
)
def test_an_error_of_any_kind_ends_the_work_of_all_ranks(kind, own, others, tmp_path):
    (first, taken), (second, _) = run_ranks(2, tmp_path, _share_and_fail, {1: "x"}, kind)
    assert (first, second) == ([others], [own])
    assert taken < 50_000, "rank 0 goes on although the work has failed"


def _fail_on_main(kind: str) -> tuple[str, str, list]:
    def fail() -> None:
        raise ERRORS[kind]("x")

    try:
        dist.on_main(fail)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "rows", [])
    raise AssertionError("no error")


def test_an_error_on_the_main_rank_has_its_kind_on_all(tmp_path):
    ends = run_ranks(2, tmp_path, work.each, _fail_on_main, ["bad file", "full", "unsent"])
    assert ends[0] == [
        ("BadFile", "data: x", [("a.png", "x")]),
        ("OSError", "[Errno 28] No space left on device: '/disk/x'", []),
        ("Unsent", "x bad", []),
    ]
    assert ends[1] == [*ends[0][:2], ("RuntimeError", "rank 0: Unsent: x bad", [])]


def _command(where: str, failing: int) -> tuple[int, str]:
    """Status of a command that a rank cannot go on with, and what this rank says of it."""

    def body() -> int:
        with dist.shared(20, 1) as mine:
            for _ in mine:
                time.sleep(0.001)
                if where == "shared" and dist.rank() == failing:
                    raise UserError("data: x")
        if dist.rank() == failing:
            raise UserError("data: x")
        return 0

    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = run_command(body)
    return status, said.getvalue()


def test_what_one_rank_meets_is_said_there_and_what_all_raise_by_the_first(tmp_path):
    everywhere, alone = (run_ranks(2, tmp_path, _command, where, 1) for where in ("shared", "alone"))
    assert everywhere == [(2, "error: data: x\n"), (2, "")]
    assert alone == [(0, ""), (2, "error on rank 1: data: x\n")]


def test_a_rank_0_that_is_gone_is_one_sentence(capsys):
    def body() -> int:
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.\nframe #0")

    assert run_command(body) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: launch: another rank is gone") and "got 0 bytes" in said and said.count("\n") == 1


def _interrupted(slow: bool) -> tuple[int, str, int]:
    """A signal on rank 1 at its second number: status of the command, what it says, and how many were left."""
    taken = []

    def body() -> int:
        with interruptible():
            with dist.shared(200 if slow else 2, 1) as mine:
                for k in mine:
                    taken.append(k)
                    if dist.rank() == dist.world_size() - 1 and len(taken) == (2 if slow else 1):
                        os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.05)
            return 0

    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = run_command(body)
    return status, said.getvalue(), len(taken)


def test_a_signal_ends_the_work_of_all_ranks_after_the_image_in_work(tmp_path):
    for ranks in (1, 2):
        ends = run_ranks(ranks, tmp_path, _interrupted, True)
        assert [status for status, *_ in ends] == [75] * ranks
        assert ends[-1][2] == 2 and sum(taken for *_, taken in ends) < 50
        assert [said for _, said, _ in ends] == ["stopped by SIGTERM; the same command goes on from here\n", ""][:ranks]
    assert [status for status, *_ in run_ranks(2, tmp_path, _interrupted, False)] == [0, 0], "all was done already"


def test_a_second_signal_acts_as_usual_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible(), interruptible():
        assert received() is None
        signal.raise_signal(signal.SIGINT)
        assert received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert received() is None and signal.getsignal(signal.SIGINT) is before
