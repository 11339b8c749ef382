"""Near field: exact softmax over a window and the sink tokens, with the far field as one more, virtual, token.

    o_i = (sum_near e^{s_ij} v_j + sum_sinks e^{s_ij} v_j + e^{l_i} o_far,i) / (sum_near e^{s_ij} + sum_sinks e^{s_ij} + e^{l_i})

Pure functions on tensors, in three forms under one signature: `window_reference` scores every query against every key,
`window_blocked` only blocks near the diagonal, O(seq * window) work and memory, `window_step` serves one query.

Shapes: query (batch, heads, seq, head_dim), already rotated and scaled by 1/sqrt(head_dim); key and value (batch,
kv_heads, keys, head_dim), keys rotated. The queries are the last `seq` of the `keys` slots. Slots before `first_real`
(an int or one per row) are padding; everything behind it is contiguous real tokens. Sums are taken in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .functions import first_derivative_only
from .kernel_attention import whole_blocks


class Sinks(NamedTuple):
    """logits (batch, heads, seq, sinks), -inf where a query does not see a sink here, because it has not come yet or
    still lies inside the window; value (batch, kv_heads, sinks, head_dim)."""

    logits: torch.Tensor
    value: torch.Tensor


class FarField(NamedTuple):
    """value (batch, heads, seq, head_dim); logit (batch, heads, seq), -inf where nothing has left the window yet."""

    value: torch.Tensor
    logit: torch.Tensor


class WindowOutput(NamedTuple):
    """output (batch, heads, seq, head_dim). From the reference also the softmax weights: near (batch, heads, seq, keys),
    sinks (batch, heads, seq, sinks) or None, far (batch, heads, seq, 1) or None; they sum to one over everything."""

    output: torch.Tensor
    near: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    far: torch.Tensor | None = None


def window_reference(
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
    """The formula of the module on the full matrix of scores. Shapes: see the module."""
    length, slots = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    key_slots = torch.arange(slots, device=query.device)
    hidden = _hidden(key_slots[slots - length :], key_slots, window_size, first_real, is_causal)
    logits = query @ key.repeat_interleave(groups, 1).mT
    parts = [logits.masked_fill(hidden[:, None], float("-inf"))]
    values = [value.repeat_interleave(groups, 1)]
    if sinks is not None:
        parts.append(sinks.logits.to(dtype))
        values.append(sinks.value.to(dtype).repeat_interleave(groups, 1))
    if far is not None:
        parts.append(far.logit[..., None].to(dtype))

    weights = F.dropout(torch.cat(parts, -1).softmax(-1), dropout)
    split = weights.split([part.shape[-1] for part in parts], -1)
    output = sum(weight @ part_value for weight, part_value in zip(split, values, strict=False))
    if far is not None:
        output = output + split[-1] * far.value
    return WindowOutput(
        output,
        near=split[0],
        sinks=split[1] if sinks is not None else None,
        far=split[-1] if far is not None else None,
    )


def window_blocked(
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
    """The formula of the module, block by block along the diagonal. Shapes: see the module."""
    length, slots = query.shape[2], key.shape[2]
    batch, kv_heads = key.shape[:2]
    groups = query.shape[1] // kv_heads
    if sinks is None and far is None and slots <= window_size:
        return WindowOutput(_softmax_attention(query, key, value, first_real, is_causal, dropout))

    dtype = torch.promote_types(query.dtype, torch.float32)
    # There is nothing before slot 0, also for rows whose first token has left.
    first_real = first_real.clamp(min=0) if isinstance(first_real, torch.Tensor) else max(first_real, 0)
    block = block_size(window_size)
    if length < block:
        block = length
    blocks = whole_blocks(length, block)
    behind = -(-(window_size - 1) // block)
    span = behind + 1 if is_causal else 2 * behind + 1
    # Slots are counted from the first one that the first block of queries can see.
    first_slot = slots - length - behind * block
    end_slot = first_slot + (blocks - 1 + span) * block

    query_slots = torch.arange(slots - length, slots - length + blocks * block, device=query.device).view(-1, block)
    key_slots = query_slots[:, :1] - behind * block + torch.arange(span * block, device=query.device)
    if is_causal and isinstance(first_real, int) and first_slot >= first_real:
        # Only real tokens around: every block has the same mask.
        query_slots, key_slots = query_slots[:1], key_slots[:1]
    hidden = _hidden(query_slots, key_slots, window_size, first_real, is_causal, end=slots).repeat(1, 1, groups, 1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    if bias.shape[0] > 1:
        bias = bias.repeat_interleave(kv_heads, 0)

    def query_blocks(tensor: torch.Tensor) -> torch.Tensor:
        return _query_blocks(tensor.to(dtype), kv_heads, block).flatten(0, 1)

    merge = _merge_flash if dropout == 0.0 and query.device.type == "cpu" and _can_use_flash() else _merge_softmax
    output = merge(
        query_blocks(query),
        _pad_slots(key.to(dtype), first_slot, end_slot).flatten(0, 1),
        _pad_slots(value.to(dtype), first_slot, end_slot).flatten(0, 1),
        bias,
        None if sinks is None else query_blocks(sinks.logits),
        None if sinks is None else sinks.value.to(dtype).flatten(0, 1),
        None if far is None else query_blocks(far.logit[..., None]),
        None if far is None else query_blocks(far.value),
        dropout,
    )
    return WindowOutput(_unblock_queries(output.unflatten(0, (batch, kv_heads)), block, length))


def block_size(window_size: int) -> int:
    """Half a window: three blocks of keys for each block of queries waste a quarter of the scores."""
    return min(max(window_size // 2, 32), 512)


def _merge_softmax(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    sink_logits: torch.Tensor | None,
    sink_values: torch.Tensor | None,
    far_logit: torch.Tensor | None,
    far_value: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax over near field, sinks and far field of each block.

    queries (rows, blocks, queries, head_dim) with rows = batch * kv_heads; keys and values (rows, slots, head_dim), of
    which each block sees as many as the last axis of bias (rows or 1, blocks or 1, queries, keys) says, from its own
    number of blocks on; sink_logits (rows, blocks, queries, sinks), sink_values (rows, sinks, head_dim), far_logit (rows,
    blocks, queries, 1), far_value like queries.
    """
    keys, values = (_windows(tensor, queries.shape[1], bias.shape[-1]) for tensor in (keys, values))
    parts = [queries @ keys.mT + bias] + [part for part in (sink_logits, far_logit) if part is not None]
    weights = F.dropout(torch.cat(parts, -1).softmax(-1), dropout).split([part.shape[-1] for part in parts], -1)
    output = weights[0] @ values
    if sink_logits is not None:
        output = output + weights[1] @ sink_values[:, None]
    if far_logit is not None:
        output = output + weights[-1] * far_value
    return output


