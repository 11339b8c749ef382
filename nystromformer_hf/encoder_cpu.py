"""Nyström attention of an encoder and the convolution of its values in one C++ kernel, forward and backward."""

import torch

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .functions import first_derivative_only


def nystrom_attention_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    lengths: torch.Tensor | None = None,
    kernels: torch.Tensor | None = None,
    inverse_iterations: int = 6,
    inverse_init: str = "original",
) -> torch.Tensor:
    """`nystrom_attention` and, with kernels (heads, kernel_size), `value_convolution` added; first derivatives only.

    Every row must have more real tokens than there are landmarks. float32 on a CPU. Shapes: see `nystrom_attention`.
    """
    states = [contiguous_rows(tensor) for tensor in (query, key, value)]
    return _FusedAttention.apply(
        *states, kernels, lengths, num_landmarks, inverse_iterations, inverse_init == "original"
    )


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, kernels, lengths, num_landmarks, iterations, shared_norm):
        states = query, key, value, None if kernels is None else kernels.contiguous(), lengths
        kept = load_cpu_kernels("nystromformer_hf").nystrom_forward(*states, num_landmarks, iterations, shared_norm)
        ctx.save_for_backward(*states, *kept[1:])
        ctx.options = iterations, shared_norm
        return kept[0]

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        kernels = load_cpu_kernels("nystromformer_hf")
        grads = kernels.nystrom_backward(contiguous_rows(grad), *ctx.saved_tensors, *ctx.options)
        grad_kernels = grads[3].sum((0, 2)) if ctx.needs_input_grad[3] else None
        return *grads[:3], grad_kernels, None, None, None, None
