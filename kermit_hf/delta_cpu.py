"""The delta rule and the norm behind it as kernels for CPUs, in float32: `delta_chunked` and `LlamaRMSNorm` without their
passes over memory. See delta_cpu.cpp."""

import torch

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .functions import first_derivative_only
from .kernel_attention import KernelMemory, KernelReadout
from .slots import Parts, gradients_so_far


def delta_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """`delta_chunked`, everything in float32. First derivatives only."""
    return _run(query, key, value, write_strength, log_forget, memory, False)[0]


def delta_silu_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """The same of queries and keys before the feature map "silu_l2", which is applied here."""
    return _run(query, key, value, write_strength, log_forget, memory, True)[0]


def delta_silu_of_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Parts,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> tuple[KernelReadout, tuple[torch.Tensor, ...]]:
    """The same of parts of query, key and value. Also these three as a whole: see `Parts`."""
    return _run(query, key, value, write_strength, log_forget, memory, True, parts)


def _run(query, key, value, write_strength, log_forget, memory, maps, parts=None):
    states = (contiguous_rows(tensor) for tensor in (query, key, value))
    gates = (gate if gate is None else gate.float() for gate in (write_strength, log_forget))
    matrix = None if memory is None else memory.matrix.float()
    numerator, matrix, *rest = _DeltaFused.apply(*states, *gates, matrix, maps, parts)
    return KernelReadout(numerator, None, KernelMemory(matrix)), tuple(rest)


class _DeltaFused(torch.autograd.Function):
    """Takes states, gates and the first memory one by one. Returns the numerator and the last memory, and with `parts` the states
    again."""

    @staticmethod
    def forward(ctx, query, key, value, write_strength, log_forget, matrix, maps, parts):
        states = query, key, value
        rest = [tensor.view_as(tensor) for tensor in states] if parts else []
        inputs = *(parts.of(*states) if parts else states), write_strength, log_forget
        matrix = None if matrix is None else matrix.contiguous()
        keeps = any(ctx.needs_input_grad)
        numerator, last, matrices, written = load_cpu_kernels("kermit_hf").delta_forward(*inputs, matrix, maps, keeps)
        ctx.save_for_backward(*inputs, matrices, written)
        ctx.maps, ctx.parts, ctx.shapes = maps, parts, [tensor.shape for tensor in rest]
        ctx.read_shapes = numerator.shape, last.shape
        ctx.set_materialize_grads(False)
        return numerator, last, *rest

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_numerator, grad_matrix, *grad_rest):
        saved = ctx.saved_tensors  # once: gradient checkpointing refuses a second time
        sums = gradients_so_far(grad_rest, ctx.shapes, saved[0])
        grad_numerator, grad_matrix = gradients_so_far((grad_numerator, grad_matrix), ctx.read_shapes, saved[0])
        grads, *grad_gates, grad_first = load_cpu_kernels("kermit_hf").delta_backward(
            *saved,
            contiguous_rows(grad_numerator),
            grad_matrix.contiguous(),
            ctx.maps,
            ctx.parts.of(*sums) if sums else [],
        )
        grads = [*(sums or grads), *grad_gates, grad_first]
        needed = ctx.needs_input_grad
        return *(grad if wanted else None for grad, wanted in zip(grads, needed[:6], strict=True)), None, None


def rms_norm_fused(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467) of states (batch, heads, seq,
    dim). Without a gradient they are overwritten by it. First derivatives only."""
    states, weight = states.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        return _RmsNormFused.apply(states, weight, eps)
    load_cpu_kernels("kermit_hf").rms_norm_forward(states, weight, eps, states)
    return states


class _RmsNormFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, eps):
        ctx.save_for_backward(states, weight)
        ctx.eps = eps
        result = torch.empty_like(states)
        load_cpu_kernels("kermit_hf").rms_norm_forward(states, weight, eps, result)
        return result

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        grads = load_cpu_kernels("kermit_hf").rms_norm_backward(*ctx.saved_tensors, contiguous_rows(grad), ctx.eps)
        return *grads, None
