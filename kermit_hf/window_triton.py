"""The near field and its merging with sinks and far field as Triton kernels: `window_blocked` without its matrix of scores.

A program reads the keys of its queries' windows tile by tile and keeps a running softmax (Dao et al. 2022, arXiv 2205.14135),
which starts from the far field, as one token with its own logit, and from the sinks. The logarithm of the sum of all
exponentials is kept; backwards it gives back each weight, e^{s - total}.
"""

import torch

from .functions import first_derivative_only
from .triton_tiles import dot, load, padded, store, take_up, tile_dtype, tl, triton
from .window_attention import FarField, Sinks, WindowOutput, window_blocked


def window_merged(
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
    """The formula of `window_attention`; with dropout by `window_blocked`. Shapes: see there. First derivatives only."""
    if dropout > 0.0:
        return window_blocked(query, key, value, window_size, first_real, sinks, far, is_causal, dropout)
    dtype = tile_dtype(query, key, value)
    states = [tensor.to(dtype).contiguous() for tensor in (query, key, value)]
    if not isinstance(first_real, torch.Tensor):
        first_real = torch.full((query.shape[0],), first_real, device=query.device)
    merged = [tensor.float().contiguous() for part in (sinks, far) if part is not None for tensor in part]
    sinks = [None, None] if sinks is None else merged[:2]
    far = [None, None] if far is None else merged[-2:]
    first_real = first_real.int().contiguous()
    return WindowOutput(_MergedWindow.apply(*states, *sinks, *far, first_real, window_size, is_causal))


class _MergedWindow(torch.autograd.Function):
    """Takes the parts one by one, and returns the output in float32."""

    @staticmethod
    def forward(ctx, query, key, value, sink_logits, sink_values, far_value, far_logit, first_real, window, is_causal):
        (*shape, head_dim), slots = query.shape, key.shape[2]
        output = query.new_empty(*shape, head_dim, dtype=torch.float32)
        total = query.new_empty(shape, dtype=torch.float32)
        parts = sink_logits, sink_values, far_value, far_logit
        sizes = _sizes(query, key, window, is_causal)
        num_sinks = 0 if sink_logits is None else sink_logits.shape[3]
        with torch.cuda.device_of(query):
            _merge_kernel[_tiles(query, sizes)](
                *(query, key, value, *parts, first_real, output, total, shape[2], slots),
                NUM_SINKS=num_sinks,
                SINKS=padded(num_sinks),
                **sizes,
            )
        ctx.save_for_backward(query, key, value, *parts, first_real, output, total)
        ctx.window, ctx.is_causal = window, is_causal
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        query, key, value, sink_logits, sink_values, far_value, far_logit, first_real, output, total = ctx.saved_tensors
        grad = grad.contiguous()
        # What each weight's gradient is compared with: the mean of all of them.
        agreement = (grad * output).sum(-1)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        sizes = _sizes(query, key, ctx.window, ctx.is_causal)
        inputs = query, key, value, first_real, grad, total, agreement
        lengths = query.shape[2], key.shape[2]
        with torch.cuda.device_of(query):
            _query_gradient_kernel[_tiles(query, sizes)](*inputs, grad_query, *lengths, **sizes)
            _key_gradient_kernel[_tiles(key, sizes)](*inputs, grad_key, grad_value, *lengths, **sizes)
        grads = [grad_query, grad_key, grad_value, None, None, None, None]
        if sink_logits is not None:
            groups = query.shape[1] // key.shape[1]
            weights = (sink_logits - total[..., None]).exp()
            wanted = grad @ sink_values.repeat_interleave(groups, 1).mT
            grads[3] = weights * (wanted - agreement[..., None])
            grads[4] = (weights.mT @ grad).unflatten(1, (-1, groups)).sum(2)
        if far_logit is not None:
            weight = (far_logit - total).exp()
            grads[5] = weight[..., None] * grad
            grads[6] = weight * ((grad * far_value).sum(-1) - agreement)
        return *grads, None, None, None


def _sizes(query: torch.Tensor, key: torch.Tensor, window: int, is_causal: bool) -> dict[str, object]:
    """What the kernels are compiled for."""
    head_dim = query.shape[3]
    # Wider tiles do not fit into the registers, nor into the shared memory of smaller GPUs.
    narrow = head_dim <= (64 if query.dtype == torch.bfloat16 else 16)
    return {
        "GROUPS": query.shape[1] // key.shape[1],
        "WINDOW": window,
        "IS_CAUSAL": is_causal,
        "HEADS": query.shape[1],
        "HEAD_DIM": head_dim,
        "DIM": padded(head_dim),
        "ROWS": 64 if narrow else 32,
        "num_warps": 4 if head_dim <= 64 else 8,
        "num_stages": 2,
    }


def _tiles(states: torch.Tensor, sizes: dict[str, object]) -> tuple[int, int]:
    """One program for each tile of each head."""
    return triton.cdiv(states.shape[2], sizes["ROWS"]), states.shape[0] * states.shape[1]


# The kernels. Slots are counted as in `window_attention`: query i stands in slot `slots - length + i`.


@triton.jit
def _visible(queries, keys, first_real, slots, WINDOW: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Which keys each query sees, (queries, keys), both as slots. One that is padding sees itself, as does any other."""
    distance = queries[:, None] - keys[None, :]
    near = (distance < WINDOW) & (distance >= (0 if IS_CAUSAL else 1 - WINDOW))
    return near & (keys < slots)[None, :] & ((keys >= first_real)[None, :] | (distance == 0))


@triton.jit
def _merge_kernel(
    query,
    key,
    value,
    sink_logits,
    sink_values,
    far_values,
    far_logits,
    first_real,
    outputs,
    totals,
    length,
    slots,
    GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = query_head // GROUPS
    rows, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    before = slots - length
    first = tl.load(first_real + query_head // HEADS)
    state = load(query + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM)

    # A finite start: logits of -inf are then weights of zero.
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    if far_logits is not None:
        logit = tl.load(far_logits + query_head * length + rows, mask=rows < length, other=float("-inf"))
        largest = tl.maximum(largest, logit)
        total = tl.exp(logit - largest)
        output = total[:, None] * load(far_values + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM)
    if sink_logits is not None:
        columns = tl.arange(0, SINKS)
        logits = load(sink_logits + query_head * length * NUM_SINKS, rows, columns, length, NUM_SINKS)
        logits = tl.where((columns < NUM_SINKS)[None, :], logits, float("-inf"))
        sinks = load(sink_values + head * NUM_SINKS * HEAD_DIM, columns, dims, NUM_SINKS, HEAD_DIM)
        largest, total, output = take_up(largest, total, output, logits, sinks, dtype)

    start = tl.maximum(before + tile * ROWS - WINDOW + 1, 0) // ROWS * ROWS
    end = tl.minimum(before + (tile + 1) * ROWS + (0 if IS_CAUSAL else WINDOW - 1), slots)
    for place in range(start, end, ROWS):
        keys = place + tl.arange(0, ROWS)
        key_state = load(key + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)
        values = load(value + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)
        visible = _visible(before + rows, keys, first, slots, WINDOW, IS_CAUSAL)
        scores = tl.where(visible, dot(state, tl.trans(key_state), dtype), float("-inf"))
        largest, total, output = take_up(largest, total, output, scores, values, dtype)
    total = tl.where(rows < length, total, 1.0)
    store(outputs + query_head * length * HEAD_DIM, output / total[:, None], rows, dims, length, HEAD_DIM)
    tl.store(totals + query_head * length + rows, largest + tl.log(total), mask=rows < length)


@triton.jit
def _query_gradient_kernel(
    query,
    key,
    value,
    first_real,
    grads,
    totals,
    agreements,
    grad_queries,
    length,
    slots,
    GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = query_head // GROUPS
    rows, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    before = slots - length
    first = tl.load(first_real + query_head // HEADS)
    state = load(query + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM)
    grad = load(grads + query_head * length * HEAD_DIM, rows, dims, length, HEAD_DIM).to(dtype)
    total = tl.load(totals + query_head * length + rows, mask=rows < length, other=0.0)
    agreement = tl.load(agreements + query_head * length + rows, mask=rows < length, other=0.0)

    grad_state = tl.zeros([ROWS, DIM], tl.float32)
    start = tl.maximum(before + tile * ROWS - WINDOW + 1, 0) // ROWS * ROWS
    end = tl.minimum(before + (tile + 1) * ROWS + (0 if IS_CAUSAL else WINDOW - 1), slots)
    for place in range(start, end, ROWS):
        keys = place + tl.arange(0, ROWS)
        key_state = load(key + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)
        values = load(value + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)
        visible = _visible(before + rows, keys, first, slots, WINDOW, IS_CAUSAL)
        scores = tl.where(visible, dot(state, tl.trans(key_state), dtype) - total[:, None], float("-inf"))
        grad_scores = tl.exp(scores) * (dot(grad, tl.trans(values), dtype) - agreement[:, None])
        grad_state += dot(grad_scores, key_state, dtype)
    store(grad_queries + query_head * length * HEAD_DIM, grad_state, rows, dims, length, HEAD_DIM)


@triton.jit
def _key_gradient_kernel(
    query,
    key,
    value,
    first_real,
    grads,
    totals,
    agreements,
    grad_keys,
    grad_values,
    length,
    slots,
    GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of keys, batch * kv_heads."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    before = slots - length
    first = tl.load(first_real + head * GROUPS // HEADS)
    key_state = load(key + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)
    values = load(value + head * slots * HEAD_DIM, keys, dims, slots, HEAD_DIM)

    grad_state = tl.zeros([ROWS, DIM], tl.float32)
    grad_value = tl.zeros([ROWS, DIM], tl.float32)
    start = tl.maximum(tile * ROWS - before - (0 if IS_CAUSAL else WINDOW - 1), 0) // ROWS * ROWS
    end = tl.minimum((tile + 1) * ROWS - before + WINDOW - 1, length)
    for group in range(GROUPS):
        query_rows = (head * GROUPS + group) * length
        for place in range(start, end, ROWS):
            rows = place + tl.arange(0, ROWS)
            state = load(query + query_rows * HEAD_DIM, rows, dims, length, HEAD_DIM)
            grad = load(grads + query_rows * HEAD_DIM, rows, dims, length, HEAD_DIM).to(dtype)
            total = tl.load(totals + query_rows + rows, mask=rows < length, other=0.0)
            agreement = tl.load(agreements + query_rows + rows, mask=rows < length, other=0.0)
            visible = _visible(before + rows, keys, first, slots, WINDOW, IS_CAUSAL) & (rows < length)[:, None]
            scores = tl.where(visible, dot(state, tl.trans(key_state), dtype) - total[:, None], float("-inf"))
            weights = tl.exp(scores)
            grad_value += dot(tl.trans(weights), grad, dtype)
            grad_scores = weights * (dot(grad, tl.trans(values), dtype) - agreement[:, None])
            grad_state += dot(tl.trans(grad_scores), state, dtype)
    store(grad_keys + head * slots * HEAD_DIM, grad_state, keys, dims, slots, HEAD_DIM)
    store(grad_values + head * slots * HEAD_DIM, grad_value, keys, dims, slots, HEAD_DIM)