def _merge_flash(*arguments: torch.Tensor | None) -> torch.Tensor:
    """`_merge_softmax` without its matrix of weights, through torch's flash attention kernel for CPUs."""
    return _MergeFlash.apply(*arguments[:-1])


def _can_use_flash() -> bool:
    return not torch.compiler.is_compiling() and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
    )


class _MergeFlash(torch.autograd.Function):
    """The kernel gives the near field's output and the logarithm of its sum of exponentials, with which sinks and far
    field merge. Backwards, the same kernel given the *merged* output and logarithm finds the weights e^{s - total} of
    the merged softmax, hence its gradient (as in ring attention, Liu et al. 2023, arXiv 2310.01889)."""

    @staticmethod
    def forward(ctx, queries, keys, values, bias, sink_logits, sink_values, far_logit, far_value):
        # The kernel takes the last axis for contiguous without looking.
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        windows = [_windows(tensor, queries.shape[1], bias.shape[-1]) for tensor in (keys, values)]
        output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, *windows, 0.0, False, attn_mask=bias, scale=1.0
        )
        near = total[..., None]
        parts = [near] + [part for part in (sink_logits, far_logit) if part is not None]
        if len(parts) > 1:
            total = torch.cat(parts, -1).logsumexp(-1, keepdim=True)
            output *= (near - total).exp()
            if sink_logits is not None:
                output += (sink_logits - total).exp() @ sink_values[:, None]
            if far_logit is not None:
                output.addcmul_((far_logit - total).exp(), far_value)
            total = total.squeeze(-1)
        ctx.save_for_backward(
            queries, keys, values, bias, sink_logits, sink_values, far_logit, far_value, output, total
        )
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        grad = grad.contiguous()
        queries, keys, values, bias, sink_logits, sink_values, far_logit, far_value, output, total = ctx.saved_tensors
        windows = [_windows(tensor, queries.shape[1], bias.shape[-1]) for tensor in (keys, values)]
        grad_queries, *grad_windows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, queries, *windows, output, total, 0.0, False, attn_mask=bias, scale=1.0
        )
        grads = [grad_queries, *(_fold_windows(window, keys.shape[1]) for window in grad_windows), None]
        agreement = (grad * output).sum(-1, keepdim=True)
        total = total[..., None]
        if sink_logits is None:
            grads += [None, None]
        else:
            weights = (sink_logits - total).exp()
            grads.append(weights * (grad @ sink_values[:, None].mT - agreement))
            grads.append(weights.flatten(1, 2).mT @ grad.flatten(1, 2))
        if far_logit is None:
            grads += [None, None]
        else:
            weights = (far_logit - total).exp()
            grads.append(weights * ((grad * far_value).sum(-1, keepdim=True) - agreement))
            grads.append(weights * grad)
        return tuple(grads)


def _windows(tensor: torch.Tensor, blocks: int, size: int) -> torch.Tensor:
    """(rows, slots, dim) -> (rows, blocks, size, dim), overlapping views."""
    step = (tensor.shape[1] - size) // max(blocks - 1, 1)
    return tensor.unfold(1, size, max(step, 1)).mT


