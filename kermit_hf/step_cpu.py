"""One token at a time as kernels for CPUs, in float32: `window_step`, with positions and sinks, and the steps of both rules, with
elementwise feature maps, each in one call; and in one call everything between the projections of a layer. They have no
gradients: where one is needed, the kernels of whole texts serve. See step_cpu.cpp."""

import torch

from .additive_cpu import additive_elu_fused, additive_fused
from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .delta_cpu import delta_fused, delta_silu_fused
from .kernel_attention import KernelMemory, KernelReadout
from .window_attention import FarField


# What `layer_step` returns behind the output.
RENEWED = ("keys", "values", "write_strength", "matrix", "normalizer", "log_forget", "conv_tail")


def need_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def window_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_size: int,
    first_real: int | torch.Tensor,
    sinks: tuple[torch.Tensor, torch.Tensor] | None,
    far: FarField | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """The formula of `window_attention` for the newest token, of a query and keys before their positions and `scaling`.

    Args:
        query (batch, heads, 1, head_dim); key, value (batch, kv_heads, slots, head_dim); first_real: see `window_attention`.
        sinks: keys without positions, and values, (batch, kv_heads, sinks, head_dim); each is seen once it lies behind the window.
        far: see `FarField`.
        rotary: cosine and sine of slot numbers, both (slots or more, head_dim / 2 or more).

    Returns (batch, heads, 1, head_dim), without a gradient.
    """
    first_reals = None
    if isinstance(first_real, torch.Tensor):
        first_reals, first_real = first_real.long().contiguous(), 0
    sinks = (None, None) if sinks is None else [contiguous_rows(tensor) for tensor in sinks]
    far = (None, None) if far is None else [contiguous_rows(far.value), far.logit.float()]
    states = [contiguous_rows(tensor) for tensor in (query, key, value, *rotary)]
    return load_cpu_kernels("kermit_hf").window_step(
        *states, *sinks, *far, first_reals, first_real, scaling, window_size
    )


def layer_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_logit: torch.Tensor | None,
    forget_logit: torch.Tensor | None,
    state: dict[str, torch.Tensor | None],
    weights: dict[str, torch.Tensor | None],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norm_eps: float,
    scaling: float,
    feature_map: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Convolution, norms, gates, near and far field of one token, for either rule: the additive one if the state has a normalizer.

    Args:
        query, key, value: projected, (batch, 1, heads * head_dim) each.
        write_logit, forget_logit: (batch, 1, kv_heads), before their sigmoid; None without that gate.
        state: see `KermitCacheLayer.steady_state`.
        weights: conv_weight (channels, 1, taps); query_norm, key_norm and far_norm (head_dim); far_query (heads, head_dim);
            far_bias (heads); query_weight and key_weight, those of the feature map. None for what a layer does not have.
        rotary: cosine and sine of slot numbers, both (window + 1, head_dim); None without a window.
        norm_eps: of all norms; scaling: of the scores of the window.
        feature_map: its place in `backends.LAYER_MAPS`.

    Returns (batch, 1, heads * head_dim) and the state with the new token, without gradients.
    """
    kernels = load_cpu_kernels("kermit_hf")
    given = {"query": query, "key": key, "value": value, "write_logit": write_logit, "forget_logit": forget_logit}
    given |= state | weights | dict(zip(("cos", "sin"), rotary or (None, None), strict=True))
    given = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
    output, *renewed = kernels.layer_step(**given, feature_map=feature_map, norm_eps=norm_eps, scaling=scaling)
    return output, dict(zip(RENEWED, renewed, strict=True))


def delta_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """`delta_step` with a memory, everything in float32."""
    if need_gradient(query, key, value, write_strength, log_forget, memory.matrix):
        return delta_fused(query, key, value, write_strength, log_forget, memory)
    return _delta_step(query, key, value, write_strength, log_forget, memory, False)


def delta_silu_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """The same of queries and keys before the feature map "silu_l2", which is applied here."""
    if need_gradient(query, key, value, write_strength, log_forget, memory.matrix):
        return delta_silu_fused(query, key, value, write_strength, log_forget, memory)
    return _delta_step(query, key, value, write_strength, log_forget, memory, True)


def additive_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    divides: bool = False,
) -> KernelReadout:
    """`additive_step` with a memory, everything in float32. divides: see `backends.Kernel`."""
    if need_gradient(query, key, value, log_forget, *memory):
        return additive_fused(query, key, value, log_forget, memory, divides)
    return _additive_step(query, key, value, log_forget, memory, None, False, divides)


def additive_elu_step_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    key_mask: torch.Tensor | None = None,
    divides: bool = False,
) -> KernelReadout:
    """The same of queries and keys before the feature map "elu", which is applied here; key_mask (batch or 1, 1, 1) is zero where the
    token does not enter the memory."""
    if need_gradient(query, key, value, log_forget, *memory):
        return additive_elu_fused(query, key, value, log_forget, memory, key_mask, divides)
    return _additive_step(query, key, value, log_forget, memory, key_mask, True, divides)


def _delta_step(query, key, value, write_strength, log_forget, memory, maps) -> KernelReadout:
    states = (contiguous_rows(tensor) for tensor in (query, key, value))
    gates = (gate if gate is None else gate.float() for gate in (write_strength, log_forget))
    numerator, matrix = load_cpu_kernels("kermit_hf").delta_step(*states, *gates, _whole(memory.matrix), maps)
    return KernelReadout(numerator, None, KernelMemory(matrix))


def _additive_step(query, key, value, log_forget, memory, key_mask, elu, divides) -> KernelReadout:
    states = (contiguous_rows(tensor) for tensor in (query, key, value))
    log_forget = None if log_forget is None else log_forget.float()
    key_mask = None if key_mask is None else key_mask.float().expand(key.shape[:3])
    memory = _whole(memory.matrix), _whole(memory.normalizer)
    read = load_cpu_kernels("kermit_hf").additive_step(*states, log_forget, key_mask, *memory, elu, divides)
    return KernelReadout(*read[:2], KernelMemory(*read[2:]))


def _whole(memory: torch.Tensor) -> torch.Tensor:
    return memory.float().contiguous()
