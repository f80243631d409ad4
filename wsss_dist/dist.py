"""Ranks and collectives. The only file that imports torch.distributed.

Every helper also works in a single process without a process group: reductions return a copy, gathers a stack
of one.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from wsss_dist.errors import Interrupted, TrainingError, UserError, collective
from wsss_dist.launchers import adopt_slurm, launched
from wsss_dist.signals import received, signal_name

T = TypeVar("T")
_COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list", "barrier"),
)
# raised where rank 0, which keeps the store that the ranks have in common, is gone
STORE_LOST = (td.DistNetworkError, td.DistStoreError)
# seconds that the ranks wait for each other at the start: nodes of one job do not start at the same time
MEET_S = 600
# what Slurm sets where it gives each task GPUs of its own
_BOUND = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK")


def init(
    timeout_s: int = 1800,
    *,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    single_group: bool = False,
) -> None:
    """Join the process group: nccl where a GPU is, gloo otherwise; does nothing when the group exists already.

    Ranks come from the arguments, else from the environment (see launchers.py), else there is one process. LOCAL_RANK
    picks the GPU.

    Args:
        timeout_s: seconds after which a collective that a rank does not answer fails. At the start the ranks wait
            MEET_S for each other, if that is less.
        init_method: where the ranks meet ("file:///path", "tcp://host:port"); None: the environment.
        rank, world_size: this process and the number of them; None: the environment.
        single_group: also make a (one-member) group when there is a single process; DeepSpeed needs one.
    Raises:
        UserError: the environment contradicts itself, the ranks do not meet, or there are more local ranks than GPUs.
    """
    by_slurm = adopt_slurm()
    if torch.cuda.is_available():
        _choose_gpu(by_slurm)
    if td.is_initialized():
        set_timeouts(timeout_s)
        return
    backend, meet_s = "nccl" if torch.cuda.is_available() else "gloo", min(timeout_s, MEET_S)
    found = launched() if rank is None else None
    if found is not None:
        rank, world_size = found
        if rank > 0:
            _await_first_rank(rank, world_size, meet_s)
    if rank is not None:
        _meet(backend, meet_s, init_method, rank, world_size)
        td.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=timeout_s))
        set_timeouts(timeout_s)
    elif single_group:
        timeout = timedelta(seconds=timeout_s)
        td.init_process_group(backend, store=td.HashStore(), timeout=timeout, rank=0, world_size=1)


def init_fake(rank: int, world_size: int) -> None:
    """Be one rank of a group whose other members do not exist: every collective returns at once and moves nothing.

    For counting what a rank of 1,000 asks for; what it computes is worthless.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    td.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def _choose_gpu(by_slurm: bool) -> None:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if by_slurm and count == 1 and any(name in os.environ for name in _BOUND):
        os.environ["LOCAL_RANK"], local = "0", 0  # each task sees its own GPU alone, as number 0
    if local >= count:
        raise UserError(f"launch: local rank {local} has no GPU, there are {count}; start fewer ranks")
    torch.cuda.set_device(local)


def _await_first_rank(rank: int, world_size: int, meet_s: int) -> None:
    """Wait until the first rank listens; torch would wait too, but not say why in vain: no such name, refused, silence.

    Raises:
        UserError: it did not within `meet_s` seconds.
    """
    address, port, end = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), time.monotonic() + meet_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(10, end - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() + 0.2 > end:
                raise UserError(
                    f"launch: rank {rank} of {world_size} on {socket.gethostname()} cannot reach the first rank at "
                    f"{address}, MASTER_PORT is {port} (after {meet_s} s: {error.strerror or error}); start the first "
                    "node too, give every node its address and port, and let them through the firewall"
                ) from None
        time.sleep(0.2)


def _meet(backend: str, meet_s: int, init_method: str | None, rank: int, world_size: int | None) -> None:
    timeout = timedelta(seconds=meet_s)
    try:
        td.init_process_group(backend, init_method=init_method, timeout=timeout, rank=rank, world_size=world_size)
    except (ValueError, RuntimeError) as error:  # among them td.DistError, and gloo's own
        port, reason = os.environ.get("MASTER_PORT", "not set"), str(error).partition("\n")[0].rstrip(".")
        if "address already in use" in reason.lower():
            fix = "take another --master_port: a second run on this machine has this one"
        else:
            fix = (
                f"look at the {world_size} ranks: all have to come within {meet_s} s, from nodes that reach each other "
                "(GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface, where a node has several)"
            )
        raise UserError(f"launch: the ranks cannot meet, MASTER_PORT is {port} ({reason}); {fix}") from None


def set_timeouts(timeout_s: int) -> None:
    """Give every group this process belongs to the same time-out; new groups do not inherit the one given to `init`."""
    for group in list(td.distributed_c10d._world.pg_map) if td.is_initialized() else ():
        td.set_timeout(timedelta(seconds=timeout_s), group)


def shutdown() -> None:
    """Leave the process group; a no-op without one. Another one may be joined then."""
    if not td.is_initialized():
        return
    # where DeepSpeed is in use it keeps groups of its own, which only its own way of leaving lets go
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    """This process, 0 .. world_size() - 1."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes, at least 1."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Is this the rank that prints and writes?"""
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _reduce(tensor: Tensor, op: Any) -> Tensor:
    reduced = tensor.detach().to(device(), copy=True)
    td.all_reduce(reduced, op=op)
    return reduced.to(tensor.device)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, any dtype, as a new tensor on the device of the input; no gradient."""
    return tensor.detach().clone() if world_size() == 1 else _reduce(tensor, td.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks of a floating tensor, as a new tensor on the device of the input; no gradient."""
    if not tensor.is_floating_point():
        raise TypeError(f"dist: all_reduce_mean needs a floating tensor, got {tensor.dtype}; use all_reduce_sum")
    return all_reduce_sum(tensor) / world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """Stack a tensor of the same shape on every rank: [...] -> [world_size, ...], in order of rank; no gradient."""
    if world_size() == 1:
        return tensor.detach().clone()[None]
    mine = tensor.detach().to(device()).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    td.all_gather(parts, mine)
    return torch.stack(parts).to(tensor.device)


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_gather(tensor).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad).unflatten(0, (world_size(), -1))[rank()]


