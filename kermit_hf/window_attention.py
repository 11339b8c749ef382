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


# Stands for minus infinity where it is multiplied by zero: far below any score, yet finite.
HIDDEN_LOGIT = -1e9


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
    """The formula of the module, block by block along the diagonal, each block one call of torch's attention kernel.

    Sinks and far field are further keys of a block. Their logits are not products of a query with one key, so each gets
    a coordinate of its own, in which the query holds the logit and that key alone a one. The far field's value differs
    from query to query too: one more coordinate of the values reads off its weight instead. Shapes: see the module.
    """
    length, slots = query.shape[2], key.shape[2]
    batch, kv_heads, _, head_dim = key.shape
    if sinks is None and far is None and slots <= window_size:
        return WindowOutput(_softmax_attention(query, key, value, first_real, is_causal, dropout))

    dtype = torch.promote_types(query.dtype, torch.float32)
    num_sinks = 0 if sinks is None else sinks.logits.shape[-1]
    num_virtual = num_sinks + (far is not None)
    block = min(length, block_size(window_size))
    blocks = -(-length // block)
    behind = -(-(window_size - 1) // block)
    ahead = 0 if is_causal else behind

    # Kernels want rows of a multiple of eight elements.
    spare = -(head_dim + num_virtual) % 8 if num_virtual else 0
    logits = [] if sinks is None else [sinks.logits]
    logits += [] if far is None else [far.logit[..., None]]
    logits = [part.to(dtype).clamp(min=HIDDEN_LOGIT) for part in logits]
    query = torch.cat([query.to(dtype), *logits, query.new_zeros(*query.shape[:3], spare, dtype=dtype)], -1)
    queries = _query_blocks(query, kv_heads, block).flatten(0, 1)

    # Slots are counted from the first one that the first block of queries can see.
    first_slot = slots - length - behind * block
    end_slot = slots - length + (blocks + ahead) * block
    virtual_keys = torch.eye(num_virtual, num_virtual + spare, dtype=dtype, device=key.device)
    virtual_keys = F.pad(virtual_keys, (head_dim, 0)).expand(batch, kv_heads, -1, -1)
    virtual_values = F.pad(virtual_keys[..., -1:, :], (0, 0, num_sinks, 0)) if far is not None else None
    if sinks is not None:
        sink_values = F.pad(sinks.value.to(dtype), (0, num_virtual + spare, 0, num_virtual - num_sinks))
        virtual_values = sink_values if virtual_values is None else virtual_values + sink_values
    keys = _blocks(key.to(dtype), virtual_keys, first_slot, end_slot, block, num_virtual + spare)
    values = _blocks(value.to(dtype), virtual_values, first_slot, end_slot, block, num_virtual + spare)
    stride, span = block + num_virtual, (behind + 1 + ahead) * (block + num_virtual)
    keys, values = (tensor.flatten(0, 1).unfold(1, span, stride).mT for tensor in (keys, values))

    # The virtual keys stand behind each block of keys; one copy of them is enough.
    within = torch.arange(span, device=query.device)
    is_virtual = within % stride >= block
    block_index = torch.arange(blocks, device=query.device)[:, None] * block
    query_slots = block_index + torch.arange(block, device=query.device) + slots - length
    key_slots = block_index + within // stride * block + within % stride + first_slot
    if is_causal and isinstance(first_real, int) and first_slot >= first_real:
        # Only real tokens around: every block has the same mask.
        query_slots, key_slots = query_slots[:1], key_slots[:1]
    hidden = _hidden(query_slots, key_slots, window_size, first_real, is_causal, end=slots)
    hidden = torch.where(is_virtual, within < behind * stride, hidden)
    hidden = hidden | (is_virtual & (within >= (behind + 1) * stride))
    groups = query.shape[1] // kv_heads
    mask = torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    mask = mask.repeat(1, 1, groups, 1)
    if mask.shape[0] > 1:
        mask = mask.repeat_interleave(kv_heads, 0)

    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=1.0)
    output = _unblock_queries(output.unflatten(0, (batch, kv_heads)), block, length)
    if far is None:
        return WindowOutput(output[..., :head_dim])
    share = output[..., head_dim + num_sinks, None]
    return WindowOutput(torch.addcmul(output[..., :head_dim], share, far.value))


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


def block_size(window_size: int) -> int:
    """Half a window: three blocks of keys for each block of queries waste a quarter of the scores."""
    return min(max(window_size // 2, 32), 512)


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
    mask, simple = None, isinstance(first_real, int) and first_real <= 0
    if not simple or (is_causal and 1 < length < slots):
        key_slots = torch.arange(slots, device=query.device)
        mask = ~_hidden(key_slots[slots - length :], key_slots, slots, first_real, is_causal)[:, None]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal and mask is None and length > 1,
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


def _blocks(
    tensor: torch.Tensor, virtual: torch.Tensor | None, start: int, end: int, block: int, extra: int
) -> torch.Tensor:
    """Slots start ... end of axis 2, zeros where there are none, with `extra` zeros to a row and the rows of `virtual`
    behind each block: (batch, kv_heads, blocks * (block + virtual rows), dim + extra)."""
    tensor = tensor[:, :, max(start, 0) : end]
    before = max(-start, 0)
    tensor = pad_zeros(tensor, (0, extra, before, end - start - before - tensor.shape[2]))
    if virtual is None:
        return tensor
    tensor = tensor.unflatten(2, (-1, block))
    return torch.cat([tensor, virtual[:, :, None].expand(-1, -1, tensor.shape[2], -1, -1)], 3).flatten(2, 3)


def _query_blocks(tensor: torch.Tensor, kv_heads: int, block: int) -> torch.Tensor:
    """(batch, heads, seq, dim) -> (batch, kv_heads, blocks, groups * block, dim)"""
    tensor = pad_zeros(tensor, (0, 0, 0, -tensor.shape[2] % block))
    tensor = tensor.unflatten(2, (-1, block)).unflatten(1, (kv_heads, -1))
    return tensor.transpose(2, 3).flatten(3, 4)


def _unblock_queries(tensor: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """The way back from `_query_blocks`."""
    return tensor.unflatten(3, (-1, block)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :length]


def pad_zeros(tensor: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """`F.pad`, which copies even where there is nothing to add."""
    return F.pad(tensor, padding) if any(padding) else tensor
