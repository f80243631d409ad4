"""Bytes of the tensors that are alive, at any moment and at their peak, as the allocator of a device would see them.

Every operation is looked at as it is dispatched: a storage counts from the operation that made it to the moment that
nothing holds it any more. That needs no memory where the tensors are fake. What an operation allocates and frees inside
itself is not seen; `scratch` adds what is known of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes that torch's CUDA allocator rounds up to


class Live(TorchDispatchMode):
    """Counts live bytes while it is entered, in blocks of 512; read `now` and `peak`.

    Tensors that were there before count if they were given to `known`, which keeps them apart from the rest.

    Args:
        scratch: bytes that an operation takes for itself while it runs, of the operation and its arguments.
        parameters: whose gradients (`grad`) are told apart.
        share: of the gradients that counts for the peak: 0 where they are handed over as soon as they are made.
        kept: bytes of gradients that are there from the start, of micro batches before.
    """

    def __init__(
        self,
        scratch: Callable[[Any, tuple], int] | None = None,
        parameters: Iterable[Tensor] = (),
        share: float = 1.0,
        kept: int = 0,
    ):
        super().__init__()
        self.parameters, self.share, self.kept = list(parameters), share, kept
        self.now = self.grads = 0  # bytes alive, without and of the gradients
        self.peak = self.peak_grads = 0.0  # of both together, and the share of the gradients in it
        self.peak_op = ""
        self._scratch = scratch
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref] = {}
        self._gradient: set[int] = set()
        self._handles: list[Any] = []

    def known(self, tensors: Iterable[Tensor]) -> int:
        """Leave the storages of these tensors out of the count; their bytes."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                total += _blocks(storage.nbytes())
                self._watch(storage, 0)
        return total

    def __enter__(self) -> Live:
        for parameter in self.parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._is_gradient))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._made(leaf)
        own = self._scratch(func, args) if self._scratch is not None else 0
        grads = self.share * max(self.grads, self.kept)
        if self.now + own + grads > self.peak:
            self.peak, self.peak_grads, self.peak_op = self.now + own + grads, grads, str(func)
        return out

    def _made(self, tensor: Tensor) -> None:
        with suppress(NotImplementedError):  # a tensor without storage
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                size = _blocks(storage.nbytes())
                self.now += size
                self._watch(storage, size)

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        self._sizes[key] = size
        self._refs[key] = weakref.ref(storage, lambda _, key=key: self._freed(key))

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._refs[key]
        if key in self._gradient:
            self._gradient.discard(key)
            self.grads -= size
        else:
            self.now -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        key = id(parameter.grad.untyped_storage())
        if key not in self._gradient and key in self._sizes:
            self._gradient.add(key)
            self.now -= self._sizes[key]
            self.grads += self._sizes[key]


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
