"""Causal Nyström attention as Triton kernels: near field, sinks and landmarks in one running softmax, without a matrix of scores.

Queries and keys have token indices, counted from the first token behind the sinks. Near keys are seen by the queries of their own
and the next segments; far keys, sinks in front of landmarks, by every query from some token index on. So are, by landmark
queries that each stand at the end of their segment, all keys of a text, each from its own index on: B V is the same kernel.

A program reads what its queries see tile by tile (Dao et al. 2022, arXiv 2205.14135). The logarithm of the sum of all exponentials is
kept; backwards it gives back each weight, e^{s - total}.
"""

import math
from typing import NamedTuple

import torch

from .functions import first_derivative_only
from .triton_tiles import dot, load, padded, store, take_up, tile_dtype, tl, triton


# Landmarks are few and each is read by most of the text: their gradient is summed in parts, so that a GPU has this many programs
# to run, of so many queries at least, but keeps no more than so many sums.
PROGRAMS, PART_ROWS, MAX_PARTS = 512, 256, 16


class Layout(NamedTuple):
    """Query i is token start + i * stride and key j token first + j, both (batch,), int32. A query sees the keys of its own
    and the `near_segments` previous segments up to itself; of the far keys sink j from token j - num_sink_tokens on, and
    number n of those behind the `sinks` first ones from token far_start + n * far_step on, with far_bias added to its logit."""

    start: torch.Tensor
    first: torch.Tensor
    stride: int
    segment_size: int
    near_segments: int
    sinks: int
    num_sink_tokens: int
    far_start: int
    far_step: int
    far_bias: float


def text_layout(
    start: torch.Tensor,
    first: torch.Tensor,
    sinks: int,
    num_sink_tokens: int,
    segment_size: int,
    near_segments: int,
) -> Layout:
    """Far keys are sinks and landmarks, which are seen when the near field has left their segment behind."""
    return Layout(
        start=start,
        first=first,
        stride=1,
        segment_size=segment_size,
        near_segments=near_segments,
        sinks=sinks,
        num_sink_tokens=num_sink_tokens,
        far_start=(near_segments + 1) * segment_size,
        far_step=segment_size,
        far_bias=math.log(segment_size),
    )


def history_layout(num_complete: torch.Tensor, first: torch.Tensor, segment_size: int) -> Layout:
    """Queries are those of landmarks, each the last token of its segment; far keys are all tokens, each seen from itself on."""
    return Layout(
        start=num_complete * segment_size + segment_size - 1,
        first=first,
        stride=segment_size,
        segment_size=segment_size,
        near_segments=0,
        sinks=0,
        num_sink_tokens=0,
        far_start=0,
        far_step=1,
        far_bias=0.0,
    )


def landmark_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far_key: torch.Tensor,
    far_value: torch.Tensor,
    start: int | torch.Tensor,
    first: int | torch.Tensor,
    sinks: int,
    num_sink_tokens: int,
    segment_size: int,
    near_segments: int,
    scaling: float,
) -> torch.Tensor:
    """Softmax over near keys and far keys, which are `sinks` sinks, then landmarks. First derivatives only.

    query (batch, heads, seq, head_dim); key, value (batch, kv_heads, slots, head_dim); far_key (batch, kv_heads, far keys,
    head_dim); far_value (batch, heads, far keys, head_dim). start, first, an int or (batch,), num_sink_tokens: as of
    `Context`. Returns (batch, heads, seq, head_dim) in float32.
    """
    layout = text_layout(_rows(start, query), _rows(first, query), sinks, num_sink_tokens, segment_size, near_segments)
    return _attend(query, key, value, far_key, far_value, layout, scaling)


