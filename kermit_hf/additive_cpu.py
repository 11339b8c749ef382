"""The additive rule as kernels for CPUs, in float32: `additive_chunked` without its passes over memory. See additive_cpu.cpp."""

import torch

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .functions import first_derivative_only
from .kernel_attention import KernelMemory, KernelReadout, empty_memory
from .slots import Parts, gradients_so_far


def additive_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    divides: bool = False,
) -> KernelReadout:
    """`additive_chunked`, everything in float32. First derivatives only. divides: see `backends.Kernel`."""
    return _run(query, key, value, log_forget, memory, None, False, divides)[0]


def additive_elu_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    key_mask: torch.Tensor | None = None,
    divides: bool = False,
) -> KernelReadout:
    """The same of queries and keys before the feature map "elu", which is applied here.

    key_mask (batch or 1, 1, seq) is zero at tokens that leave the memory as it is; their log_forget has to be zero too.
    """
    return _run(query, key, value, log_forget, memory, key_mask, True, divides)[0]


def additive_elu_of_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Parts,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    key_mask: torch.Tensor | None = None,
    divides: bool = False,
) -> tuple[KernelReadout, tuple[torch.Tensor, ...]]:
    """The same of parts of query, key and value. Also these three as a whole: see `Parts`."""
    return _run(query, key, value, log_forget, memory, key_mask, True, divides, parts)


def _run(query, key, value, log_forget, memory, key_mask, elu, divides, parts=None):
    query, key, value = (contiguous_rows(tensor) for tensor in (query, key, value))
    log_forget = None if log_forget is None else log_forget.float()
    if key_mask is not None:
        key_mask = key_mask.float().expand(*key.shape[:2], key_mask.shape[2])
    memory = empty_memory(key, value, normalized=True) if memory is None else memory
    matrix, normalizer = memory.matrix.float(), memory.normalizer.float()
    read = _AdditiveFused.apply(query, key, value, log_forget, key_mask, matrix, normalizer, elu, divides, parts)
    return KernelReadout(*read[:2], KernelMemory(*read[2:4])), read[4:]


class _AdditiveFused(torch.autograd.Function):
    """Takes states, gate, mask and the first memory one by one. Returns numerator, denominator and the last memory, and with `parts`
    the states again."""

    @staticmethod
    def forward(ctx, query, key, value, log_forget, key_mask, matrix, normalizer, elu, divides, parts):
        states = query, key, value
        rest = [tensor.view_as(tensor) for tensor in states] if parts else []
        inputs = *(parts.of(*states) if parts else states), log_forget, key_mask
        last = _copy(matrix), _copy(normalizer)
        keeps = any(ctx.needs_input_grad)
        forward = load_cpu_kernels("kermit_hf").additive_forward
        numerator, denominator, *kept = forward(*inputs, *last, elu, divides, keeps)
        ctx.save_for_backward(*inputs, numerator if divides else query, denominator, *kept)
        ctx.parts, ctx.shapes = parts, [tensor.shape for tensor in rest]
        ctx.memory_shape = matrix.shape
        ctx.options = elu, divides
        ctx.set_materialize_grads(False)
        return numerator, denominator, *last, *rest

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_numerator, grad_denominator, grad_matrix, grad_normalizer, *grad_rest):
        saved = ctx.saved_tensors
        shape = ctx.memory_shape
        grad_numerator = None if grad_numerator is None else contiguous_rows(grad_numerator)
        grad_memory = [
            saved[0].new_zeros(size) if grad is None else _copy(grad)
            for grad, size in ((grad_matrix, shape), (grad_normalizer, shape[:3]))
        ]
        sums = gradients_so_far(grad_rest, ctx.shapes, grad_memory[0])
        grads, grad_log_forget = load_cpu_kernels("kermit_hf").additive_backward(
            *saved, grad_numerator, grad_denominator, *grad_memory, *ctx.options, ctx.parts.of(*sums) if sums else []
        )
        needed = ctx.needs_input_grad
        grads = [*(sums or grads), grad_log_forget, None, *grad_memory]
        return *(grad if wanted else None for grad, wanted in zip(grads, needed[:7], strict=True)), None, None, None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
