"""Kernel attention as pure functions on tensors: no module, no config.

Notation, per head, with feature map phi applied beforehand by the caller (`query` and `key` below are phi(q) and phi(k)):

    additive   S_t = g_t S_{t-1} + k_t v_t^T      z_t = g_t z_{t-1} + k_t      numerator q_t^T S_t, denominator q_t^T z_t
    delta      S_t = g_t (S_{t-1} - b_t k_t (k_t^T S_{t-1})) + b_t k_t v_t^T   numerator q_t^T S_t, no denominator

    additive, g = 1: linear attention (Katharopoulos et al. 2020, eq. 16-20); delta, g = 1: DeltaNet (Yang et al. 2024a,
    arXiv 2406.06484); delta with g < 1: Gated DeltaNet (Yang et al. 2024b, arXiv 2412.06464, eq. 10).

Each rule has three forms under one signature: `*_reference` builds the explicit (queries x keys) matrix of weights,
`*_chunked` is linear in the length and made of matrix products, `*_step` is the recurrence above for one token.

Shapes: query (batch, heads, seq, feature_dim); key (batch, kv_heads, seq, feature_dim); value (batch, kv_heads, seq,
head_dim); log_forget = log g <= 0 and write_strength = b, both (batch, kv_heads, seq), log_forget may be None (g = 1).
`heads` is a multiple of `kv_heads`; consecutive query heads share a key/value head and its memory. A token with zero
key (additive) or zero write strength (delta) and zero log_forget leaves the memory exactly as it was: that is padding.

Sums and exponentials are taken in float32 (float64 stays float64); outputs keep that precision, callers cast back.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .functions import first_derivative_only


# Decays smaller than exp(-40) are dropped: products of two would be denormal numbers, which CPUs process ~100x slower.
MIN_LOG_DECAY = -40.0


class KernelMemory(NamedTuple):
    """What is left of all tokens read so far: constant size, whatever their number.

    matrix: S, (batch, kv_heads, feature_dim, head_dim). normalizer: z, (batch, kv_heads, feature_dim), None for the
    delta rule.
    """

    matrix: torch.Tensor
    normalizer: torch.Tensor | None = None


class KernelReadout(NamedTuple):
    """numerator (batch, heads, seq, head_dim); denominator (batch, heads, seq), None for the delta rule; `memory` after
    the last token; `weights` (batch, heads, seq, seq) with numerator = weights @ value + what the initial memory gave,
    only from the reference forms."""

    numerator: torch.Tensor
    denominator: torch.Tensor | None
    memory: KernelMemory
    weights: torch.Tensor | None = None


def empty_memory(key: torch.Tensor, value: torch.Tensor, normalized: bool) -> KernelMemory:
    """The memory before the first token, on the device of `key` and in the precision of the sums."""
    batch, kv_heads, _, feature_dim = key.shape
    dtype = _sum_dtype(value)
    matrix = torch.zeros(batch, kv_heads, feature_dim, value.shape[-1], dtype=dtype, device=key.device)
    normalizer = torch.zeros(batch, kv_heads, feature_dim, dtype=dtype, device=key.device) if normalized else None
    return KernelMemory(matrix, normalizer)


# Reference: the explicit matrix of weights. Quadratic and obvious.


def additive_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """Additive rule as weights[i, j] = (q_i . k_j) prod_{j < l <= i} g_l for j <= i. Shapes: see the module."""
    query, key, value, log_forget = _upcast(query, key, value, log_forget)
    memory = empty_memory(key, value, normalized=True) if memory is None else memory
    decay, decay_in, decay_out, decay_all = _decays(log_forget, key)
    queries = _group(query, key.shape[1])

    weights = (queries @ key[:, :, None].mT) * decay[:, :, None]
    from_memory = queries * decay_in[:, :, None, :, None]
    numerator = weights @ value[:, :, None] + from_memory @ memory.matrix[:, :, None]
    denominator = weights.sum(-1) + (from_memory @ memory.normalizer[:, :, None, :, None]).squeeze(-1)

    decayed_key = key * decay_out[..., None]
    memory = KernelMemory(
        memory.matrix * decay_all[..., None, None] + decayed_key.mT @ value,
        memory.normalizer * decay_all[..., None] + decayed_key.sum(-2),
    )
    return KernelReadout(numerator.flatten(1, 2), denominator.flatten(1, 2), memory, weights.flatten(1, 2))


def delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """Delta rule as one linear system over the whole sequence. Shapes: see the module.

    With u_t the correction that token t writes, u_t = b_t (v_t - g_t k_t^T S_{t-1}) and S_t = g_t S_{t-1} + k_t u_t^T,
    hence (I + A) u = b v - (what the initial memory predicts), A[i, j] = b_i (k_i . k_j) prod_{j < l <= i} g_l, j < i.
    """
    query, key, value, log_forget, write_strength = _upcast(query, key, value, log_forget, write_strength)
    memory = empty_memory(key, value, normalized=False) if memory is None else memory
    decay, decay_in, decay_out, decay_all = _decays(log_forget, key)
    queries = _group(query, key.shape[1])

    system = ((write_strength[..., None] * key) @ key.mT * decay).tril(-1)
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    solve = torch.linalg.inv(identity + system) * write_strength[..., None, :]
    predicted = (key * decay_in[..., None]) @ memory.matrix

    read = (queries @ key[:, :, None].mT) * decay[:, :, None]
    weights = read @ solve[:, :, None]
    from_memory = (queries * decay_in[:, :, None, :, None]) @ memory.matrix[:, :, None]
    numerator = weights @ (value - predicted)[:, :, None] + from_memory

    written = solve @ (value - predicted)
    matrix = memory.matrix * decay_all[..., None, None] + (key * decay_out[..., None]).mT @ written
    return KernelReadout(numerator.flatten(1, 2), None, KernelMemory(matrix), weights.flatten(1, 2))


# Chunked: linear in the length.


def additive_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    chunk_size: int | None = None,
) -> KernelReadout:
    """Additive rule in chunks: explicit weights inside a chunk, the memory for everything before it.

    O(seq * chunk_size) work and memory. Any length. Shapes: see the module.
    """
    length, kv_heads = query.shape[2], key.shape[1]
    chunk_size = chunk_size or default_chunk_size(key.shape[-1], length)
    query, key, value, log_forget = _upcast(query, key, value, log_forget)
    memory = empty_memory(key, value, normalized=True) if memory is None else memory
    queries = _chunk_queries(query, kv_heads, chunk_size)
    # Chunks enter several products each, all of which want them contiguous.
    key, value = _chunk(key, chunk_size), _chunk(value, chunk_size).contiguous()

    if log_forget is None:
        numerator, denominator, *last = _AdditiveChunks.apply(queries, key, value, *memory)
    else:
        decay, decay_in, decay_out, decay_all = _decays(_chunk(log_forget, chunk_size), key)
        weights = _decay_weights(queries @ key.mT, decay)
        from_memory = _decay_rows(queries, decay_in)
        decayed_key = _decay_rows(key, decay_out)
        matrices, last_matrix = _carry(decayed_key.mT @ value, decay_all, memory.matrix)
        normalizers, last_normalizer = _carry(decayed_key.sum(-2), decay_all, memory.normalizer)
        numerator = _sum_of_products(weights, value, from_memory, matrices)
        denominator = weights.sum(-1, keepdim=True) + from_memory @ normalizers[..., None]
        last = last_matrix, last_normalizer
    return KernelReadout(
        _unchunk_queries(numerator, chunk_size, length),
        _unchunk_queries(denominator, chunk_size, length).squeeze(-1),
        KernelMemory(*last),
    )


class _AdditiveChunks(torch.autograd.Function):
    """The additive rule without forgetting, in chunks. Its backward pass is written out: it sums products inside the
    matrix multiplication, where autograd would write each of them to memory and add them up afterwards. First derivatives only.

    Takes queries (batch, kv_heads, chunks, groups * chunk_size, feature_dim), key (..., chunk_size, feature_dim), value
    (..., chunk_size, head_dim) and the initial memory. Returns numerator, denominator (..., 1) and the last memory.
    """

    @staticmethod
    def forward(ctx, queries, key, value, matrix, normalizer):
        weights = _mask_future(queries @ key.mT, key.shape[-2])
        matrices, last_matrix = _running_sums(key.mT @ value, matrix)
        normalizers, last_normalizer = _running_sums(key.sum(-2), normalizer)
        ctx.save_for_backward(queries, key, value, weights, matrices, normalizers)
        numerator = _sum_of_products(weights, value, queries, matrices)
        denominator = weights.sum(-1, keepdim=True) + queries @ normalizers[..., None]
        return numerator, denominator, last_matrix, last_normalizer

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_numerator, grad_denominator, grad_matrix, grad_normalizer):
        queries, key, value, weights, matrices, normalizers = ctx.saved_tensors
        grad_weights = _mask_future((grad_numerator @ value.mT).add_(grad_denominator), key.shape[-2])
        grad_queries = _sum_of_products(grad_weights, key, grad_numerator, matrices.mT)
        grad_queries.addcmul_(grad_denominator, normalizers[..., None, :])
        # What later chunks read, summed from the last chunk on.
        grad_matrices, grad_matrix = _running_sums(queries.mT @ grad_numerator, grad_matrix, backwards=True)
        read = (queries.mT @ grad_denominator).squeeze(-1)
        grad_normalizers, grad_normalizer = _running_sums(read, grad_normalizer, backwards=True)
        grad_key = _sum_of_products(grad_weights.mT, queries, value, grad_matrices.mT)
        grad_key += grad_normalizers[..., None, :]
        grad_value = _sum_of_products(weights.mT, grad_numerator, key, grad_matrices)
        return grad_queries, grad_key, grad_value, grad_matrix, grad_normalizer


def delta_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
    chunk_size: int | None = None,
) -> KernelReadout:
    """Delta rule in chunks (WY form: Yang et al. 2024a, section 3; with decay: 2024b, section 3.3). Shapes: see the module.

    Inside a chunk the corrections u solve a unit triangular system, which splits as u = U - W S with S the memory before
    the chunk; only S' = g S + K^T (U - W S) has to be carried from chunk to chunk. The system is solved by substitution:
    doubling, (I - A)(I + A^2)(I + A^4)..., loses all digits when keys repeat, because powers of A grow before they vanish.
    """
    length, kv_heads = query.shape[2], key.shape[1]
    chunk_size = chunk_size or _chunk_size(64, length)
    query, key, value, log_forget, write_strength = _upcast(query, key, value, log_forget, write_strength)
    memory = empty_memory(key, value, normalized=False) if memory is None else memory
    queries = _chunk_queries(query, kv_heads, chunk_size)
    key, value = _chunk(key, chunk_size), _chunk(value, chunk_size)
    write_strength = _chunk(write_strength, chunk_size)[..., None]

    log_forget = None if log_forget is None else _chunk(log_forget, chunk_size)
    numerator, matrix = _DeltaChunks.apply(queries, key, value, write_strength, log_forget, memory.matrix)
    return KernelReadout(_unchunk_queries(numerator, chunk_size, length), None, KernelMemory(matrix))


class _DeltaChunks(torch.autograd.Function):
    """The delta rule in chunks, with its backward pass written out, as in `_AdditiveChunks`. First derivatives only.

    Takes queries (batch, kv_heads, chunks, groups * chunk_size, feature_dim), key (..., chunk_size, feature_dim), value
    (..., chunk_size, head_dim), write strength (..., chunk_size, 1), log_forget (..., chunk_size) or None and the initial
    memory. Returns the numerator and the last memory.
    """

    @staticmethod
    def forward(ctx, queries, key, value, write_strength, log_forget, matrix):
        decays = (None,) * 4 if log_forget is None else _decays(log_forget, key)
        decay, decay_in, decay_out, decay_all = decays
        weights = _decay_weights(queries @ key.mT, decay)
        written_key = key * write_strength
        # `unitriangular` reads the strict lower triangle only: neither the diagonal nor the future need masking.
        identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
        system = written_key @ key.mT
        inverse = torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)
        # The inverse of the decayed system is the decayed inverse; solved with the decays it would be full of denormals.
        decayed_inverse = inverse if decay is None else inverse * decay
        written = decayed_inverse @ (value * write_strength)
        recalled = decayed_inverse @ _decay_rows(written_key, decay_in)
        decayed_key = _decay_rows(key, decay_out)

        matrices = key.new_empty(*key.shape[:3], key.shape[-1], value.shape[-1])
        for index in range(written.shape[2]):
            matrices[:, :, index] = matrix
            # Not one of the views of `unbind`, which `torch.export` lets nobody write to.
            chunk_written = written[:, :, index]
            chunk_written -= recalled[:, :, index] @ matrix
            carried = matrix if decay_all is None else matrix * decay_all[:, :, index, None, None]
            matrix = carried + decayed_key[:, :, index].mT @ chunk_written
        ctx.save_for_backward(
            queries,
            key,
            value,
            write_strength,
            log_forget,
            *decays,
            weights,
            inverse,
            recalled,
            written,
            matrices,
            matrix,
        )
        return _sum_of_products(weights, written, _decay_rows(queries, decay_in), matrices), matrix

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_numerator, grad_matrix):
        saved = ctx.saved_tensors
        queries, key, value, write_strength, log_forget, decay, decay_in, decay_out, decay_all = saved[:9]
        weights, inverse, recalled, written, matrices, last_matrix = saved[9:]

        # What later chunks read, from the last chunk on: the gradient of the memory after each chunk.
        grad_written = weights.mT @ grad_numerator
        read = _decay_rows(queries, decay_in).mT @ grad_numerator
        decayed_key = _decay_rows(key, decay_out)
        grad_after = torch.empty_like(matrices)
        for index in reversed(range(matrices.shape[2])):
            grad_after[:, :, index] = grad_matrix
            grad_written[:, :, index] += decayed_key[:, :, index] @ grad_matrix
            carried = grad_matrix if decay_all is None else grad_matrix * decay_all[:, :, index, None, None]
            grad_matrix = carried + read[:, :, index] - recalled[:, :, index].mT @ grad_written[:, :, index]

        # Through the weights and what is read of the memory.
        grad_scores = _decay_weights(grad_numerator @ written.mT, decay)
        grad_queries = _decay_rows(grad_numerator @ matrices.mT, decay_in)
        grad_queries.flatten(0, 2).baddbmm_(grad_scores.flatten(0, 2), key.flatten(0, 2))
        grad_key = _decay_rows(written @ grad_after.mT, decay_out)
        grad_key.flatten(0, 2).baddbmm_(grad_scores.mT.flatten(0, 2), queries.flatten(0, 2))

        # Through the corrections: written = inverse (value - what the memory predicts), both times the write strength.
        written_value, written_key = value * write_strength, key * write_strength
        recalled_key = _decay_rows(written_key, decay_in)
        decayed_inverse = inverse if decay is None else inverse * decay
        grad_recalled = (grad_written @ matrices.mT).neg_()
        grad_written_value = decayed_inverse.mT @ grad_written
        grad_inverse = _sum_of_products(grad_written, written_value.mT, grad_recalled, recalled_key.mT)
        if decay is not None:
            grad_inverse *= decay
        grad_system = -(inverse.mT @ grad_inverse @ inverse.mT).tril(-1)
        grad_written_key = _decay_rows(decayed_inverse.mT @ grad_recalled, decay_in)
        grad_written_key.flatten(0, 2).baddbmm_(grad_system.flatten(0, 2), key.flatten(0, 2))
        grad_strength = (grad_written_key * key).sum(-1, keepdim=True)
        grad_strength += (grad_written_value * value).sum(-1, keepdim=True)

        grad_log_forget = None
        if log_forget is not None:
            # Every gate between two tokens scales what the later one reads of the earlier. So the gradient of the sum of
            # log gates up to a token is what it reads minus what is read of it (Yang et al. 2023, arXiv 2312.06635,
            # appendix C), and gets no derivative of a decay.
            sums = (grad_queries * queries).sum(-1).unflatten(-1, (-1, key.shape[-2])).sum(-2)
            sums += (grad_written * written - grad_written_value * written_value).sum(-1)
            sums -= (grad_key * key).sum(-1)
            after = torch.cat([matrices[:, :, 1:], last_matrix[:, :, None]], 2)
            sums[..., -1] += (after * grad_after).sum((-2, -1))
            grad_log_forget = sums.flip(-1).cumsum(-1).flip(-1).masked_fill(log_forget < 2 * MIN_LOG_DECAY, 0.0)

        grad_key.flatten(0, 2).baddbmm_(grad_system.mT.flatten(0, 2), written_key.flatten(0, 2))
        grad_key.addcmul_(grad_written_key, write_strength)
        grad_value = grad_written_value.mul_(write_strength)
        return grad_queries, grad_key, grad_value, grad_strength, grad_log_forget, grad_matrix


# Step: the recurrence, one token.


def additive_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """Additive rule for one token (seq = 1). Shapes: see the module."""
    query, key, value, log_forget = _upcast(query, key, value, log_forget)
    matrix, normalizer = empty_memory(key, value, normalized=True) if memory is None else memory
    if log_forget is not None:
        forget = _exp_decay(log_forget)
        matrix, normalizer = matrix * forget[..., None], normalizer * forget
    matrix = torch.addcmul(matrix, key.mT, value)
    normalizer = normalizer + key.squeeze(2)
    memory = KernelMemory(matrix, normalizer)
    return read_memory(query, memory)


def delta_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor | None = None,
    memory: KernelMemory | None = None,
) -> KernelReadout:
    """Delta rule for one token (seq = 1). Shapes: see the module."""
    query, key, value, log_forget, write_strength = _upcast(query, key, value, log_forget, write_strength)
    matrix = (empty_memory(key, value, normalized=False) if memory is None else memory).matrix
    if log_forget is not None:
        matrix = matrix * _exp_decay(log_forget)[..., None]
    written = write_strength[..., None] * (value - key @ matrix)
    return read_memory(query, KernelMemory(torch.addcmul(matrix, key.mT, written)))


def read_memory(query: torch.Tensor, memory: KernelMemory) -> KernelReadout:
    """Reads a memory that is not written to: numerator q^T S and denominator q^T z for any number of queries."""
    (query,) = _upcast(query)
    queries = _group(query, memory.matrix.shape[1]).flatten(2, 3)
    shape = (memory.matrix.shape[1], query.shape[1] // memory.matrix.shape[1], query.shape[2])
    numerator = (queries @ memory.matrix).view(query.shape[0], *shape, -1).flatten(1, 2)
    denominator = None
    if memory.normalizer is not None:
        denominator = (queries @ memory.normalizer[..., None]).view(query.shape[0], *shape).flatten(1, 2)
    return KernelReadout(numerator, denominator, memory)


# Helpers.


def default_chunk_size(feature_dim: int, length: int) -> int:
    """Work per token is chunk_size * (feature_dim + head_dim) inside a chunk and feature_dim * head_dim for the memory,
    so wide feature maps want longer chunks; a short sequence is one chunk."""
    return _chunk_size(64 if feature_dim <= 128 else 128 if feature_dim <= 512 else 256, length)


def _chunk_size(most: int, length: int) -> int:
    """`most`, or the next power of two where a text is shorter."""
    return most if length >= most else 1 << max(length - 1, 0).bit_length()


def whole_blocks(length: int, size: int) -> int:
    """How many blocks of `size` it takes for `length`: a number that a compiled graph is built upon, so that what follows from
    it are numbers too, where the length itself is a symbol."""
    return len(range(-(-length // size)))


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _upcast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    dtype = _sum_dtype(tensors[0])
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def _group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, heads, seq, dim) -> (batch, kv_heads, heads // kv_heads, seq, dim)"""
    return query.unflatten(1, (kv_heads, -1))


