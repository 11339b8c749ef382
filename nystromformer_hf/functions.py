"""How autograd functions are called and differentiated."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd.function import once_differentiable


def apply_function(function: type[torch.autograd.Function], *inputs):
    """`function.apply(*inputs)`, of which without gradients only `forward` is left: `apply` itself takes longer than ten of
    torch's operators on one token."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(*inputs)


def first_derivative_only(backward: Callable) -> Callable:
    """Marks a `backward` that has no gradient itself: `RuntimeError` where `create_graph=True` asks for one. With torch's
    `once_differentiable` alone, `torch.autograd.grad` of a gradient leaves this function's part out and says nothing."""
    backward = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: second derivatives are not implemented for this form of attention; allowed is "
                "attn_implementation='eager'"
            )
        return backward(ctx, *grads)

    return checked