def history_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_complete: int | torch.Tensor,
    segment_size: int,
    scaling: float,
) -> torch.Tensor:
    """Softmax of landmark queries over all tokens up to the end of their own segments. First derivatives only.

    query (batch, heads, landmarks, head_dim), of the segments behind the first `num_complete`, an int or (batch,); key, value
    (batch, kv_heads, tokens, head_dim). Returns (batch, heads, landmarks, head_dim) in float32.
    """
    layout = history_layout(_rows(num_complete, query), _rows(0, query), segment_size)
    return _attend(query, key[:, :, :0], value[:, :, :0], key, value, layout, scaling)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far_key: torch.Tensor,
    far_value: torch.Tensor,
    layout: Layout,
    scaling: float,
) -> torch.Tensor:
    states = query, key, value, far_key, far_value
    dtype = tile_dtype(*states)
    return _LandmarkAttention.apply(*(tensor.to(dtype).contiguous() for tensor in states), layout, scaling)


def _rows(index: int | torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """(batch,), int32."""
    if isinstance(index, torch.Tensor):
        return index.int().contiguous()
    return torch.full((query.shape[0],), index, dtype=torch.int32, device=query.device)


class _LandmarkAttention(torch.autograd.Function):
    """far_value has as many heads as far_key or as query. Returns the output in float32."""

    @staticmethod
    def forward(ctx, query, key, value, far_key, far_value, layout, scaling):
        *shape, head_dim = query.shape
        output = query.new_empty(*shape, head_dim, dtype=torch.float32)
        total = query.new_empty(shape, dtype=torch.float32)
        sizes = _sizes(query, key, layout, scaling)
        far_groups = query.shape[1] // far_value.shape[1]
        lengths = shape[2], key.shape[2], far_key.shape[2], layout.sinks
        inputs = query, key, value, far_key, far_value, layout.start, layout.first
        with torch.cuda.device_of(query):
            _attend_kernel[_tiles(query, sizes)](*inputs, output, total, *lengths, FAR_GROUPS=far_groups, **sizes)
        ctx.save_for_backward(query, key, value, far_key, far_value, *layout[:2], output, total)
        ctx.layout, ctx.scaling = layout[2:], scaling
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        query, key, value, far_key, far_value, start, first, output, total = ctx.saved_tensors
        layout = Layout(start, first, *ctx.layout)
        grad = grad.contiguous()
        # What each weight's gradient is compared with: the mean of all of them.
        agreement = (grad * output).sum(-1)
        grad_query = torch.empty_like(query)
        sizes = _sizes(query, key, layout, ctx.scaling)
        far_groups = query.shape[1] // far_value.shape[1]
        lengths = query.shape[2], key.shape[2], far_key.shape[2], layout.sinks
        sums = grad, total, agreement
        with torch.cuda.device_of(query):
            _query_gradient_kernel[_tiles(query, sizes)](
                *(query, key, value, far_key, far_value, start, first, *sums, grad_query, *lengths),
                FAR_GROUPS=far_groups,
                **sizes,
            )
            near = _key_gradient(query, key, value, layout, sums, sizes, is_far=False)
            far = _key_gradient(query, far_key, far_value, layout, sums, sizes, is_far=True)
        return grad_query, *near, *far, None, None


def _key_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sizes: dict[str, object],
    is_far: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of near or far keys and values. sums: gradient of the output, logarithms, and means, see above."""
    value_heads, count = value.shape[1:3]
    if count == 0:
        return torch.zeros_like(key), torch.zeros_like(value)
    length, kv_heads = query.shape[2], key.shape[1]
    tiles, heads = _tiles(value, sizes)
    parts = max(min(PROGRAMS // (tiles * heads), MAX_PARTS, triton.cdiv(length, PART_ROWS)), 1) if is_far else 1
    part_rows = triton.cdiv(triton.cdiv(length, parts), sizes["ROWS"]) * sizes["ROWS"]
    parts = triton.cdiv(length, part_rows)
    # Sums of parts, and of the heads that share a key, add up in float32.
    dtype = key.dtype if parts == 1 and value_heads == kv_heads else torch.float32
    grad_key, grad_value = (key.new_empty(parts, *value.shape, dtype=dtype) for _ in range(2))
    _key_gradient_kernel[(tiles, parts, heads)](
        *(query, key, value, layout.start, layout.first, *sums, grad_key, grad_value),
        *(length, count, layout.sinks, part_rows),
        IS_FAR=is_far,
        VALUE_GROUPS=query.shape[1] // value_heads,
        **sizes,
    )
    grad_key, grad_value = (grad[0] if parts == 1 else grad.sum(0) for grad in (grad_key, grad_value))
    if value_heads > kv_heads:
        grad_key = grad_key.unflatten(1, (kv_heads, -1)).sum(2)
    return grad_key.to(key.dtype), grad_value.to(value.dtype)


def _sizes(query: torch.Tensor, key: torch.Tensor, layout: Layout, scaling: float) -> dict[str, object]:
    """What the kernels are compiled for."""
    head_dim = query.shape[3]
    # Larger tiles do not fit into the registers, nor into the shared memory of smaller GPUs.
    rows = 64 if query.dtype == torch.bfloat16 or head_dim <= 16 else 32
    return {
        "SCALE": scaling,
        "GROUPS": query.shape[1] // key.shape[1],
        "STRIDE": layout.stride,
        "SEGMENT": layout.segment_size,
        "NEAR": layout.near_segments,
        "SINK_TOKENS": layout.num_sink_tokens,
        "FAR_START": layout.far_start,
        "FAR_STEP": layout.far_step,
        "FAR_BIAS": layout.far_bias,
        "HEADS": query.shape[1],
        "HEAD_DIM": head_dim,
        "DIM": padded(head_dim),
        "ROWS": rows if head_dim <= 64 else rows // 2,
        "num_warps": 4 if head_dim <= 64 else 8,
        "num_stages": 2,
    }


def _tiles(states: torch.Tensor, sizes: dict[str, object]) -> tuple[int, int]:
    """One program for each tile of each head."""
    return triton.cdiv(states.shape[2], sizes["ROWS"]), states.shape[0] * states.shape[1]


# Helpers of the kernels. Queries and near keys are named by token indices, far keys by their columns.


@triton.jit
def _far_logits(scores, queries, columns, num_far, sinks, SINK_TOKENS, FAR_START, FAR_STEP, FAR_BIAS):
    """Of scores (queries, far keys), -inf where a query does not look."""
    seen_from = _seen_from(columns, sinks, SINK_TOKENS, FAR_START, FAR_STEP)
    visible = (queries[:, None] >= seen_from[None, :]) & (columns < num_far)[None, :]
    return tl.where(visible, scores + tl.where(columns < sinks, 0.0, FAR_BIAS)[None, :], float("-inf"))


@triton.jit
def _seen_from(columns, sinks, SINK_TOKENS, FAR_START, FAR_STEP):
    """The token from which on far keys are seen."""
    return tl.where(columns < sinks, columns - SINK_TOKENS, FAR_START + (columns - sinks) * FAR_STEP)


@triton.jit
def _num_seen(query, num_far, sinks, FAR_START, FAR_STEP):
    """How many far keys a query, and any before it, sees at most."""
    return tl.minimum(sinks + tl.maximum(query - FAR_START + FAR_STEP, 0) // FAR_STEP, num_far)


@triton.jit
def _near_logits(scores, queries, keys, end, SEGMENT, NEAR):
    """Of scores (queries, near keys), -inf where a query does not look; `end`: the token behind the last key."""
    lowest = (tl.maximum(queries, 0) // SEGMENT - NEAR) * SEGMENT
    visible = (keys[None, :] >= tl.maximum(lowest, 0)[:, None]) & (keys[None, :] <= queries[:, None])
    return tl.where(visible & (keys < end)[None, :], scores, float("-inf"))


@triton.jit
def _near_slots(earliest, latest, first, slots, SEGMENT, NEAR, ROWS):
    """Slots that hold the near fields of queries `earliest` ... `latest`, from the border of a tile on."""
    lowest = tl.maximum((tl.maximum(earliest, 0) // SEGMENT - NEAR) * SEGMENT, 0)
    return tl.maximum(lowest - first, 0) // ROWS * ROWS, tl.minimum(latest + 1 - first, slots)


# The kernels.


@triton.jit
def _attend_kernel(
    query,
    key,
    value,
    far_key,
    far_value,
    starts,
    firsts,
    outputs,
    totals,
    length,
    slots,
    num_far,
    sinks,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    FAR_GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    NEAR: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    FAR_START: tl.constexpr,
    FAR_STEP: tl.constexpr,
    FAR_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, far_head = query_head // GROUPS, query_head // FAR_GROUPS
    rows, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    start, first = tl.load(starts + query_head // HEADS), tl.load(firsts + query_head // HEADS)
    queries = start + rows * STRIDE
    latest = start + (tl.minimum((tile + 1) * ROWS, length) - 1) * STRIDE
    state = load(query + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM)

    # A finite start: logits of -inf are then weights of zero.
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    for place in range(0, _num_seen(latest, num_far, sinks, FAR_START, FAR_STEP), ROWS):
        columns = place + tl.arange(0, ROWS)
        key_state = load(far_key + head * num_far * HEAD_DIM, columns, dims, num_far, HEAD_DIM)
        values = load(far_value + far_head * num_far * HEAD_DIM, columns, dims, num_far, HEAD_DIM)
        scores = dot(state, tl.trans(key_state), dtype) * SCALE
        logits = _far_logits(scores, queries, columns, num_far, sinks, SINK_TOKENS, FAR_START, FAR_STEP, FAR_BIAS)
        largest, total, output = take_up(largest, total, output, logits, values, dtype)
    low, high = _near_slots(start + tile * ROWS * STRIDE, latest, first, slots, SEGMENT, NEAR, ROWS)
    for place in range(low, high, ROWS):
        columns = place + tl.arange(0, ROWS)
        key_state = load(key + head * slots * HEAD_DIM, columns, dims, slots, HEAD_DIM)
        values = load(value + head * slots * HEAD_DIM, columns, dims, slots, HEAD_DIM)
        scores = dot(state, tl.trans(key_state), dtype) * SCALE
        logits = _near_logits(scores, queries, first + columns, first + slots, SEGMENT, NEAR)
        largest, total, output = take_up(largest, total, output, logits, values, dtype)
    total = tl.where(rows < length, total, 1.0)
    store(outputs + query_head * length * HEAD_DIM, output / total[:, None], rows, dims, length, HEAD_DIM)
    tl.store(totals + query_head * length + rows, largest + tl.log(total), mask=rows < length)


@triton.jit
def _query_gradient_kernel(
    query,
    key,
    value,
    far_key,
    far_value,
    starts,
    firsts,
    grads,
    totals,
    agreements,
    grad_queries,
    length,
    slots,
    num_far,
    sinks,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    FAR_GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    NEAR: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    FAR_START: tl.constexpr,
    FAR_STEP: tl.constexpr,
    FAR_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, far_head = query_head // GROUPS, query_head // FAR_GROUPS
    rows, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    start, first = tl.load(starts + query_head // HEADS), tl.load(firsts + query_head // HEADS)
    queries = start + rows * STRIDE
    latest = start + (tl.minimum((tile + 1) * ROWS, length) - 1) * STRIDE
    state = load(query + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM)
    grad = load(grads + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM).to(dtype)
    total = tl.load(totals + query_head * length + rows, mask=rows < length, other=0.0)
    agreement = tl.load(agreements + query_head * length + rows, mask=rows < length, other=0.0)

    grad_state = tl.zeros([ROWS, DIM], tl.float32)
    for place in range(0, _num_seen(latest, num_far, sinks, FAR_START, FAR_STEP), ROWS):
        columns = place + tl.arange(0, ROWS)
        key_state = load(far_key + head * num_far * HEAD_DIM, columns, dims, num_far, HEAD_DIM)
        values = load(far_value + far_head * num_far * HEAD_DIM, columns, dims, num_far, HEAD_DIM)
        scores = dot(state, tl.trans(key_state), dtype) * SCALE
        logits = _far_logits(scores, queries, columns, num_far, sinks, SINK_TOKENS, FAR_START, FAR_STEP, FAR_BIAS)
        grad_scores = tl.exp(logits - total[:, None]) * (dot(grad, tl.trans(values), dtype) - agreement[:, None])
        grad_state += dot(grad_scores, key_state, dtype)
    low, high = _near_slots(start + tile * ROWS * STRIDE, latest, first, slots, SEGMENT, NEAR, ROWS)
    for place in range(low, high, ROWS):
        columns = place + tl.arange(0, ROWS)
        key_state = load(key + head * slots * HEAD_DIM, columns, dims, slots, HEAD_DIM)
        values = load(value + head * slots * HEAD_DIM, columns, dims, slots, HEAD_DIM)
        scores = dot(state, tl.trans(key_state), dtype) * SCALE
        logits = _near_logits(scores, queries, first + columns, first + slots, SEGMENT, NEAR)
        grad_scores = tl.exp(logits - total[:, None]) * (dot(grad, tl.trans(values), dtype) - agreement[:, None])
        grad_state += dot(grad_scores, key_state, dtype)
    store(grad_queries + query_head * length * HEAD_DIM, grad_state * SCALE, rows, dims, length, HEAD_DIM)


@triton.jit
def _key_gradient_kernel(
    query,
    key,
    value,
    starts,
    firsts,
    grads,
    totals,
    agreements,
    grad_keys,
    grad_values,
    length,
    num_keys,
    sinks,
    part_rows,
    IS_FAR: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    NEAR: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    FAR_START: tl.constexpr,
    FAR_STEP: tl.constexpr,
    FAR_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of near or far keys, parts of the queries, batch * heads of values. What a part adds is stored by itself."""
    tile, part, value_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = value_head * VALUE_GROUPS // GROUPS
    columns, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    row = value_head * VALUE_GROUPS // HEADS
    start, first = tl.load(starts + row), tl.load(firsts + row)
    key_state = load(key + head * num_keys * HEAD_DIM, columns, dims, num_keys, HEAD_DIM)
    values = load(value + value_head * num_keys * HEAD_DIM, columns, dims, num_keys, HEAD_DIM)

    # The first and the last token that may see one of these keys.
    if IS_FAR:
        earliest = _seen_from(tile * ROWS, sinks, SINK_TOKENS, FAR_START, FAR_STEP)
        latest = start + length * STRIDE
    else:
        earliest = first + tile * ROWS
        latest = (tl.maximum(earliest + ROWS - 1, 0) // SEGMENT + NEAR + 1) * SEGMENT
    begin = tl.maximum(tl.maximum(earliest - start, 0) // STRIDE, part * part_rows) // ROWS * ROWS
    end = tl.minimum(tl.minimum(tl.maximum(latest - start, 0), length), (part + 1) * part_rows)

    grad_state = tl.zeros([ROWS, DIM], tl.float32)
    grad_value = tl.zeros([ROWS, DIM], tl.float32)
    for group in range(VALUE_GROUPS):
        query_rows = (value_head * VALUE_GROUPS + group) * length
        for place in range(begin, end, ROWS):
            rows = place + tl.arange(0, ROWS)
            queries = start + rows * STRIDE
            state = load(query + query_rows * HEAD_DIM, rows, dims, length, HEAD_DIM)
            grad = load(grads + query_rows * HEAD_DIM, rows, dims, length, HEAD_DIM).to(dtype)
            # Rows behind the last get no weight.
            total = tl.load(totals + query_rows + rows, mask=rows < length, other=float("inf"))
            agreement = tl.load(agreements + query_rows + rows, mask=rows < length, other=0.0)
            logits = dot(state, tl.trans(key_state), dtype) * SCALE
            if IS_FAR:
                logits = _far_logits(
                    logits, queries, columns, num_keys, sinks, SINK_TOKENS, FAR_START, FAR_STEP, FAR_BIAS
                )
            else:
                logits = _near_logits(logits, queries, first + columns, first + num_keys, SEGMENT, NEAR)
            weights = tl.exp(logits - total[:, None])
            grad_value += dot(tl.trans(weights), grad, dtype)
            grad_scores = weights * (dot(grad, tl.trans(values), dtype) - agreement[:, None])
            grad_state += dot(tl.trans(grad_scores), state, dtype)
    stored = (part * tl.num_programs(2) + value_head) * num_keys * HEAD_DIM
    store(grad_keys + stored, grad_state * SCALE, columns, dims, num_keys, HEAD_DIM)
    store(grad_values + stored, grad_value, columns, dims, num_keys, HEAD_DIM)