def _fold_windows(windows: torch.Tensor, slots: int) -> torch.Tensor:
    """The gradient of `_windows`: overlaps add up."""
    rows, blocks, size, dim = windows.shape
    step = (slots - size) // max(blocks - 1, 1)
    if blocks == 1:
        return windows.squeeze(1)
    first, *others = windows.unflatten(2, (-1, step)).unbind(2)
    folded = torch.cat([first, first.new_zeros(rows, slots // step - blocks, step, dim)], 1)
    for offset, part in enumerate(others, 1):
        folded[:, offset : offset + blocks] += part
    return folded.flatten(1, 2)


def window_step(
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
    """The formula of the module for one query (seq = 1), the newest token. Shapes: see the module."""
    kv_heads = key.shape[1]
    behind = max(key.shape[2] - window_size, 0)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(dtype), key[:, :, behind:].to(dtype), value[:, :, behind:].to(dtype)
    # (batch, kv_heads, groups, 1 or more): with one query, the heads of a group take the place of its axis.
    queries = query.squeeze(2).unflatten(1, (kv_heads, -1))
    logits = queries @ key.mT
    if isinstance(first_real, torch.Tensor):
        padding = torch.arange(behind, behind + key.shape[2], device=key.device) < first_real[:, None]
        padding[:, -1] = False
        logits = logits.masked_fill(padding[:, None, None], float("-inf"))
    parts = [logits]
    if sinks is not None:
        parts.append(sinks.logits.squeeze(2).unflatten(1, (kv_heads, -1)).to(dtype))
    if far is not None:
        parts.append(far.logit.unflatten(1, (kv_heads, -1)).to(dtype))
    weights = F.dropout(torch.cat(parts, -1).softmax(-1), dropout)
    near, rest = weights[..., : key.shape[2]], weights[..., key.shape[2] :]
    output = near @ value
    if sinks is not None:
        output = output + rest[..., : parts[1].shape[-1]] @ sinks.value.to(dtype)
    if far is not None:
        output = output + rest[..., -1:] * far.value.squeeze(2).unflatten(1, (kv_heads, -1))
    return WindowOutput(output.flatten(1, 2).unsqueeze(2))


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first_real: int | torch.Tensor,
    is_causal: bool,
    dropout: float,
) -> torch.Tensor:
    """Everything lies inside the window: ordinary attention, left to torch's kernel."""
    length, slots = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if length == 1:
        is_causal = False  # the newest token sees everything
    mask, simple = None, isinstance(first_real, int) and first_real <= 0
    if not simple or (is_causal and length < slots):
        key_slots = torch.arange(slots, device=query.device)
        mask = ~_hidden(key_slots[slots - length :], key_slots, slots, first_real, is_causal)[:, None]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal and mask is None,
        scale=1.0,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _hidden(
    query_slots: torch.Tensor,
    key_slots: torch.Tensor,
    window_size: int,
    first_real: int | torch.Tensor,
    is_causal: bool,
    end: int | None = None,
) -> torch.Tensor:
    """True where a query does not see a key, (batch or 1, ..., queries, keys). A query that is padding, before
    `first_real` or from `end` on, sees itself, so that its softmax is defined."""
    distance = query_slots[..., :, None] - key_slots[..., None, :]
    hidden = (distance >= window_size) | (distance < (0 if is_causal else 1 - window_size))
    hidden = hidden[None]
    if isinstance(first_real, torch.Tensor):
        first_real = first_real.view(-1, *(1,) * distance.dim())
    padding = key_slots[..., None, :] < first_real
    if end is not None:
        padding = padding | (key_slots >= end)[..., None, :]
    return hidden | (padding & (distance != 0))


def _pad_slots(tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Slots start ... end of axis 2, zeros where there are none."""
    tensor = tensor[:, :, max(start, 0) : end]
    before = max(-start, 0)
    return pad_zeros(tensor, (0, 0, before, end - start - before - tensor.shape[2]))


def _query_blocks(tensor: torch.Tensor, kv_heads: int, block: int) -> torch.Tensor:
    """(batch, heads, seq, dim) -> (batch, kv_heads, blocks, groups * block, dim)"""
    blocks = whole_blocks(tensor.shape[2], block)
    tensor = pad_zeros(tensor, (0, 0, 0, blocks * block - tensor.shape[2]))
    tensor = tensor.unflatten(2, (blocks, block)).unflatten(1, (kv_heads, -1))
    return tensor.transpose(2, 3).flatten(3, 4)


def _unblock_queries(tensor: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """The way back from `_query_blocks`."""
    return tensor.unflatten(3, (-1, block)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :length]


def pad_zeros(tensor: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """`F.pad`, which copies even where there is nothing to add."""
    return F.pad(tensor, padding) if any(padding) else tensor
