"""The additive rule with second-order Taylor features as Triton kernels, which keep the features in registers.

Notation as in `kernel_attention`, phi as in `TaylorFeatureMap`. Inside a chunk no features are needed: q_t^T k_j is there
1 + s + s^2 / 2. What came before a chunk is read from a memory of the features of its keys, and only these memories, one
per chunk, are written to the GPU's memory:

    write    of each chunk by itself: what its tokens add to the memory (all chunks at once)
    carry    the memory before each chunk, from the first to the last (all entries of the memory at once)
    read     numerator and denominator of some queries: the memory before their chunk, then the keys of their chunk

Backwards `write` and `carry`, given queries and the gradients of what they read, find the gradient of each memory from
the last chunk to the first; one more kernel finds the gradient of the queries and one that of keys and values.

A block of features is a product of two coordinates chosen from each row by matrices of zeros and ones, times coefficients:
the choice and its transpose, which the gradient needs, are matrix products. Operands of matrix products are bfloat16 where
the values are, else float32, kept to nearly all its digits by three products of TF32; sums are float32.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .functions import first_derivative_only
from .kernel_attention import KernelMemory, KernelReadout, chunk_decays, cumulative_log_decay
from .triton_tiles import dot, load, padded, store, tile_dtype, tl, triton


# Tokens of a tile, at most, and features of a block: with 64 features, registers spill.
ROWS = 64
FEATURES = 32
# Elements of the memory that one program carries from chunk to chunk.
CARRIED = 1024


def taylor_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    key_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> KernelReadout:
    """`additive_chunked` with the features of `TaylorFeatureMap`, made here from their coordinates.

    query (batch, heads, seq, coordinates) and key (batch, kv_heads, seq, coordinates) are what the map expands. key_mask
    (batch or 1, 1, seq) is zero at tokens that leave the memory as it is; their log_forget has to be zero too. First
    derivatives only. Raises `ValueError` unless chunk_size is a multiple of 64.
    """
    length, coordinates, head_dim = query.shape[2], query.shape[3], value.shape[3]
    num_features = _expansion(coordinates, query.device).first.shape[0]
    if memory is None:
        shape = (*key.shape[:2], num_features)
        matrix = torch.zeros(*shape, head_dim, dtype=torch.float32, device=value.device)
        memory = KernelMemory(matrix, torch.zeros(shape, dtype=torch.float32, device=value.device))
    chunk_size = chunk_size or default_chunk_size(num_features, length)
    if chunk_size % ROWS:
        raise ValueError(f"chunk_size={chunk_size} does not fit tiles of tokens; allowed are multiples of {ROWS}")
    # The coordinates come in float32, however precise they are.
    dtype = tile_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    numerator, denominator, *last = _TaylorChunks.apply(query, key, value, log_forget, *memory, key_mask, chunk_size)
    return KernelReadout(numerator, denominator, KernelMemory(*last))


def default_chunk_size(num_features: int, length: int) -> int:
    """A token meets half a chunk of keys and twice, writing and reading, the memory, whose size `num_features` sets; longer
    chunks also leave fewer memories to keep."""
    chunk_size = 256 if num_features <= 256 else 512 if num_features <= 1024 else 1024
    return min(chunk_size, max(ROWS, triton.next_power_of_2(length)))


class Expansion(NamedTuple):
    """Feature f of x is coefficient[f] x[first[f]] x[second[f]], each of shape (features,); index -1 stands for 1."""

    first: torch.Tensor
    second: torch.Tensor
    coefficient: torch.Tensor


@lru_cache(maxsize=8)
def _expansion(coordinates: int, device: torch.device) -> Expansion:
    """In the order of `TaylorFeatureMap`."""
    rows, columns = torch.triu_indices(coordinates, coordinates, device=device)
    single = torch.arange(coordinates, device=device)
    one = torch.full_like(single, -1)
    coefficient = torch.ones(1 + coordinates + len(rows), dtype=torch.float32, device=device)
    coefficient[1 : 1 + coordinates] = coordinates**-0.25
    coefficient[1 + coordinates :] = coordinates**-0.5
    # The two halves of a product off the diagonal are one feature; on it half of the square is left.
    coefficient[1 + coordinates :][rows == columns] *= 0.5**0.5
    first, second = torch.cat([one[:1], single, rows]), torch.cat([one[:1], one, columns])
    return Expansion(first.int(), second.int(), coefficient)


class Gates(NamedTuple):
    """What decay and padding do to each token, float32, zero tokens added up to whole chunks; None where nothing.

    keep: 0 at tokens that do not enter, else 1. coarse + fine: log decay from the start of its chunk, see
    `cumulative_log_decay`. decay_in: its exponential. write: decay from a token to the end of its chunk, times keep. All
    these (batch, kv_heads, chunks * chunk_size); decay_all, of a whole chunk, (batch, kv_heads, chunks).
    """

    keep: torch.Tensor | None = None
    coarse: torch.Tensor | None = None
    fine: torch.Tensor | None = None
    decay_in: torch.Tensor | None = None
    write: torch.Tensor | None = None
    decay_all: torch.Tensor | None = None


def _gates(key: torch.Tensor, log_forget: torch.Tensor | None, key_mask: torch.Tensor | None, chunk_size: int) -> Gates:
    missing = -key.shape[2] % chunk_size
    keep = None
    if key_mask is not None:
        keep = F.pad(key_mask.float().expand(key.shape[:3]), (0, missing)).contiguous()
    if log_forget is None:
        return Gates(keep, write=keep)
    chunks = F.pad(log_forget.float(), (0, missing)).unflatten(2, (-1, chunk_size))
    coarse, fine = cumulative_log_decay(chunks)
    decay_in, decay_out, decay_all = chunk_decays(coarse, fine)
    coarse, fine, decay_in, decay_out = (tensor.flatten(2) for tensor in (coarse, fine, decay_in, decay_out))
    return Gates(keep, coarse, fine, decay_in, decay_out if keep is None else decay_out * keep, decay_all)


class _TaylorChunks(torch.autograd.Function):
    """Takes coordinates, values and gates as `taylor_chunked` does, and the first memory. Returns numerator, denominator and
    the last memory, in float32."""

    @staticmethod
    def forward(ctx, query, key, value, log_forget, matrix, normalizer, key_mask, chunk_size):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        gates = _gates(key, log_forget, key_mask, chunk_size)
        with torch.cuda.device_of(query):
            matrices, normalizers = _write(key, value, None, gates.write, key.shape[1], chunk_size)
            last_matrix = _carry(matrices, gates.decay_all, matrix)
            last_normalizer = _carry(normalizers, gates.decay_all, normalizer)
            numerator, denominator = _read(query, key, value, gates, matrices, normalizers, chunk_size)
        ctx.save_for_backward(query, key, value, matrices, normalizers, last_matrix, last_normalizer, *gates)
        ctx.chunk_size = chunk_size
        return numerator, denominator, last_matrix, last_normalizer

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_numerator, grad_denominator, grad_matrix, grad_normalizer):
        query, key, value, matrices, normalizers, last_matrix, last_normalizer, *gates = ctx.saved_tensors
        gates, chunk_size = Gates(*gates), ctx.chunk_size
        grads = grad_numerator.contiguous(), grad_denominator.contiguous()
        with torch.cuda.device_of(query):
            # Gradients of the memory after each chunk: what later chunks read of it.
            grad_matrices, grad_normalizers = _write(query, *grads, gates.decay_in, key.shape[1], chunk_size)
            first_matrix = _carry(grad_matrices, gates.decay_all, grad_matrix, reverse=True)
            first_normalizer = _carry(grad_normalizers, gates.decay_all, grad_normalizer, reverse=True)
            before, after = (matrices, normalizers), (grad_matrices, grad_normalizers)
            grad_query, query_decay = _query_gradient(query, key, value, gates, before, grads, chunk_size)
            grad_key, grad_value, key_decay = _key_gradient(query, key, value, gates, after, grads, chunk_size)
        grad_log_forget = None
        if gates.coarse is not None:
            # A memory decays as a whole: its gradient along itself is that of the log decay of the chunk before it.
            decay_all = _along(grad_matrices, matrices, last_matrix)
            decay_all += _along(grad_normalizers[..., None], normalizers[..., None], last_normalizer[..., None])
            steps = query_decay.unflatten(1, (key.shape[1], -1)).sum(2) - key_decay
            steps = F.pad(steps, (0, -key.shape[2] % chunk_size)).unflatten(2, (-1, chunk_size))
            steps[..., -1] += decay_all
            grad_log_forget = steps.flip(-1).cumsum(-1).flip(-1).flatten(2)[..., : key.shape[2]]
        return grad_query, grad_key, grad_value, grad_log_forget, first_matrix, first_normalizer, None, None


def _along(grads: torch.Tensor, before: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Products, summed, of the memory after each chunk with its gradient: (batch, kv_heads, chunks)."""
    products = torch.einsum("bhcfd,bhcfd->bhc", grads[:, :, :-1], before[:, :, 1:])
    return torch.cat([products, torch.einsum("bhcfd,bhfd->bhc", grads[:, :, -1:], last)], -1)


