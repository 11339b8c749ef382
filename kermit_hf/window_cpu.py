"""The near field and its merging with sinks and far field as kernels for CPUs, in float32: rotary positions, the scores of sinks
and `window_blocked` without their passes over memory. See window_cpu.cpp; the gradients' formulas are those of `window_triton`.
"""

import torch

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .functions import first_derivative_only
from .window_attention import FarField


def window_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: int,
    first_real: int | torch.Tensor = 0,
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None,
    far: FarField | None = None,
    is_causal: bool = True,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The formula of `window_attention` without dropout, of queries and keys before their positions and `scaling`. First derivatives
    only.

    Args:
        query, key, value, first_real: see `window_attention`.
        sinks: keys, scaled and turned back by their distance (see `kermit_attention._turned_sink_keys`), and values of the sinks, both
            (batch, kv_heads, sinks, head_dim); each is seen once it lies behind the window.
        far: of the last queries, as many as it has rows; those before them have none.
        rotary: cosine and sine of slot numbers, both (slots or more, head_dim / 2 or more), without gradients.
        scaling: of the scores of keys.

    Returns (batch, heads, seq, head_dim).
    """
    if not isinstance(first_real, torch.Tensor):
        first_real = torch.full((query.shape[0],), first_real)
    states = [contiguous_rows(tensor) for tensor in (query, key, value)]
    rotary = (None, None) if rotary is None else [contiguous_rows(table) for table in rotary]
    sinks = (None, None) if sinks is None else [contiguous_rows(tensor) for tensor in sinks]
    far = (None, None) if far is None else [contiguous_rows(far.value), far.logit.float()]
    numbers = first_real.long().contiguous(), scaling, window_size, is_causal
    return _FusedWindow.apply(*states, *rotary, *sinks, *far, *numbers)


class _FusedWindow(torch.autograd.Function):
    """Takes the parts one by one."""

    @staticmethod
    def forward(ctx, *arguments):
        output, *sums = load_cpu_kernels("kermit_hf").window_forward(*arguments)
        ctx.save_for_backward(*arguments[:-3], output, *sums)
        ctx.numbers = arguments[-3:]
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        kernels = load_cpu_kernels("kermit_hf")
        grads = kernels.window_backward(*ctx.saved_tensors, contiguous_rows(grad), *ctx.numbers)
        states, others = grads[:3], grads[3:]
        return *states, None, None, *others, None, None, None, None
