"""Second derivatives of autograd functions that only have first ones: an error, never a wrong number."""

from collections.abc import Callable
from functools import wraps

import torch


def first_derivative_only(backward: Callable) -> Callable:
    """For the `backward` of an autograd function that saves all inputs it depends on.

    torch's `once_differentiable` raises only where the second derivative is taken to something that leads through the first
    one: `torch.autograd.grad` to a weight in front of the function goes past it, and leaves out what the function adds.
    """

    @wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(
            None if gradient is None else _Last.apply(gradient, *grads, *ctx.saved_tensors) for gradient in gradients
        )

    return wrapper


class _Last(torch.autograd.Function):
    """A gradient, as a function of everything it depends on."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "second derivatives are not implemented for this form of attention; allowed is attn_implementation='eager'"
        )
