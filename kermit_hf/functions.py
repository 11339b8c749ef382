"""How autograd functions with `setup_context` are called."""

import torch


def apply_function(function: type[torch.autograd.Function], *inputs):
    """`function.apply(*inputs)`, of which without gradients only `forward` is left: `apply` itself takes longer than ten of
    torch's operators on one token."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(*inputs)
