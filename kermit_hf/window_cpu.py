"""The near field and its merging with sinks and far field as kernels for CPUs, in float32: `window_blocked` without its
passes over memory. See window_cpu.cpp; the gradients' formulas are those of `window_triton`.
"""

import torch

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .window_attention import FarField, Sinks, WindowOutput, window_blocked


def window_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: int,
    first_real: int | torch.Tensor = 0,
    sinks: Sinks | None = None,
    far: FarField | None = None,
    is_causal: bool = True,
    dropout: float = 0.0,
) -> WindowOutput:
    """The formula of `window_attention`; with dropout by `window_blocked`. Shapes: see there. First derivatives only."""
    if dropout > 0.0:
        return window_blocked(query, key, value, window_size, first_real, sinks, far, is_causal, dropout)
    if not isinstance(first_real, torch.Tensor):
        first_real = torch.full((query.shape[0],), first_real)
    sinks = (None, None) if sinks is None else [contiguous_rows(tensor) for tensor in sinks]
    far = (None, None) if far is None else [contiguous_rows(far.value), far.logit.float()]
    states = [contiguous_rows(tensor) for tensor in (query, key, value)]
    output = _FusedWindow.apply(*states, *sinks, *far, first_real.long().contiguous(), window_size, is_causal)
    return WindowOutput(output)


class _FusedWindow(torch.autograd.Function):
    """Takes the parts one by one."""

    @staticmethod
    def forward(ctx, *arguments):
        output, *sums = load_cpu_kernels("kermit_hf").window_forward(*arguments)
        ctx.save_for_backward(*arguments[:-2], output, *sums)
        ctx.window, ctx.is_causal = arguments[-2:]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = load_cpu_kernels("kermit_hf").window_backward(
            *ctx.saved_tensors, contiguous_rows(grad), ctx.window, ctx.is_causal
        )
        return *grads, None, None, None
