"""Running a training step without its memory: tensors that have a shape and a type but no values.

What depends on values gets plausible ones: every image has the same number of tags, a number that is asked for is 1,
and nothing is true: a loop that draws until no value is outside ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wsss_dist.data.batch import Batch

aten = torch.ops.aten
# functions that autocast computes in fp32 on CUDA and not on the CPU, of those that a method may call in bf16
FP32_ON_CUDA = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "normalize", "norm", "cosine_similarity", "sum", "prod"),
    *("cumsum", "exp", "log", "log1p", "pow", "rsqrt", "reciprocal", "softplus", "cross_entropy", "nll_loss"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "soft_margin_loss"),
}


class Fake:
    """Tensors made while it is entered are fake; enter it as often as needed.

    Args:
        tags: of every image.
        cuda: autocast, and what asks for it, as on a GPU; the device of the tensors stays the CPU.
    """

    def __init__(self, tags: int, cuda: bool):
        self._mode, self._values = FakeTensorMode(), _Values(tags)
        self._others = [_AsOnCuda()] if cuda else []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Fake tensors inside; the operators are told that they are compiled, and so do not look at values."""
        with ExitStack() as stack:
            stack.callback(setattr, torch.compiler, "is_compiling", torch.compiler.is_compiling)
            torch.compiler.is_compiling = lambda: True
            for mode in (self._mode, self._values, *self._others):
                stack.enter_context(mode)
            yield


class _Values(TorchDispatchMode):
    """Answers what a fake tensor cannot: its values."""

    def __init__(self, tags: int):
        super().__init__()
        self.tags = tags

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is aten.nonzero.default:  # of tags [B, C], or of the pairs [P] that belong to one image
            x = args[0]
            count = self.tags if x.dim() == 1 else len(x) * self.tags
            return x.new_empty((count, x.dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class _AsOnCuda(TorchFunctionMode):
    """Tensors are on a GPU for who asks, and the CPU's autocast has the fp32 functions of the GPU's."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if getattr(func, "__name__", "") in FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(a) for a in args)
            kwargs = {k: _widened(a) for k, a in kwargs.items()}
        return func(*args, **kwargs)


_IS_CUDA = Tensor.is_cuda.__get__


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


def fake_batch(one: Batch, size: int) -> Batch:
    """A batch of `size` images like the only one of `one`; fake while a `Fake` is entered."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty((size, *x.shape[1:]), dtype=x.dtype)

    found = {f.name: getattr(one, f.name) for f in fields(one)}
    tensors = {name: empty(x) for name, x in found.items() if isinstance(x, Tensor)}
    return replace(one, **tensors, ids=one.ids * size, maps={name: empty(x) for name, x in one.maps.items()})


def backward(loss: Tensor) -> None:
    """loss.backward(), but with the function modes of `Fake` on, which that leaves: blocks are computed again in it."""
    ones = torch.ones_like(loss)
    _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