def _chunk(tensor: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """(batch, kv_heads, seq, ...) -> (batch, kv_heads, chunks, chunk_size, ...), zeros at the end."""
    chunks = whole_blocks(tensor.shape[2], chunk_size)
    missing = chunks * chunk_size - tensor.shape[2]
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, missing))
    return tensor.unflatten(2, (chunks, chunk_size))


def _chunk_queries(query: torch.Tensor, kv_heads: int, chunk_size: int) -> torch.Tensor:
    """(batch, heads, seq, dim) -> (batch, kv_heads, chunks, groups * chunk_size, dim): the query heads of one key/value
    head become rows of one matrix product."""
    query = _chunk(query, chunk_size).unflatten(1, (kv_heads, -1))
    return query.transpose(2, 3).flatten(3, 4)


def _unchunk_queries(tensor: torch.Tensor, chunk_size: int, length: int) -> torch.Tensor:
    """The way back from `_chunk_queries`."""
    tensor = tensor.unflatten(3, (-1, chunk_size)).transpose(2, 3)
    return tensor.flatten(3, 4).flatten(1, 2)[:, :, :length]


def _sum_of_products(
    left: torch.Tensor, right: torch.Tensor, more_left: torch.Tensor, more_right: torch.Tensor
) -> torch.Tensor:
    """left @ right + more_left @ more_right for (batch, kv_heads, chunks, ., .)."""
    product = (left @ right).flatten(0, 2)
    return product.baddbmm_(more_left.flatten(0, 2), more_right.flatten(0, 2)).unflatten(0, left.shape[:3])


