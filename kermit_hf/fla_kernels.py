"""The chunked forms of `kernel_attention` on the Triton kernels of flash-linear-attention, under their signatures.

The package wants (batch, seq, heads, dim), as many heads of keys as of queries, and an even number of features and
values. It has no normaliser: a column of ones beside the values collects it. Its `scale` is one, its gates are log decays,
as ours. Operands of products get the dtype of the values.
"""

import torch
import torch.nn.functional as F

from .kernel_attention import MIN_LOG_DECAY, KernelMemory, KernelReadout, delta_chunked


# Rows of features and values are padded to whole multiples of this many, 32 bytes in bfloat16.
ALIGNMENT = 16
# What the package's kernels of the delta rule hold at once.
MAX_DELTA_FEATURES = 256


def fla_additive_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """`additive_chunked`, by `chunk_simple_gla`."""
    ones = torch.ones_like(value[..., :1])
    state = None if memory is None else torch.cat([memory.matrix, memory.normalizer[..., None]], -1)
    gates = {} if log_forget is None else {"g": log_forget.clamp(min=2 * MIN_LOG_DECAY)}
    read, state = _run(_kernel("chunk_simple_gla"), query, key, torch.cat([value, ones], -1), state, gates)
    return KernelReadout(read[..., :-1], read[..., -1], KernelMemory(state[..., :-1], state[..., -1]))


def fla_delta_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """`delta_chunked`, by `chunk_delta_rule` or, with a forget gate, `chunk_gated_delta_rule`; itself where there are more
    features than these take."""
    if key.shape[3] > MAX_DELTA_FEATURES:
        return delta_chunked(query, key, value, write_strength, log_forget, memory)
    name, gates = "chunk_delta_rule", {"beta": write_strength}
    if log_forget is not None:
        name, gates = "chunk_gated_delta_rule", gates | {"g": log_forget.clamp(min=2 * MIN_LOG_DECAY)}
    read, state = _run(_kernel(name), query, key, value, None if memory is None else memory.matrix, gates)
    return KernelReadout(read, None, KernelMemory(state))


def _kernel(name: str):
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError("kermit_hf.fla_kernels needs flash-linear-attention: pip install fla-core") from error
    kernels = chunk_delta_rule, chunk_gated_delta_rule, chunk_simple_gla
    return {kernel.__name__: kernel for kernel in kernels}[name]


def _run(
    kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor | None,
    gates: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our layout into the package's and back: what queries read, (batch, heads, seq, head_dim), and the last state,
    (batch, kv_heads, feature_dim, head_dim), in float32."""
    groups, features, dims = query.shape[1] // key.shape[1], key.shape[3], value.shape[3]
    shared = {"k": _align(key), "v": _align(value), **gates}
    shared = {name: tensor.repeat_interleave(groups, 1).transpose(1, 2) for name, tensor in shared.items()}
    shared |= {name: shared[name].to(value.dtype).contiguous() for name in ("k", "v")}
    if state is not None:
        state = F.pad(state.float(), (0, -dims % ALIGNMENT, 0, -features % ALIGNMENT)).repeat_interleave(groups, 1)
    output, state = kernel(
        q=_align(query).to(value.dtype).transpose(1, 2).contiguous(),
        **shared,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    # Heads of a group end with the same state; its gradient reaches them through the first.
    return output.transpose(1, 2)[..., :dims].float(), state[:, ::groups, :features, :dims].float()


def _align(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % ALIGNMENT))
