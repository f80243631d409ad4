"""Autograd of losses whose forward ops return the gradient with the loss: backward only scales it."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("wsss_python::contrast_backward", mutates_args=())
def contrast_backward(grad: Tensor, gradient: Tensor, tokens: Tensor) -> Tensor:
    """grad * gradient in the dtype of `tokens`."""
    return (grad * gradient).to(tokens.dtype)


@contrast_backward.register_fake
def _fake(grad, gradient, tokens):
    return tokens.new_empty(tokens.shape)


def _second_gradient(ctx, grad):
    ops = "path_affinity_loss, patch_token_contrast, class_patch_contrast"
    raise RuntimeError(f"{ops}: the gradient itself is not differentiable")


contrast_backward.register_autograd(_second_gradient)


def wanted(tokens: Tensor) -> bool:
    """Whether a gradient with respect to `tokens` may be asked for."""
    return tokens.requires_grad and torch.is_grad_enabled()


def register_gradient(forward: str) -> None:
    """Autograd of an op (tokens, ..., with_gradient) -> (loss, gradient with respect to tokens)."""

    def setup(ctx, inputs, output):
        ctx.constants = len(inputs) - 1
        ctx.save_for_backward(output[1], inputs[0])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        gradient, tokens = ctx.saved_tensors
        if grad is None:
            return (None,) * (ctx.constants + 1)
        if gradient.shape != tokens.shape:
            raise RuntimeError(f"{forward} was called with with_gradient=False, so it has no gradient")
        return contrast_backward(grad, gradient, tokens), *(None,) * ctx.constants

    torch.library.register_autograd(forward, backward, setup_context=setup)


def fake_outputs(tokens: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Shapes of what the forward ops return."""
    gradient = tokens.new_empty(tokens.shape if with_gradient else (0,), dtype=torch.float32)
    return tokens.new_empty((), dtype=torch.float32), gradient