def _running_sums(
    contributions: torch.Tensor, initial: torch.Tensor, backwards: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_carry` without decay, and without a gradient; `backwards` from the last chunk to the first."""
    if torch.compiler.is_compiling():  # which cannot write into parts of a tensor
        terms = contributions.flip(2) if backwards else contributions
        sums = torch.cat([initial.unsqueeze(2), terms], 2).cumsum(2)
        before = sums[:, :, :-1]
        return before.flip(2) if backwards else before, sums[:, :, -1]
    before = torch.empty_like(contributions)
    sums, terms = before.unbind(2), contributions.unbind(2)
    if backwards:
        sums, terms = sums[::-1], terms[::-1]
    sums[0].copy_(initial)
    for index in range(len(terms) - 1):
        torch.add(sums[index], terms[index], out=sums[index + 1])
    return before, sums[-1] + terms[-1]


def _decay_weights(weights: torch.Tensor, decay: torch.Tensor | None) -> torch.Tensor:
    """Weights (..., groups * chunk_size, chunk_size) without the future and times `decay`, if any; they may be written to."""
    if decay is None:
        return _mask_future(weights, weights.shape[-1])
    return (weights.unflatten(-2, (-1, weights.shape[-1])) * decay[..., None, :, :]).flatten(-3, -2)


def _decay_rows(tensor: torch.Tensor, decay: torch.Tensor | None) -> torch.Tensor:
    """(..., groups * chunk_size, dim) times decay (..., chunk_size), if any."""
    if decay is None:
        return tensor
    return (tensor.unflatten(-2, (-1, decay.shape[-1])) * decay[..., None, :, None]).flatten(-3, -2)


def _mask_future(weights: torch.Tensor, chunk_size: int) -> torch.Tensor:
    return weights.unflatten(-2, (-1, chunk_size)).tril_().flatten(-3, -2)


def _decays(log_forget: torch.Tensor | None, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Products of forget factors between positions of the second last axis of `key`.

    Returns, for positions i and j: decay[..., i, j] = prod_{j < l <= i} g_l (0 for j > i); decay_in[..., i] from the
    start up to and with i; decay_out[..., j] after j to the end; decay_all, the whole product.
    """
    if log_forget is None:
        log_forget = key.new_zeros(key.shape[:-1])
    coarse, fine = cumulative_log_decay(log_forget)
    future = torch.ones(fine.shape[-1], fine.shape[-1], dtype=torch.bool, device=fine.device).triu(1)
    pairwise = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    return _exp_decay(pairwise.masked_fill(future, float("-inf"))), *chunk_decays(coarse, fine)


def cumulative_log_decay(log_forget: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cumulative sum along the last axis, in two parts: differences of one sum would lose a small gate next to a large
    one. coarse: multiples of 1 / 64, which float32 adds without rounding; fine: a remainder that stays small."""
    log_forget = log_forget.clamp(min=2 * MIN_LOG_DECAY)
    coarse = (log_forget.detach() * 64).round() / 64
    return coarse.cumsum(-1), (log_forget - coarse).cumsum(-1)


def chunk_decays(coarse: torch.Tensor, fine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """decay_in, decay_out and decay_all of `_decays`."""
    return (
        _exp_decay(coarse + fine),
        _exp_decay((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)),
        _exp_decay(coarse[..., -1] + fine[..., -1]),
    )


def _exp_decay(log_decay: torch.Tensor) -> torch.Tensor:
    return torch.where(log_decay < MIN_LOG_DECAY, 0.0, log_decay.clamp(min=MIN_LOG_DECAY).exp())


def _carry(
    contributions: torch.Tensor, decays: torch.Tensor, initial: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs x_{c+1} = decay_c x_c + contribution_c over axis 2.

    Returns the value before each chunk, stacked on axis 2, and the value after the last.
    """
    value, before = initial, []
    decays = decays[(...,) + (None,) * (contributions.dim() - 3)]
    for contribution, decay in zip(contributions.unbind(2), decays.unbind(2), strict=True):
        before.append(value)
        value = torch.addcmul(contribution, value, decay)
    return torch.stack(before, 2), value
