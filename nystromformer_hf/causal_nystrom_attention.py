"""Causal Nyström attention: exact near field and sinks, one virtual token for each older segment. Functions on tensors.

The first `num_sink_tokens` tokens of a text are sinks, which every later token attends exactly. The tokens behind them are counted
from 0 and cut into segments of c = `segment_size`. Token i of segment s attends exactly to its own and the `near_segments`
previous segments; each older segment l is one virtual token, a landmark, with

    logit  q_i k̃_l / sqrt(d) + log c        value  ṽ_l        k̃_l, q̃_l: means over the keys and queries of segment l

    Ṽ = (L + γI)⁻¹ (B V + γ P V)    L: causal softmax of Q̃K̃ᵀ;  B: softmax of q̃_l over the keys of segments 0 ... l;
                                     P: softmax of q̃_l over the keys of segment l

L is lower triangular, so the inverse of the Nyström method (Xiong et al. 2021, arXiv 2102.03902, eq. 13), regularised, is a
causal triangular solve: ṽ_l needs nothing behind segment l, and only queries behind segment l read it. The matrix in front of V
has rows that sum to one, and |ṽ| <= (1 + γ) / (γ - 1 + 2 min L_ll) max|v| for γ > 1. `regularization=None` is the limit of
large γ, Ṽ = P V. Sinks take no part in L, B and P; therefore c = 1 is exactly softmax attention, for then B = L, P = I, Ṽ = V.

Three forms with the same results: `causal_nystrom_reference` builds the whole matrix, `causal_nystrom_blocked` costs
O(seq * (near field + landmarks)), `causal_nystrom_step` is for one query. Sums, exponentials and solves are in float32 or wider.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

from .backends import find_history_attention, find_landmark_attention
from .tiled_attention import HISTORY_TILE, LONGEST_BLOCK, Tile, can_tile, tile_history, tile_text, tiled_attention


# Queries that the blocked form treats at a time: as many as the near field has tokens, within these limits.
BLOCK_SIZES = (192, LONGEST_BLOCK)


class Landmarks(NamedTuple):
    """keys: (batch, kv_heads, landmarks, head_dim); values: (batch, heads, landmarks, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor


class Context(NamedTuple):
    """What `seq` queries of a batch read. Token indices count from the first token behind the sinks, so sinks have
    negative ones; they are ints where all rows agree, or (batch,). Whatever stands behind a row's last real token is
    its future, and seen by none of its real queries.

    keys, values: (batch, kv_heads, slots, head_dim), ending with the `seq` new tokens or with room for them.
    first: token index of slot 0. start: token index of the first query. first_query_slot: the smallest and
    the largest slot, over all rows, at which the first query stands.
    num_sink_tokens, sink_keys, sink_values: (batch, kv_heads, sinks, head_dim), fewer of them in a short text.
    landmarks: of the first `num_complete` segments, an int or (batch,).
    open_queries: (batch, heads, tokens, head_dim), of the tokens behind those segments; open_slot: the slot of the first.
    history_keys, history_values: (batch, kv_heads, tokens, head_dim) from token index 0 on, None where γ is not finite.
    history_rows: (rows,), those of the batch in which an open segment may be complete, None for all of them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int | torch.Tensor
    start: int | torch.Tensor
    first_query_slot: tuple[int, int]
    num_sink_tokens: int
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    landmarks: Landmarks
    num_complete: int | torch.Tensor
    open_queries: torch.Tensor
    open_slot: int
    history_keys: torch.Tensor | None = None
    history_values: torch.Tensor | None = None
    history_rows: torch.Tensor | None = None


class CausalNystromOutput(NamedTuple):
    """output (batch, heads, seq, head_dim), without the convolution; landmarks, old and new. From the reference also weights
    (batch, heads, seq, tokens), columns counted from the first sink on, values (batch, kv_heads, tokens, head_dim), zero where
    a cache has let go of them, and unweighted (batch, heads, seq, head_dim), what landmarks of a cache contribute."""

    output: torch.Tensor
    landmarks: Landmarks
    weights: torch.Tensor | None = None
    values: torch.Tensor | None = None
    unweighted: torch.Tensor | None = None


def context_of_whole_text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_sink_tokens: int, regularized: bool
) -> Context:
    """The `Context` of a batch without a past, rows starting with their first token. query: (batch, heads, seq, head_dim)."""
    batch, kv_heads, _, head_dim = key.shape
    sinks = num_sink_tokens
    return Context(
        keys=key,
        values=value,
        first=-sinks,
        start=-sinks,
        first_query_slot=(0, 0),
        num_sink_tokens=sinks,
        sink_keys=key[:, :, :sinks],
        sink_values=value[:, :, :sinks],
        landmarks=Landmarks(
            key.new_zeros(batch, kv_heads, 0, head_dim), value.new_zeros(batch, query.shape[1], 0, value.shape[-1])
        ),
        num_complete=0,
        open_queries=_cut(query, sinks, query.shape[2]),
        open_slot=min(sinks, key.shape[2]),
        history_keys=_cut(key, sinks, key.shape[2]) if regularized else None,
        history_values=_cut(value, sinks, key.shape[2]) if regularized else None,
    )


def causal_nystrom_blocked(
    query: torch.Tensor,
    context: Context,
    segment_size: int,
    near_segments: int,
    regularization: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> CausalNystromOutput:
    """Block by block of queries, each one call of torch's attention kernel on sinks, near field and landmarks together;
    where they serve, by the kernel of `find_landmark_attention` or in the tiles of `tiled_attention`.

    query: (batch, heads, seq, head_dim), with positions, as the keys; regularization: γ > 1, (heads,), or None; scaling:
    1 / sqrt(head_dim); dropout: probability, on the softmax weights.
    """
    landmarks = extend_landmarks(context, segment_size, regularization, scaling)
    groups, sinks = query.shape[1] // context.keys.shape[1], context.sink_keys.shape[2]
    attend = find_landmark_attention(query, context.values, dropout)
    if attend is not None:
        far = _far_field(context, landmarks, groups)
        indices = context.start, context.first, sinks, context.num_sink_tokens
        output = attend(query, context.keys, context.values, *far, *indices, segment_size, near_segments, scaling)
        return CausalNystromOutput(output, landmarks)
    tiles = _tiles(context, query, segment_size, near_segments) if can_tile(query, context.values, dropout) else []
    if tiles:
        far_keys, far_values = _far_field(context, landmarks, groups)
        far_keys = _repeat(far_keys, groups)
        output = tiled_attention(query, context.keys, context.values, far_keys, far_values, tiles, scaling)
        return CausalNystromOutput(output, landmarks)
    dtype = _accumulation_dtype(query)
    block = min(max(segment_size * near_segments, BLOCK_SIZES[0]), BLOCK_SIZES[1])
    # Pieces rather than overlapping slices, whose gradients would each be as large as the whole sequence.
    key_pieces, value_pieces = context.keys.split(block, 2), context.values.split(block, 2)
    outputs, begin, everywhere = [], 0, None
    for queries in query.split(block, 2):
        end = begin + queries.shape[2]
        low, high = _key_range(context, begin, end, segment_size, near_segments)
        count = seen = landmarks.keys.shape[2]
        repeats = False
        if isinstance(context.start, int):
            seen = min(max((context.start + end - 1) // segment_size - near_segments, 0), count)
            # Blocks of whole segments whose near field is whole differ by nothing but the number of older landmarks.
            repeats = end - begin == block and block % segment_size == 0 and context.first + low >= 0
        keys = [landmarks.keys[:, :, :seen], context.sink_keys, *_window(key_pieces, block, low, high)]
        keys = torch.cat([_repeat(part, groups) for part in keys], 2)
        values = [context.sink_values, *_window(value_pieces, block, low, high)]
        values = torch.cat([landmarks.values[:, :, :seen]] + [_repeat(part, groups) for part in values], 2)
        bias = everywhere
        if not repeats or everywhere is None:
            # As of a later block that has all landmarks behind it.
            later = (count - seen) * segment_size if repeats else 0
            query_index = _arange(context.start, begin + later, end + later, query.device)
            key_index = _arange(context.first, low + later, high + later, query.device)
            columns = count if repeats else seen
            bias = _bias(
                query_index, key_index, sinks, context.num_sink_tokens, columns, segment_size, near_segments, dtype
            )
            everywhere = bias if repeats else everywhere
        if repeats:
            bias = bias[..., count - seen :]
        outputs.append(
            F.scaled_dot_product_attention(
                queries.to(dtype),
                keys.to(dtype),
                values.to(dtype),
                attn_mask=bias[:, None],
                dropout_p=dropout,
                scale=scaling,
            )
        )
        begin = end
    return CausalNystromOutput(torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], landmarks)


def causal_nystrom_step(
    query: torch.Tensor,
    context: Context,
    segment_size: int,
    near_segments: int,
    regularization: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> CausalNystromOutput:
    """One query: reads every key once for all heads that share it. Arguments: see `causal_nystrom_blocked`."""
    landmarks = extend_landmarks(context, segment_size, regularization, scaling)
    dtype = _accumulation_dtype(query)
    kv_heads, sinks = context.keys.shape[1], context.sink_keys.shape[2]
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1)).squeeze(3)
    keys = torch.cat([landmarks.keys, context.sink_keys, context.keys], 2).to(dtype)
    values = torch.cat([context.sink_values, context.values], 2).to(dtype)
    query_index = _arange(context.start, 0, 1, query.device)
    key_index = _arange(context.first, 0, context.keys.shape[2], query.device)
    bias = _bias(
        query_index,
        key_index,
        sinks,
        context.num_sink_tokens,
        landmarks.keys.shape[2],
        segment_size,
        near_segments,
        dtype,
    )
    weights = F.dropout((grouped @ keys.mT * scaling + bias[:, None]).softmax(-1), dropout)
    far, exact = weights.split([landmarks.keys.shape[2], values.shape[2]], -1)
    heads = (exact @ values).flatten(1, 2)[:, :, None]
    far = far.flatten(1, 2)[:, :, None]
    return CausalNystromOutput(heads + far @ landmarks.values.to(dtype), landmarks)


def causal_nystrom_reference(
    query: torch.Tensor,
    context: Context,
    segment_size: int,
    near_segments: int,
    regularization: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    num_tokens: int | None = None,
) -> CausalNystromOutput:
    """The formulas of the module with one weight for each query and token. Arguments: see `causal_nystrom_blocked`;
    num_tokens: columns of the weights, all tokens so far with sinks and padding; None where there is no past."""
    dtype = _accumulation_dtype(query)
    device, groups = query.device, query.shape[1] // context.keys.shape[1]
    length, sinks, num_sink_tokens = query.shape[2], context.sink_keys.shape[2], context.num_sink_tokens
    total = length if num_tokens is None else num_tokens
    maps = _LandmarkMaps.of(context, segment_size, regularization, scaling)
    landmarks = extend_landmarks(context, segment_size, regularization, scaling)
    count = landmarks.keys.shape[2]

    keys = torch.cat([landmarks.keys, context.sink_keys, context.keys], 2).to(dtype)
    query_index = _arange(context.start, 0, length, device)
    key_index = _arange(context.first, 0, context.keys.shape[2], device)
    bias = _bias(query_index, key_index, sinks, num_sink_tokens, count, segment_size, near_segments, dtype)
    weights = F.dropout((query.to(dtype) @ _repeat(keys, groups).mT * scaling + bias[:, None]).softmax(-1), dropout)
    far, sink, near = weights.split([count, sinks, context.keys.shape[2]], -1)

    # From slots to columns: token index + num_sink_tokens. Sinks that still stand in slots are placed as sinks.
    sink_column, near_column = torch.arange(sinks, device=device)[None], key_index + num_sink_tokens
    token_column = maps.token_index + num_sink_tokens
    spread = _spread(sink, sink_column, total) + _spread(near, near_column, total)
    kept, column = torch.where((key_index >= 0)[:, None, :, None], context.values, 0.0), near_column
    if context.history_values is not None:
        kept, column = context.history_values, token_column
    values = _spread(context.sink_values.to(dtype).mT, sink_column, total)
    values = (values + _spread(kept.to(dtype).mT, column, total)).mT

    new = _arange(context.num_complete, 0, maps.tokens.shape[2], device)
    is_new = new[:, None, None].expand(far.shape[0], *far.shape[1:3], -1)
    new_far = far.gather(-1, is_new)
    spread = spread + new_far @ _spread(maps.tokens, token_column, total)
    is_old = torch.arange(count, device=device)[None] < _column(context.num_complete)
    old_far = far.masked_fill(~is_old[:, None, None], 0.0)
    # Those of `context`: the new ones come from kernels without a second derivative.
    old_values = context.landmarks.values.to(dtype)
    unweighted = new_far @ maps.rest + old_far[..., : old_values.shape[2]] @ old_values
    output = spread @ _repeat(values, groups) + unweighted
    return CausalNystromOutput(output, landmarks, spread, values, unweighted)


def extend_landmarks(
    context: Context, segment_size: int, regularization: torch.Tensor | None, scaling: float
) -> Landmarks:
    """The landmarks of `context` and one for each further segment of its open tokens.

    Also for segments that have not come to their end in some rows: no real query reads these, and a later call makes them anew.
    """
    count = context.open_queries.shape[2] // segment_size
    if count == 0:
        return context.landmarks
    dtype = _accumulation_dtype(context.keys)
    keys, values = _segments(context.keys, context, segment_size), _segments(context.values, context, segment_size)
    queries = _mean(_cut(context.open_queries, 0, count * segment_size).unflatten(2, (count, -1)).to(dtype))
    new_keys = _mean(keys)
    pooled = _pool(queries, keys, values, scaling)
    if regularization is not None:
        gamma = regularization.to(dtype)[:, None, None]
        old = context.landmarks.keys.shape[2]
        everything = _attend_to_history(queries, context, segment_size, scaling)
        past, own = _landmark_softmax(queries, new_keys, context, scaling).split([old, count], -1)
        right = everything + gamma * pooled - past @ context.landmarks.values.to(dtype)
        pooled = _solve(own, gamma, right)
    new_keys, new_values = new_keys.to(context.keys.dtype), pooled.to(context.values.dtype)
    return Landmarks(
        append(context.landmarks.keys, new_keys, context.num_complete),
        append(context.landmarks.values, new_values, context.num_complete),
    )


def _pool(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """P V: landmark queries (batch, heads, segments, head_dim) over the tokens of their own segments, as of `_segments`."""
    grouped = queries.unflatten(1, (keys.shape[1], -1)).transpose(2, 3)  # (batch, kv_heads, segments, groups, head_dim)
    if keys.shape[2] > 1 and can_tile(queries, values, 0.0):
        # The kernel reads segments where they are; a matrix product would copy them. It has room for one row's axes.
        rows = zip(grouped, keys, values, strict=True)
        pooled = torch.stack([F.scaled_dot_product_attention(*row, scale=scaling) for row in rows])
    else:
        pooled = (grouped @ keys.mT * scaling).softmax(-1) @ values
    return pooled.transpose(2, 3).flatten(1, 2)


def _attend_to_history(queries: torch.Tensor, context: Context, segment_size: int, scaling: float) -> torch.Tensor:
    """B V: each landmark query, (batch, heads, new, head_dim), over all tokens up to the end of its own segment.

    Zeros in rows of the batch that are not among `history_rows`: a landmark of theirs is not complete.
    """
    keys, values, rows = context.history_keys, context.history_values, context.history_rows
    index = _arange(context.num_complete, 0, queries.shape[2], queries.device)
    if rows is not None and len(rows) < len(queries):
        some = context._replace(history_keys=keys[rows], history_values=values[rows], history_rows=None)
        some = _attend_to_history(
            queries[rows], some._replace(num_complete=context.num_complete[rows]), segment_size, scaling
        )
        return queries.new_zeros(*queries.shape[:3], values.shape[-1]).index_copy(0, rows, some)
    kv_heads, count = keys.shape[1], queries.shape[2]
    # One program of that kernel reads all keys for its landmarks, which takes long where these are few, as in decoding.
    landmark_queries = queries.to(keys.dtype)
    attend = find_history_attention(landmark_queries, values) if count > HISTORY_TILE else None
    if attend is not None:
        return attend(landmark_queries, keys, values, context.num_complete, segment_size, scaling)
    complete = _common(context.num_complete) if can_tile(queries, values, 0.0) else None
    tiles = tile_history(complete, count, keys.shape[2], segment_size, queries) if complete is not None else []
    if tiles:
        # For what all of these landmarks together see is twice what each sees by itself.
        none, groups = keys[:, :, :0], queries.shape[1] // kv_heads
        return tiled_attention(queries, none, none, _repeat(keys, groups), _repeat(values, groups), tiles, scaling)
    visible = torch.arange(keys.shape[2], device=queries.device) < (index[..., None] + 1) * segment_size
    # The heads that share a key stand among its queries, so that it is read once for all of them.
    groups = queries.shape[1] // kv_heads
    attended = F.scaled_dot_product_attention(
        queries.unflatten(1, (kv_heads, groups)).flatten(2, 3),
        keys.to(queries.dtype),
        values.to(queries.dtype),
        attn_mask=visible.repeat(1, groups, 1)[:, None],
        scale=scaling,
    )
    return attended.unflatten(2, (groups, count)).flatten(1, 2)


def append(past: torch.Tensor, new: torch.Tensor, filled: int | torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Axis 2 of `past` up to `filled`, an int or (batch,), and `new` right behind it, cut to `size` entries if given.

    A negative `filled` leaves out as many entries of `new`. Rows that end early repeat their last entry.
    """
    if isinstance(filled, int):
        if size is not None and filled >= size:
            return past[:, :, :size]
        new = new[:, :, max(-filled, 0) :]
        joined = torch.cat([past[:, :, : max(filled, 0)].to(new.device), new], 2) if filled > 0 else new
        return joined if size is None else joined[:, :, :size]
    joined = torch.cat([past.to(new.device), new], 2)
    slots = torch.arange(joined.shape[2] if size is None else size, device=new.device)
    source = torch.where(slots < filled[:, None], slots, slots - filled[:, None] + past.shape[2])
    return take_slots(joined, source.clamp(max=joined.shape[2] - 1), dim=2)


def overwrite(past: torch.Tensor, new: torch.Tensor, filled: int | torch.Tensor) -> None:
    """In place, axis 2 of `past` from entry `filled` on, an int or (batch,), which has room for all of `new`."""
    if isinstance(filled, int):
        past[:, :, filled : filled + new.shape[2]] = new
        return
    slots = filled[:, None] + torch.arange(new.shape[2], device=new.device)
    past.scatter_(2, slots[:, None, :, None].expand_as(new), new)


def take_slots(tensor: torch.Tensor, slots: torch.Tensor, dim: int) -> torch.Tensor:
    """Selects, for each row of the batch (axis 0), the entries `slots` (batch, count) of axis `dim`."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = slots.shape
    target = list(tensor.shape)
    target[dim] = slots.shape[1]
    return tensor.gather(dim, slots.view(shape).expand(target))


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be looked into, which one of the meta device and one of a program that is traced cannot."""
    return not (tensor.is_meta or is_tracing(tensor))


def causal_convolution(
    values: torch.Tensor, weight: torch.Tensor, first_query_slot: int | torch.Tensor, length: int
) -> torch.Tensor:
    """Depthwise over tokens, one kernel for each head: (batch, kv_heads, slots, head_dim) -> (batch, heads, length, head_dim).

    weight: (heads, 1, taps, 1), the last tap for the token itself. first_query_slot: where the result starts, an int or (batch,).
    """
    taps = weight.shape[2]
    if isinstance(first_query_slot, int):
        values = values[:, :, max(first_query_slot - taps + 1, 0) : first_query_slot + length]
        values = F.pad(values, (0, 0, max(taps - 1 - first_query_slot, 0), 0))
        return F.conv2d(values, weight.to(values.dtype), groups=values.shape[1])
    mixed = F.conv2d(F.pad(values, (0, 0, taps - 1, 0)), weight.to(values.dtype), groups=values.shape[1])
    slots = first_query_slot[:, None] + torch.arange(length, device=values.device)
    return take_slots(mixed, slots, dim=2)


class _LandmarkMaps(NamedTuple):
    """New landmark values as tokens @ V + rest: tokens (batch, heads, new, columns), their token_index (batch or 1, columns), and
    rest (batch, heads, new, head_dim), which comes from older landmarks."""

    tokens: torch.Tensor
    token_index: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(
        cls, context: Context, segment_size: int, regularization: torch.Tensor | None, scaling: float
    ) -> "_LandmarkMaps":
        dtype = _accumulation_dtype(context.keys)
        device, groups = context.keys.device, context.open_queries.shape[1] // context.keys.shape[1]
        count = context.open_queries.shape[2] // segment_size
        queries = context.open_queries[:, :, : count * segment_size].unflatten(2, (count, segment_size))
        queries = _mean(queries.to(dtype))
        index = _arange(context.num_complete, 0, count, device)
        if regularization is None:
            keys = context.keys[:, :, context.open_slot :]
            token_index = _arange(context.first, context.open_slot, context.keys.shape[2], device)
        else:
            keys, token_index = context.history_keys, torch.arange(context.history_keys.shape[2], device=device)[None]
        scores = queries @ _repeat(keys, groups).to(dtype).mT * scaling
        segment = torch.div(token_index, segment_size, rounding_mode="floor")[:, None]
        own = (segment == index[..., None])[:, None]
        pooling = scores.masked_fill(~own, float("-inf")).softmax(-1)
        if regularization is None:
            return cls(pooling, token_index, queries.new_zeros(*queries.shape[:3], context.values.shape[-1]))
        gamma = regularization.to(dtype)[:, None, None]
        everything = scores.masked_fill(~(segment <= index[..., None])[:, None], float("-inf")).softmax(-1)
        new_keys = _mean(_segments(context.keys, context, segment_size))
        past, square = _landmark_softmax(queries, new_keys, context, scaling).split(
            [context.landmarks.keys.shape[2], count], -1
        )
        rest = _solve(square, gamma, -past @ context.landmarks.values.to(dtype))
        return cls(_solve(square, gamma, everything + gamma * pooling), token_index, rest)


def _landmark_softmax(queries: torch.Tensor, new_keys: torch.Tensor, context: Context, scaling: float) -> torch.Tensor:
    """Rows of L for the new landmarks, (batch, heads, new, old + new), the old ones as many as `context` has room for."""
    groups = queries.shape[1] // new_keys.shape[1]
    old, count = context.landmarks.keys.shape[2], new_keys.shape[2]
    keys = torch.cat([context.landmarks.keys.to(queries.dtype), new_keys], 2)
    is_old = torch.arange(old, device=queries.device)[None] < _column(context.num_complete)
    is_old = is_old[:, None].expand(-1, count, -1)
    causal = torch.ones(count, count, dtype=torch.bool, device=queries.device).tril().expand(len(is_old), -1, -1)
    scores = queries @ _repeat(keys, groups).mT * scaling
    return scores.masked_fill(~torch.cat([is_old, causal], -1)[:, None], float("-inf")).softmax(-1)


def _solve(lower: torch.Tensor, gamma: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(lower + gamma I)⁻¹ right; all entries of the diagonal are at least gamma."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower + gamma * identity, right, upper=False)


def _segments(tensor: torch.Tensor, context: Context, segment_size: int) -> torch.Tensor:
    """Whole segments of open tokens, (batch, kv_heads, segments, segment_size, head_dim)."""
    count = context.open_queries.shape[2] // segment_size
    tensor = _cut(tensor, context.open_slot, context.open_slot + count * segment_size)
    return tensor.unflatten(2, (count, segment_size)).to(_accumulation_dtype(tensor))


def _mean(segments: torch.Tensor) -> torch.Tensor:
    """Over axis 3. `Tensor.mean` would divide a gradient as large as the segments, not one as large as the result."""
    return segments.sum(3) / segments.shape[3]


def _cut(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Entries begin ... end of axis 2, as a slice; but the gradient is written once, not zeros first."""
    length = tensor.shape[2]
    begin, end = min(begin, length), min(end, length)
    if (begin, end) == (0, length):
        return tensor
    return tensor.split([begin, end - begin, length - end], 2)[1]


def _far_field(context: Context, landmarks: Landmarks, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks, then landmarks: keys (batch, kv_heads, far keys, head_dim), values (batch, heads, far keys, head_dim)."""
    values = torch.cat([_repeat(context.sink_values, groups), landmarks.values], 2)
    return torch.cat([context.sink_keys, landmarks.keys], 2), values


def _tiles(context: Context, query: torch.Tensor, segment_size: int, near_segments: int) -> list[Tile]:
    """What `tiled_attention` needs; none where rows differ or it would not serve."""
    start, first = _common(context.start), _common(context.first)
    if start is None or first is None:
        return []
    sinks, dtype, device = context.sink_keys.shape[2], _accumulation_dtype(query), query.device

    def bias(begin: int, stop: int, low: int, high: int, sinks: int = 0, landmarks: int = 0) -> torch.Tensor:
        queries, keys = (torch.arange(*bounds, device=device)[None] for bounds in ((begin, stop), (low, high)))
        return _bias(queries, keys, sinks, context.num_sink_tokens, landmarks, segment_size, near_segments, dtype)[0]

    return tile_text(start, start + query.shape[2], first, sinks, segment_size, near_segments, bias)


def _common(index: int | torch.Tensor) -> int | None:
    """The index that all rows are seen to agree on."""
    if isinstance(index, int):
        return index
    agreed = len(index) > 0 and has_values(index) and bool((index == index[0]).all())
    return int(index[0]) if agreed else None


def _bias(
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    sinks: int,
    num_sink_tokens: int,
    landmarks: int,
    segment_size: int,
    near_segments: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What is added to the scores of landmarks, sinks and slots, (batch or 1, queries, all keys): 0 where a query attends
    exactly, log c for a landmark, -inf where it does not look. query_index, key_index: (batch or 1, count)."""
    query_index = query_index[..., None]
    query_segment = torch.div(query_index, segment_size, rounding_mode="floor")
    key_segment = torch.div(key_index, segment_size, rounding_mode="floor")[:, None]
    key_index = key_index[:, None]
    sink = torch.arange(sinks, device=query_index.device) <= query_index + num_sink_tokens
    near = (key_index >= 0) & (key_index <= query_index) & (key_segment >= query_segment - near_segments)
    far = torch.arange(landmarks, device=query_index.device) < query_segment - near_segments
    bias = torch.zeros((), dtype=dtype, device=query_index.device)
    exact = torch.cat([sink, near], -1)
    exact = torch.where(exact, bias, float("-inf"))
    return torch.cat([torch.where(far, bias + math.log(segment_size), float("-inf")), exact], -1)


def _key_range(context: Context, begin: int, end: int, segment_size: int, near_segments: int) -> tuple[int, int]:
    """Slots that hold the near fields of queries begin ... end."""
    slots = context.keys.shape[2]
    earliest, latest = context.first_query_slot
    if isinstance(context.start, int):
        low = ((context.start + begin) // segment_size - near_segments) * segment_size - context.first
    else:
        low = earliest + begin - (near_segments + 1) * segment_size + 1
    high = max(min(latest + end, slots), 0)
    return min(max(low, 0), high), high


def _window(pieces: tuple[torch.Tensor, ...], size: int, low: int, high: int) -> list[torch.Tensor]:
    """Slots low ... high of axis 2, which may be none, as parts of pieces of `size` slots."""
    parts = []
    for index in range(low // size, -(-high // size)):
        begin, end = max(low - index * size, 0), min(high - index * size, size)
        parts.append(pieces[index][:, :, begin:end])
    return parts


def _spread(weights: torch.Tensor, column: torch.Tensor, total: int) -> torch.Tensor:
    """Adds the last axis into `total` columns; column: (batch or 1, entries). What has no column is left out."""
    index = column[:, None, None].expand_as(weights)
    weights = weights.masked_fill((index < 0) | (index >= total), 0.0)
    return weights.new_zeros(*weights.shape[:-1], total).scatter_add(-1, index.clamp(0, max(total - 1, 0)), weights)


def _column(index: int | torch.Tensor) -> int | torch.Tensor:
    return index[:, None] if isinstance(index, torch.Tensor) else index


def _arange(first: int | torch.Tensor, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """first + begin ... first + end - 1, (batch or 1, end - begin)."""
    return torch.arange(begin, end, device=device)[None] + _column(first)


def _repeat(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
