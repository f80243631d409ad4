"""How the layers of a method compute while it trains: memory layout of the convolutions, compiled blocks.

No weight changes its name, its shape or its value, so checkpoints are the same with and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.resnet import ResNet
from wsss_dist.models.vit import ViT

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig

BLOCKS = (BasicBlock, Bottleneck, ResNestBottleneck)
# versions of a block: with and without gradient, its kinds, and the sizes it meets, from the second on as one
VARIANTS = 64


def prepare(method: nn.Module, cfg: RunConfig) -> None:
    """Do to a method, in place, what `train.channels_last` and `train.compile` ask for.

    Raises:
        UserError: the method has nothing that it could be done to.
    """
    if cfg.train.channels_last:
        _channels_last(method, cfg.method_name, weights=cfg.train.engine == "plain")
    if cfg.train.compile:
        _compile(method, cfg.method_name)


def images_of(images: Tensor, channels_last: bool) -> Tensor:
    """Images [B, 3, H, W] in the layout of the convolutions."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def _channels_last(method: nn.Module, name: str, *, weights: bool) -> None:
    """Convolution weights in channels_last where `weights`, in a network of convolutions alone.

    Else the layout of the images decides, and a convolution turns its weights round at each call: DeepSpeed
    cannot send weights in this layout, and ZeRO lays them out anew.
    """
    convs = [m for m in method.modules() if isinstance(m, nn.Conv2d)]
    if not convs or any(isinstance(m, ViT) for m in method.modules()):
        raise UserError(
            f"config: 'train.channels_last' is for convolutional networks, but that of method '{name}' is none; "
            "remove it"
        )
    for conv in convs if weights else []:
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def _compile(method: nn.Module, name: str, backend: str = "inductor") -> None:
    """Compile block by block: equal blocks share one compilation, and modules stay where they are."""
    vits = [m for m in method.modules() if isinstance(m, ViT)]
    blocks = [m for m in method.modules() if isinstance(m, BLOCKS)]
    if not vits and not blocks:
        raise UserError(
            f"config: 'train.compile' is true, but method '{name}' has no block of a ViT or a ResNet that could be "
            "compiled; set train.compile: false"
        )
    if any(isinstance(m, ResNet) and m.cfg.recompute for m in method.modules()):
        raise UserError(
            "config: 'train.compile' and 'recompute' of a ResNet exclude each other: its BatchNorm is another one in "
            "the second pass; set one of the two to false"
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for vit in vits:
        vit.compile_blocks(fullgraph=True, backend=backend)  # what cannot be compiled whole, or too often, is an error
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)


@contextmanager
def _one_sentence() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"config: 'train.compile' is true, but torch.compile fails on this machine ({reason}); "
            "set train.compile: false"
        ) from error


def compiler_errors(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, an error of the compiler becomes a UserError."""
    return _one_sentence() if compiled else nullcontext()


def as_written(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, compiled blocks run uncompiled: images of many sizes, and the results of every other program."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