def gather_batch(tensor: Tensor) -> Tensor:
    """[B, ...] on every rank -> [world_size * B, ...], in order of rank, with gradient.

    For losses between all images of a global batch: every rank computes the same loss from the gathered tensor, and
    the mean over the ranks of their gradients is the gradient of one rank with the whole batch. A collective call,
    forward and backward; B is the same on every rank.
    """
    return _GatherBatch.apply(tensor)


class _BatchMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        largest = all_gather(value).amax(0)
        ctx.save_for_backward(value == largest)
        return largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (mine,) = ctx.saved_tensors
        grad, owners = all_reduce_sum(torch.stack([grad, mine.to(grad)]))
        return grad * mine / owners


def batch_max(value: Tensor) -> Tensor:
    """Elementwise maximum over ranks, with gradient: that of all ranks goes to the one that holds the maximum.

    Ranks with the same maximum share it. A collective call, forward and backward.
    """
    return _BatchMax.apply(value)


def broadcast(tensor: Tensor, src: int = 0) -> None:
    """Overwrite a contiguous tensor with the one of rank `src`, in place."""
    if world_size() == 1:
        return
    data = tensor.detach()
    moved = data.to(device())
    td.broadcast(moved, src)
    if moved.data_ptr() != data.data_ptr():
        data.copy_(moved)


def collectives() -> tuple[ModuleType, list[str]]:
    """The module that every collective goes through, DeepSpeed's too, and their names in it; for who times them."""
    return td, [name for name in _COLLECTIVES if hasattr(td, name)]


def all_gather_object(value: T) -> list[T]:
    """Every rank's picklable value, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    td.all_gather_object(out, value)
    return out


def broadcast_object(value: T, src: int = 0) -> T:
    """The picklable value of rank `src`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src)
    return box[0]


_ranges = 0


@contextmanager
def shared(total: int, block: int = 4) -> Iterator[Iterator[int]]:
    """0 .. total - 1 for `with shared(n) as mine`, each handed to one rank, whoever asks first: a slow one gets fewer.

    Ascending on every rank; one that gets the first of a block gets all of it. Every rank has to enter, in the same
    order among such calls, and leaving is a collective call.

    Args:
        total: how many.
        block: so many in a row go to one rank.
    Raises:
        Exception: on every rank the one that was raised inside on any (the first of them); no rank is handed more
            then. Where it cannot be sent it is a RuntimeError on the others, with the rank and the text.
        Interrupted: on every rank, where a signal came on any before all was handed out; see signals.interruptible.
    """
    global _ranges
    _ranges += 1
    store, key = (td.distributed_c10d._get_default_store() if world_size() > 1 else None), f"wsss_dist/range/{_ranges}"

    def stop() -> None:
        if store is not None:
            store.add(key, total)

    error, left = None, []
    try:
        yield _until_signal(range(total) if store is None else _handed_out(store, key, total, block), left, stop)
    except STORE_LOST:  # rank 0 is gone, so there is nobody to tell
        raise
    except Exception as caught:
        error = caught
    _leave_shared(error, left, stop)


def _until_signal(numbers: Iterable[int], left: list[int], stop: Callable[[], None]) -> Iterator[int]:
    """The numbers up to a signal, which is put into `left` and keeps every rank from being handed more."""
    for number in numbers:
        if (signal := received()) is not None:
            left.append(signal)
            stop()
            return
        yield number


def _handed_out(store: Any, key: str, total: int, block: int) -> Iterator[int]:
    while (start := (store.add(key, 1) - 1) * block) < total:
        yield from range(start, min(start + block, total))


def _leave_shared(error: Exception | None, left: list[int], stop: Callable[[], None]) -> None:
    """Raise on every rank what one of them met, or say that a signal ended the work."""
    try:
        if error is not None:
            stop()
        found = all_gather_object((error and _sendable(error), left))
    except Exception:
        if error is not None:  # it came first, and may be why the others are gone
            raise error from None
        raise
    for number, (sent, _) in enumerate(found):
        if sent is not None and number == rank():
            # a full disk is that of this node, which says so too
            raise collective(error) if isinstance(error, UserError | TrainingError) else error
        if sent is not None:
            sent.add_note(f"raised on rank {number}")
            raise collective(sent)
    if signals := [signal for _, of_rank in found for signal in of_rank]:
        raise collective(Interrupted(f"stopped by {signal_name(signals[0])}; the same command goes on from here"))


def _sendable(error: Exception) -> Exception:
    """The error itself where another process gets the same, else a RuntimeError that says whose it is."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  made one line above
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: S110  of any kind: it is the class of the error that does it
        pass
    return RuntimeError(f"rank {rank()}: {type(error).__name__}: {error}")


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1)).item()


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and hand its (picklable) result, or its exception, to every rank.

    An exception that cannot be sent is a RuntimeError on the other ranks, with its text.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = caught
    result, sent = broadcast_object((result, error and _sendable(error)))
    if sent is not None:
        raise collective(error or sent)
    return result