# Launching.


def _write(
    states: torch.Tensor,
    rows: torch.Tensor,
    sums: torch.Tensor | None,
    weight: torch.Tensor | None,
    kv_heads: int,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each chunk: sum_t weight_t phi(states_t) rows_t^T, and sum_t weight_t sums_t phi(states_t), sums being one if None."""
    (batch, _, length, coordinates), head_dim = states.shape, rows.shape[3]
    sizes = _sizes(states, head_dim, kv_heads, chunk_size)
    shape = batch, kv_heads, triton.cdiv(length, chunk_size), sizes["NUM_FEATURES"]
    matrices = states.new_empty(*shape, head_dim, dtype=torch.float32)
    normalizers = states.new_empty(shape, dtype=torch.float32)
    grid = shape[2], triton.cdiv(shape[3], FEATURES), batch * kv_heads
    expansion = _expansion(coordinates, states.device)
    _write_kernel[grid](states, rows, sums, weight, *expansion, matrices, normalizers, length, **sizes)
    return matrices, normalizers


def _carry(
    memories: torch.Tensor, decay: torch.Tensor | None, initial: torch.Tensor, reverse: bool = False
) -> torch.Tensor:
    """Replaces what each chunk adds by the memory before it, starting from `initial`; returns the memory after the last.
    `reverse`: from the last chunk to the first."""
    initial = initial.float().contiguous()
    last = torch.empty_like(initial)
    size = last[0, 0].numel()
    grid = triton.cdiv(size, CARRIED), memories.shape[0] * memories.shape[1]
    _carry_kernel[grid](memories, decay, initial, last, memories.shape[2], size, REVERSE=reverse, CARRIED=CARRIED)
    return last


def _read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: Gates,
    matrices: torch.Tensor,
    normalizers: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators (batch, heads, seq, head_dim) and denominators (batch, heads, seq)."""
    (*shape, coordinates), head_dim = query.shape, value.shape[3]
    sizes = _sizes(query, head_dim, key.shape[1], chunk_size)
    numerator = query.new_empty(*shape, head_dim, dtype=torch.float32)
    denominator = query.new_empty(shape, dtype=torch.float32)
    expansion = _expansion(coordinates, query.device)
    memories = matrices, normalizers
    _read_kernel[_tiles(query, sizes)](
        query, key, value, *gates[:4], *expansion, *memories, numerator, denominator, shape[2], **sizes
    )
    return numerator, denominator


def _query_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: Gates,
    memories: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the queries, and of the log of the decay through which each of them reads, (batch, heads, seq).

    memories: before each chunk; grads: of numerators and denominators."""
    sizes = _sizes(query, value.shape[3], key.shape[1], chunk_size)
    grad_query = torch.empty_like(query)
    grad_decay = None if gates.coarse is None else torch.empty_like(grads[1])
    expansion = _expansion(query.shape[3], query.device)
    _query_gradient_kernel[_tiles(query, sizes)](
        query, key, value, *gates[:4], *expansion, *memories, *grads, grad_query, grad_decay, query.shape[2], **sizes
    )
    return grad_query, grad_decay


def _key_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: Gates,
    grad_memories: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of keys and values, and of the log of the factor with which each of them is read, (batch, kv_heads, seq).

    grad_memories: after each chunk; grads: of numerators and denominators."""
    sizes = _sizes(query, value.shape[3], key.shape[1], chunk_size)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_decay = None if gates.coarse is None else key.new_empty(key.shape[:3], dtype=torch.float32)
    inputs = query, key, value, *gates[:3], gates.write, *_expansion(key.shape[3], key.device), *grad_memories, *grads
    _key_gradient_kernel[_tiles(key, sizes)](*inputs, grad_key, grad_value, grad_decay, key.shape[2], **sizes)
    return grad_key, grad_value, grad_decay


def _tiles(states: torch.Tensor, sizes: dict[str, object]) -> tuple[int, int]:
    """One program for each tile of each head."""
    return triton.cdiv(states.shape[2], sizes["ROWS"]), states.shape[0] * states.shape[1]


def _sizes(states: torch.Tensor, head_dim: int, kv_heads: int, chunk_size: int) -> dict[str, object]:
    """What the kernels are compiled for."""
    heads, coordinates = states.shape[1], states.shape[3]
    # Wider tiles do not fit into the registers, nor into the shared memory of smaller GPUs.
    narrow = states.dtype == torch.bfloat16 and head_dim <= 128
    return {
        "SCALE": coordinates**-0.5,
        "GROUPS": heads // kv_heads,
        "CHUNK": chunk_size,
        "NUM_COORDINATES": coordinates,
        "NUM_FEATURES": 1 + coordinates + coordinates * (coordinates + 1) // 2,
        "HEAD_DIM": head_dim,
        "COORDINATES": padded(coordinates),
        "FEATURES": FEATURES,
        "DIM": padded(head_dim),
        "ROWS": ROWS if narrow else ROWS // 2,
        "num_warps": 4 if head_dim <= 64 else 8,
        "num_stages": 2,
    }


# Helpers of the kernels.


@triton.jit
def _choose(states, choice, COORDINATES: tl.constexpr, dtype: tl.constexpr):
    """The coordinate of each row that `choice` names, 1 for -1: (rows, choices)."""
    chosen = (tl.arange(0, COORDINATES)[:, None] == choice[None, :]).to(tl.float32)
    return dot(states, chosen, dtype) + tl.where(choice == -1, 1.0, 0.0)[None, :]


@triton.jit
def _put_back(grads, choice, COORDINATES: tl.constexpr, dtype: tl.constexpr):
    """The transpose of `_choose`: (rows, choices) -> (rows, COORDINATES)."""
    chosen = (choice[:, None] == tl.arange(0, COORDINATES)[None, :]).to(tl.float32)
    return dot(grads, chosen, dtype)


@triton.jit
def _load_expansion(first, second, coefficient, features, NUM_FEATURES: tl.constexpr):
    inside = features < NUM_FEATURES
    return (
        tl.load(first + features, mask=inside, other=-1),
        tl.load(second + features, mask=inside, other=-1),
        tl.load(coefficient + features, mask=inside, other=0.0),
    )


@triton.jit
def _decay(coarse, fine, keep, gate_rows, queries, keys, length):
    """With which factor each query reads each key of its chunk, (queries, keys), as `_exp_decay` has it."""
    factor = ((keys[None, :] <= queries[:, None]) & (keys < length)[None, :]).to(tl.float32)
    if coarse is not None:
        above = tl.load(coarse + gate_rows + queries)[:, None] - tl.load(coarse + gate_rows + keys)[None, :]
        below = tl.load(fine + gate_rows + queries)[:, None] - tl.load(fine + gate_rows + keys)[None, :]
        log_decay = above + below
        factor *= tl.where(log_decay < -40.0, 0.0, tl.exp(tl.minimum(log_decay, 0.0)))
    if keep is not None:
        factor *= tl.load(keep + gate_rows + keys)[None, :]
    return factor


# The kernels. Programs take one tile of ROWS tokens, or one block of FEATURES, of one head.


@triton.jit
def _write_kernel(
    states,
    rows,
    sums,
    weight,
    first,
    second,
    coefficient,
    matrices,
    normalizers,
    length,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_COORDINATES: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORDINATES: tl.constexpr,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: chunks, blocks of features, batch * kv_heads. GROUPS heads of `states` write to the same memory."""
    chunk, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    columns, dims = tl.arange(0, COORDINATES), tl.arange(0, DIM)
    dtype: tl.constexpr = states.dtype.element_ty
    left, right, factor = _load_expansion(first, second, coefficient, features, NUM_FEATURES)
    matrix = tl.zeros([FEATURES, DIM], tl.float32)
    normalizer = tl.zeros([FEATURES], tl.float32)
    for group in range(GROUPS):
        token_rows = (head * GROUPS + group) * length
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, length), ROWS):
            tokens = start + tl.arange(0, ROWS)
            state = load(states + token_rows * NUM_COORDINATES, tokens, columns, length, NUM_COORDINATES)
            expanded = _choose(state, left, COORDINATES, dtype) * _choose(state, right, COORDINATES, dtype)
            expanded = tl.where((tokens < length)[:, None], expanded * factor[None, :], 0.0)
            if weight is not None:
                expanded *= tl.load(weight + head * tl.num_programs(0) * CHUNK + tokens)[:, None]
            row = load(rows + token_rows * HEAD_DIM, tokens, dims, length, HEAD_DIM)
            matrix += dot(tl.trans(expanded), row, dtype)
            if sums is not None:
                expanded *= tl.load(sums + token_rows + tokens, mask=tokens < length, other=0.0)[:, None]
            normalizer += tl.sum(expanded, 0)
    memory = (head * tl.num_programs(0) + chunk) * NUM_FEATURES
    store(matrices + memory * HEAD_DIM, matrix, features, dims, NUM_FEATURES, HEAD_DIM)
    tl.store(normalizers + memory + features, normalizer, mask=features < NUM_FEATURES)


@triton.jit
def _carry_kernel(memories, decay, initial, last, num_chunks, size, REVERSE: tl.constexpr, CARRIED: tl.constexpr):
    """Grid: blocks of entries of a memory, batch * kv_heads."""
    entries = tl.program_id(0) * CARRIED + tl.arange(0, CARRIED)
    inside, head = entries < size, tl.program_id(1).to(tl.int64)
    value = tl.load(initial + head * size + entries, mask=inside, other=0.0)
    for index in range(num_chunks):
        chunk = head * num_chunks + (num_chunks - 1 - index if REVERSE else index)
        pointer = memories + chunk * size + entries
        added = tl.load(pointer, mask=inside, other=0.0)
        tl.store(pointer, value, mask=inside)
        if decay is not None:
            value *= tl.load(decay + chunk)
        value += added
    tl.store(last + head * size + entries, value, mask=inside)


@triton.jit
def _read_kernel(
    query,
    key,
    value,
    keep,
    coarse,
    fine,
    decay_in,
    first,
    second,
    coefficient,
    matrices,
    normalizers,
    numerators,
    denominators,
    length,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_COORDINATES: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORDINATES: tl.constexpr,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, chunk = query_head // GROUPS, tile * ROWS // CHUNK
    queries = tile * ROWS + tl.arange(0, ROWS)
    columns, dims = tl.arange(0, COORDINATES), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    num_chunks = tl.cdiv(length, CHUNK)
    gate_rows = head * num_chunks * CHUNK
    memory = (head * num_chunks + chunk) * NUM_FEATURES
    state = load(query + query_head * length * NUM_COORDINATES, queries, columns, length, NUM_COORDINATES)

    numerator = tl.zeros([ROWS, DIM], tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    for start in range(0, NUM_FEATURES, FEATURES):
        features = start + tl.arange(0, FEATURES)
        left, right, factor = _load_expansion(first, second, coefficient, features, NUM_FEATURES)
        expanded = _choose(state, left, COORDINATES, dtype) * _choose(state, right, COORDINATES, dtype)
        expanded *= factor[None, :]
        matrix = load(matrices + memory * HEAD_DIM, features, dims, NUM_FEATURES, HEAD_DIM)
        normalizer = tl.load(normalizers + memory + features, mask=features < NUM_FEATURES, other=0.0)
        numerator += dot(expanded, matrix, dtype)
        denominator += tl.sum(expanded * normalizer[None, :], 1)
    if decay_in is not None:
        decay = tl.load(decay_in + gate_rows + queries)
        numerator *= decay[:, None]
        denominator *= decay

    for start in range(chunk * CHUNK, (tile + 1) * ROWS, ROWS):
        keys = start + tl.arange(0, ROWS)
        key_state = load(key + head * length * NUM_COORDINATES, keys, columns, length, NUM_COORDINATES)
        values = load(value + head * length * HEAD_DIM, keys, dims, length, HEAD_DIM)
        score = dot(state, tl.trans(key_state), dtype) * SCALE
        weight = (1.0 + score + 0.5 * score * score) * _decay(coarse, fine, keep, gate_rows, queries, keys, length)
        numerator += dot(weight, values, dtype)
        denominator += tl.sum(weight, 1)
    store(numerators + query_head * length * HEAD_DIM, numerator, queries, dims, length, HEAD_DIM)
    tl.store(denominators + query_head * length + queries, denominator, mask=queries < length)


@triton.jit
def _query_gradient_kernel(
    query,
    key,
    value,
    keep,
    coarse,
    fine,
    decay_in,
    first,
    second,
    coefficient,
    matrices,
    normalizers,
    grad_numerators,
    grad_denominators,
    grad_queries,
    grad_decays,
    length,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_COORDINATES: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORDINATES: tl.constexpr,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of queries, batch * heads."""
    tile, query_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, chunk = query_head // GROUPS, tile * ROWS // CHUNK
    queries = tile * ROWS + tl.arange(0, ROWS)
    columns, dims = tl.arange(0, COORDINATES), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    num_chunks = tl.cdiv(length, CHUNK)
    gate_rows = head * num_chunks * CHUNK
    memory = (head * num_chunks + chunk) * NUM_FEATURES
    state = load(query + query_head * length * NUM_COORDINATES, queries, columns, length, NUM_COORDINATES)
    grad_numerator = load(grad_numerators + query_head * length * HEAD_DIM, queries, dims, length, HEAD_DIM)
    grad_numerator = grad_numerator.to(dtype)
    grad_denominator = tl.load(grad_denominators + query_head * length + queries, mask=queries < length, other=0.0)

    grad_state = tl.zeros([ROWS, COORDINATES], tl.float32)
    grad_decay = tl.zeros([ROWS], tl.float32)
    for start in range(0, NUM_FEATURES, FEATURES):
        features = start + tl.arange(0, FEATURES)
        left, right, factor = _load_expansion(first, second, coefficient, features, NUM_FEATURES)
        left_state = _choose(state, left, COORDINATES, dtype)
        right_state = _choose(state, right, COORDINATES, dtype)
        matrix = load(matrices + memory * HEAD_DIM, features, dims, NUM_FEATURES, HEAD_DIM)
        normalizer = tl.load(normalizers + memory + features, mask=features < NUM_FEATURES, other=0.0)
        grad = dot(grad_numerator, tl.trans(matrix), dtype) + grad_denominator[:, None] * normalizer[None, :]
        grad *= factor[None, :]
        grad_decay += tl.sum(grad * left_state * right_state, 1)
        grad_state += _put_back(grad * right_state, left, COORDINATES, dtype)
        grad_state += _put_back(grad * left_state, right, COORDINATES, dtype)
    if decay_in is not None:
        decay = tl.load(decay_in + gate_rows + queries)
        grad_state *= decay[:, None]
        grad_decay *= decay

    for start in range(chunk * CHUNK, (tile + 1) * ROWS, ROWS):
        keys = start + tl.arange(0, ROWS)
        key_state = load(key + head * length * NUM_COORDINATES, keys, columns, length, NUM_COORDINATES)
        values = load(value + head * length * HEAD_DIM, keys, dims, length, HEAD_DIM)
        score = dot(state, tl.trans(key_state), dtype) * SCALE
        grad = dot(grad_numerator, tl.trans(values), dtype) + grad_denominator[:, None]
        grad *= _decay(coarse, fine, keep, gate_rows, queries, keys, length)
        grad_decay += tl.sum(grad * (1.0 + score + 0.5 * score * score), 1)
        grad_state += dot(grad * (1.0 + score) * SCALE, key_state, dtype)
    store(grad_queries + query_head * length * NUM_COORDINATES, grad_state, queries, columns, length, NUM_COORDINATES)
    if grad_decays is not None:
        tl.store(grad_decays + query_head * length + queries, grad_decay, mask=queries < length)


@triton.jit
def _key_gradient_kernel(
    query,
    key,
    value,
    keep,
    coarse,
    fine,
    write,
    first,
    second,
    coefficient,
    grad_matrices,
    grad_normalizers,
    grad_numerators,
    grad_denominators,
    grad_keys,
    grad_values,
    grad_decays,
    length,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_COORDINATES: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORDINATES: tl.constexpr,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: tiles of keys, batch * kv_heads."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = tile * ROWS // CHUNK
    keys = tile * ROWS + tl.arange(0, ROWS)
    columns, dims = tl.arange(0, COORDINATES), tl.arange(0, DIM)
    dtype: tl.constexpr = query.dtype.element_ty
    num_chunks = tl.cdiv(length, CHUNK)
    gate_rows = head * num_chunks * CHUNK
    memory = (head * num_chunks + chunk) * NUM_FEATURES
    state = load(key + head * length * NUM_COORDINATES, keys, columns, length, NUM_COORDINATES)
    values = load(value + head * length * HEAD_DIM, keys, dims, length, HEAD_DIM)

    grad_state = tl.zeros([ROWS, COORDINATES], tl.float32)
    grad_value = tl.zeros([ROWS, DIM], tl.float32)
    grad_decay = tl.zeros([ROWS], tl.float32)
    for start in range(0, NUM_FEATURES, FEATURES):
        features = start + tl.arange(0, FEATURES)
        left, right, factor = _load_expansion(first, second, coefficient, features, NUM_FEATURES)
        left_state = _choose(state, left, COORDINATES, dtype)
        right_state = _choose(state, right, COORDINATES, dtype)
        grad_matrix = load(grad_matrices + memory * HEAD_DIM, features, dims, NUM_FEATURES, HEAD_DIM)
        grad_normalizer = tl.load(grad_normalizers + memory + features, mask=features < NUM_FEATURES, other=0.0)
        grad = dot(values, tl.trans(grad_matrix), dtype) + grad_normalizer[None, :]
        grad *= factor[None, :]
        grad_decay += tl.sum(grad * left_state * right_state, 1)
        grad_value += dot(left_state * right_state * factor[None, :], grad_matrix, dtype)
        grad_state += _put_back(grad * right_state, left, COORDINATES, dtype)
        grad_state += _put_back(grad * left_state, right, COORDINATES, dtype)
    if write is not None:
        written = tl.load(write + gate_rows + keys)
        grad_state *= written[:, None]
        grad_value *= written[:, None]
        grad_decay *= written

    for group in range(GROUPS):
        query_rows = (head * GROUPS + group) * length
        for start in range(tile * ROWS, tl.minimum((chunk + 1) * CHUNK, length), ROWS):
            queries = start + tl.arange(0, ROWS)
            query_state = load(query + query_rows * NUM_COORDINATES, queries, columns, length, NUM_COORDINATES)
            grad_numerator = load(grad_numerators + query_rows * HEAD_DIM, queries, dims, length, HEAD_DIM).to(dtype)
            grad_denominator = tl.load(grad_denominators + query_rows + queries, mask=queries < length, other=0.0)
            decay = _decay(coarse, fine, keep, gate_rows, queries, keys, length)
            score = dot(query_state, tl.trans(state), dtype) * SCALE
            weight = (1.0 + score + 0.5 * score * score) * decay
            grad = dot(grad_numerator, tl.trans(values), dtype) + grad_denominator[:, None]
            grad_value += dot(tl.trans(weight), grad_numerator, dtype)
            grad_decay += tl.sum(grad * weight, 0)
            grad_state += dot(tl.trans(grad * decay * (1.0 + score) * SCALE), query_state, dtype)
    store(grad_keys + head * length * NUM_COORDINATES, grad_state, keys, columns, length, NUM_COORDINATES)
    store(grad_values + head * length * HEAD_DIM, grad_value, keys, dims, length, HEAD_DIM)
    if grad_decays is not None:
        tl.store(grad_decays + head * length + keys, grad_decay, mask=keys < length)
