"""Nyström attention of an encoder, as functions on tensors (no module, no configuration).

For queries Q, keys K and values V of one head, n tokens and m landmarks (Xiong et al. 2021, "Nyströmformer",
arXiv 2102.03902), with Q̃ and K̃ the means of Q and K over m segments of the sequence:

    F = softmax(Q K̃ᵀ / √d)   (n, m)      L = softmax(Q̃ K̃ᵀ / √d)   (m, m)      B = softmax(Q̃ Kᵀ / √d)   (m, n)

    attention = F Z B,   Z the iterated pseudo-inverse of L,   output = F (Z (B V))

`nystrom_attention` evaluates the right-hand form from right to left, so that nothing larger than (n, m) is ever formed,
and the two outer products run through `scaled_dot_product_attention`. `nystrom_attention_eager` builds the (n, n)
matrix; the two agree to rounding in every configuration.

A row of at most m tokens is attended exactly. Then each token is its own landmark, F is softmax attention itself and
Z B is replaced by the identity, which is what the segment means of V are in that case: one formula serves both.

Rows hold their real tokens first. `lengths` (batch,) counts them, and None means that no row is padded;
`read_padding` brings any other padding into this form. What follows a row's real tokens never enters its result.
Means, the softmax L and its inverse are taken in float32, whatever autocast says; results have the inputs' dtype.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from .functions import apply_function


INVERSE_INITS = ("original", "exact")


class Padding(NamedTuple):
    """Where the padding of a batch is.

    `lengths` (batch,) counts the real tokens of each row. `order` (batch, seq) lists the positions of a row's real
    tokens and then those of its padding, `rank` (batch, seq) is its inverse; both are None where every row already
    starts with its real tokens.
    """

    lengths: torch.Tensor
    order: torch.Tensor | None = None
    rank: torch.Tensor | None = None

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Move the real tokens of `states` (batch, seq, dim) to the front of their rows."""
        return states if self.order is None else _take_tokens(states, self.order)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Undo `pack`."""
        return states if self.rank is None else _take_tokens(states, self.rank)

    def unpack_attention(self, weights: torch.Tensor) -> torch.Tensor:
        """Bring attention weights (batch, heads, seq, seq) of packed tokens back into the tokens' own order."""
        if self.rank is None:
            return weights
        rows = weights.take_along_dim(self.rank[:, None, :, None], dim=2)
        return rows.take_along_dim(self.rank[:, None, None, :], dim=3)


def read_padding(attention_mask: torch.Tensor, inspect: bool = True) -> Padding | None:
    """Describe the padding of `attention_mask` (batch, seq), nonzero at real tokens; None where there is none.

    A row without any real token is taken as if all its tokens were real: its result means nothing, but is finite.
    `inspect=False` skips the two shortcuts that look at the mask's values, which a traced program cannot do.
    """
    real = attention_mask != 0
    real = real | ~real.any(dim=-1, keepdim=True)
    if inspect and real.all():
        return None
    lengths = real.sum(dim=-1)
    if inspect and (real[:, 1:] <= real[:, :-1]).all():
        return Padding(lengths)
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    return Padding(lengths, order, order.argsort(dim=-1))


def segment_means(states: torch.Tensor, num_landmarks: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Average the real tokens of each segment: the landmarks (Xiong et al. 2021, "Landmarks selection").

    Token p of a row of r tokens lies in segment ⌊p·m / max(r, m)⌋: m segments whose sizes differ by at most one, or
    one token each where r ≤ m (landmarks r, …, m−1 are then zero).

    Args:
        states: (batch, heads, seq, head_dim).
        num_landmarks: m.
        lengths: (batch,), real tokens of each row; None where no row is padded.

    Returns:
        (batch, heads, num_landmarks, head_dim) in the dtype of `states`.
    """
    return _with_segment_means(states, num_landmarks, lengths)[1]


def _with_segment_means(
    states: torch.Tensor, num_landmarks: int, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`states` and their `segment_means`. Whoever goes on with these states, not with those given, gets a cheaper gradient."""
    batch, heads, seq_len, head_dim = states.shape
    if lengths is None and seq_len % num_landmarks == 0:
        return apply_function(_SegmentMeans, states, num_landmarks)

    tokens = torch.arange(seq_len, device=states.device)
    if lengths is None:
        segments = (tokens * num_landmarks // max(seq_len, num_landmarks)).expand(batch, -1)
    else:
        segments = tokens * num_landmarks // lengths.clamp(min=num_landmarks)[:, None]
        segments = segments.where(tokens < lengths[:, None], num_landmarks)  # padding: one more segment, dropped below
    first_segment = torch.arange(batch, device=states.device)[:, None] * (num_landmarks + 1)
    segments = (segments + first_segment).flatten()

    flat = states.transpose(1, 2).reshape(batch * seq_len, heads * head_dim).to(_at_least_float32(states.dtype))
    sums = flat.new_zeros(batch * (num_landmarks + 1), heads * head_dim).index_add(0, segments, flat)
    counts = flat.new_zeros(batch * (num_landmarks + 1)).index_add(0, segments, flat.new_ones(batch * seq_len))
    means = (sums / counts.clamp(min=1)[:, None]).view(batch, num_landmarks + 1, heads, head_dim)
    return states, means[:, :num_landmarks].transpose(1, 2).to(states.dtype)


class _SegmentMeans(torch.autograd.Function):
    """States (batch, heads, seq, head_dim) and the means of their equal segments. The gradients of both, where both are
    used, join in one pass over memory instead of three."""

    @staticmethod
    def forward(states, num_landmarks):
        segments = states.unflatten(2, (num_landmarks, -1))
        means = segments.mean(dim=3, dtype=_at_least_float32(states.dtype))
        return states.view_as(states), means.to(states.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.segment_size = inputs[0].shape[2] // inputs[1]
        ctx.num_landmarks = inputs[1]

    @staticmethod
    def backward(ctx, grad_states, grad_means):
        if grad_means is None:
            return grad_states, None
        grad = (grad_means / ctx.segment_size)[:, :, :, None]
        if grad_states is None:
            grad = grad.expand(-1, -1, -1, ctx.segment_size, -1)
        else:
            grad = grad_states.unflatten(2, (ctx.num_landmarks, -1)) + grad
        return grad.flatten(2, 3), None


def refine_landmarks(
    landmarks: torch.Tensor, states: torch.Tensor, steps: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Move landmarks to the means of the tokens nearest to them (Lloyd's k-means steps; O(n·m) each).

    A segment mean blurs tokens that happen to be neighbours; the mean of similar tokens blurs less. On the weights of
    a trained BERT one step is worth about half of what twice the landmarks are, and further steps add little.

    Args:
        landmarks: (batch, heads, m, head_dim), where to start.
        states: (batch, heads, seq, head_dim).
        steps: number of steps; a landmark that is nearest to no token stays where it is.
        lengths: (batch,), real tokens of each row; None where no row is padded. Rows of at most m tokens keep their
            landmarks, which are their tokens.

    Returns:
        (batch, heads, m, head_dim) in the dtype of `landmarks`.
    """
    num_landmarks = landmarks.shape[2]
    dtype = _at_least_float32(states.dtype)
    states, refined = states.to(dtype), landmarks.to(dtype)
    for _ in range(steps):
        closeness = states @ refined.transpose(-1, -2) - refined.square().sum(dim=-1)[:, :, None] / 2
        members = F.one_hot(closeness.argmax(dim=-1), num_landmarks).to(dtype)
        if lengths is not None:
            members = members * _first(lengths, states.shape[2]).transpose(-1, -2)
        counts = members.sum(dim=2)[..., None]
        refined = torch.where(counts > 0, members.transpose(-1, -2) @ states / counts.clamp(min=1), refined)
    refined = refined.to(landmarks.dtype)
    if lengths is None:
        return refined
    return torch.where((lengths <= num_landmarks)[:, None, None, None], landmarks, refined)


def iterative_inverse(matrix: torch.Tensor, iterations: int = 6, init: str = "original") -> torch.Tensor:
    """Approximate the Moore-Penrose inverse by the iteration of Razavi et al. 2014 (Xiong et al. 2021, eq. 11).

        Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))     from     Z = Aᵀ / (‖A‖₁ ‖A‖∞),   ‖A‖∞ = 1 here

    Few iterations regularise: in the direction of a singular value s, Z·A starts at s²/‖A‖₁ and grows by at most 13/4
    an iteration, so directions that are nearly lost in A stay suppressed. That is needed: on the weights of a trained
    BERT 12 iterations are worse than 6, and the exact pseudo-inverse is useless.

    Args:
        matrix: A, (batch, heads, m, m), row-stochastic; float32 or float64.
        iterations: steps of third order; the paper takes six.
        init: what stands for ‖A‖₁, the largest column sum: that of each head ("exact"), or the largest among the
            heads of a batch row ("original", as the published models were trained; never across batch rows).

    Returns:
        (batch, heads, m, m).
    """
    column_sum = matrix.sum(dim=-2).amax(dim=-1)
    if init == "original":
        column_sum = column_sum.amax(dim=-1, keepdim=True)
    inverse = (matrix.transpose(-1, -2) / column_sum[..., None, None]).flatten(0, 1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    seven, fifteen, thirteen_fourths = 7 * identity, 15 * identity, 13 / 4 * identity
    heads = matrix.flatten(0, 1)
    for _ in range(iterations):
        product = torch.bmm(heads, inverse)
        bracket = torch.baddbmm(fifteen, product, seven - product, alpha=-1)
        bracket = torch.baddbmm(thirteen_fourths, product, bracket, alpha=-1 / 4)
        inverse = torch.bmm(inverse, bracket)
    return inverse.view_as(matrix)


def ridge_inverse(matrix: torch.Tensor, regularization: float) -> torch.Tensor:
    """(AᵀA + λI)⁻¹ Aᵀ, Tikhonov's pseudo-inverse of A (batch, heads, m, m) with λ = `regularization` > 0.

    It suppresses directions of singular value below √λ, as few iterations of `iterative_inverse` do, but sharply and
    independently of the other heads.
    """
    transposed = matrix.transpose(-1, -2)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(transposed @ matrix + regularization * identity, transposed)


class Landmarks(NamedTuple):
    """Landmarks of queries and keys (batch, heads, m, head_dim), the inverse Z (batch, heads, m, m) in float32 or
    better, and the rows (batch, 1, 1, 1) that attend exactly (None where no row can)."""

    query: torch.Tensor
    key: torch.Tensor
    inverse: torch.Tensor
    exact_rows: torch.Tensor | None


def choose_landmarks(
    query: torch.Tensor,
    key: torch.Tensor,
    num_landmarks: int,
    lengths: torch.Tensor | None = None,
    *,
    refinement_steps: int = 0,
    inverse_iterations: int = 6,
    inverse_init: str = "original",
    inverse_regularization: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Landmarks]:
    """Q̃, K̃ and Z, the inverse of L = softmax(Q̃ K̃ᵀ / √d), of query and key (batch, heads, seq, head_dim).

    The other arguments are those of `segment_means`, `refine_landmarks` and, where `inverse_regularization` is None,
    `iterative_inverse`; otherwise `ridge_inverse`. Returned are also query and key, see `_with_segment_means`.
    """
    query, query_landmarks = _with_segment_means(query, num_landmarks, lengths)
    key, key_landmarks = _with_segment_means(key, num_landmarks, lengths)
    if refinement_steps > 0:
        query_landmarks = refine_landmarks(query_landmarks, query, refinement_steps, lengths)
        key_landmarks = refine_landmarks(key_landmarks, key, refinement_steps, lengths)

    attention = _softmax_scores(query_landmarks, key_landmarks)
    exact_rows = None
    if lengths is not None:
        # Exact rows need no inverse, and their empty landmarks must not make its gradient infinite.
        exact_rows = (lengths <= num_landmarks)[:, None, None, None]
        identity = torch.eye(num_landmarks, dtype=attention.dtype, device=attention.device)
        attention = torch.where(exact_rows, identity, attention)
    if inverse_regularization is None:
        inverse = iterative_inverse(attention, inverse_iterations, inverse_init)
    else:
        inverse = ridge_inverse(attention, inverse_regularization)
    return query, key, Landmarks(query_landmarks, key_landmarks, inverse, exact_rows)


def nystrom_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    lengths: torch.Tensor | None = None,
    dropout: float = 0.0,
    **landmark_options,
) -> tuple[torch.Tensor, None]:
    """F (Z (B V)), from right to left (Xiong et al. 2021, figure 2): O(n·m) time, O(n) extra memory.

    Args:
        query, key, value: (batch, heads, seq, head_dim), each row's real tokens first.
        num_landmarks: m. Rows of at most m tokens attend exactly.
        lengths: (batch,), real tokens of each row, at least one; None where no row is padded.
        dropout: probability with which a head does not see a key, see `drop_keys`.
        landmark_options: see `choose_landmarks`.

    Returns:
        Output (batch, heads, seq, head_dim) in the dtype of `value` (finite and without meaning at padding), and None
        in the place of attention weights.
    """
    seq_len = query.shape[2]
    real_tokens = _first(lengths, seq_len)
    if dropout > 0.0:
        value = value * drop_keys(value, dropout)
    with maybe_autocast(query.device.type, enabled=False):
        if seq_len <= num_landmarks:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=real_tokens), None
        query, key, landmarks = choose_landmarks(query, key, num_landmarks, lengths, **landmark_options)
        pooled = F.scaled_dot_product_attention(landmarks.query, key, value, attn_mask=real_tokens)
        landmark_values = landmarks.inverse @ pooled.to(landmarks.inverse.dtype)
        if landmarks.exact_rows is not None:
            own_values = segment_means(value, num_landmarks, lengths)
            landmark_values = torch.where(landmarks.exact_rows, own_values, landmark_values)
        output = F.scaled_dot_product_attention(
            query, landmarks.key, landmark_values.to(value.dtype), attn_mask=_first(lengths, num_landmarks)
        )
    return output, None


def nystrom_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    lengths: torch.Tensor | None = None,
    dropout: float = 0.0,
    **landmark_options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `nystrom_attention`, with the matrix F Z B built (Xiong et al. 2021, "Nyströmformer"): O(n²).

    Takes the same arguments, and drops the same keys from the same random state.

    Returns:
        Output (batch, heads, seq, head_dim) and weights (batch, heads, seq, seq) in the dtype of `value`, with
        output = weights · value. Before dropout the weights of a query sum to one, as closely as Z inverts L (exactly
        where attention is exact); some may be negative; those of padding keys are zero.
    """
    batch, _, seq_len, _ = query.shape
    real_tokens = _first(lengths, seq_len)
    kept_keys = drop_keys(value, dropout).transpose(-1, -2) if dropout > 0.0 else None
    with maybe_autocast(query.device.type, enabled=False):
        if seq_len <= num_landmarks:
            weights = _softmax_scores(query, key, real_tokens)
        else:
            query, key, landmarks = choose_landmarks(query, key, num_landmarks, lengths, **landmark_options)
            landmark_weights = landmarks.inverse @ _softmax_scores(landmarks.query, key, real_tokens)
            if landmarks.exact_rows is not None:
                tokens = torch.eye(seq_len, dtype=landmark_weights.dtype, device=query.device)
                own_tokens = segment_means(tokens.expand(batch, 1, -1, -1), num_landmarks, lengths)
                landmark_weights = torch.where(landmarks.exact_rows, own_tokens, landmark_weights)
            weights = _softmax_scores(query, landmarks.key, _first(lengths, num_landmarks)) @ landmark_weights
        if kept_keys is not None:
            weights = weights * kept_keys
        output = weights @ value.to(weights.dtype)
    return output.to(value.dtype), weights.to(value.dtype)


def drop_keys(value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Draw the keys that each head sees, scaled to keep expectations: (batch, heads, seq, 1), 0 or 1/(1 − dropout).

    The (n, n) matrix whose entries ordinary attention dropout removes does not exist here, and noise in its factors
    would be amplified by Z. So whole columns are removed (Zehui et al. 2019, "DropAttention", arXiv 1907.11065,
    column form), which only scales rows of V.
    """
    return F.dropout(value.new_ones(*value.shape[:3], 1), dropout)


def value_convolution(
    value: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve V along the sequence, one kernel per head: the skip connection in figure 2 of Xiong et al. 2021.

        output[t] = residual[t] + Σ_j weight[j] · value[t + j − ⌊k/2⌋],   with zeros beyond a row's real tokens

    On a CPU evaluated as matrix products of a band of weights with each block of the sequence, which is faster than a
    depthwise `conv2d` with the published models' kernels of 65 taps.

    Args:
        value: (batch, heads, seq, head_dim).
        weight: (heads, 1, kernel_size, 1), of odd or even size.
        lengths: (batch,), real tokens of each row; None where no row is padded.
        residual: what the result is added to, of the shape and dtype of `value`; None for nothing.

    Returns:
        (batch, heads, seq, head_dim) in the dtype of `value`.
    """
    if lengths is not None:
        value = value * _first(lengths, value.shape[2]).transpose(-1, -2)
    with maybe_autocast(value.device.type, enabled=False):
        weight = weight.to(value.dtype)
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            return _BlockedConvolution.apply(value, weight[:, 0, :, 0], residual)
        output = _depthwise_convolution(value, weight)
        return output if residual is None else residual + output


def _depthwise_convolution(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`value_convolution` by torch's own kernel."""
    kernel_size = weight.shape[2]
    padded = F.pad(value, (0, 0, kernel_size // 2, (kernel_size - 1) // 2))
    return F.conv2d(padded, weight, groups=weight.shape[0])


# Tokens that one matrix product of the convolution yields. Of its band of weights, (tokens, tokens + kernel_size - 1), a
# product needs kernel_size entries in each row: the fewer tokens, the less is in vain.
CONVOLUTION_BLOCK = 32
# Elements of a head's values that are convolved at a time, 1 MiB in float32: what is made of them stays in a CPU's caches.
CONVOLUTION_SPAN = 256 * 1024


class _BlockedConvolution(torch.autograd.Function):
    """`value_convolution` of value (batch, heads, seq, head_dim) with weight (heads, kernel_size), plus residual or None.
    Derivatives beyond the first are those of `_depthwise_convolution`."""

    @staticmethod
    def forward(ctx, value, weight, residual):
        ctx.save_for_backward(value, weight)
        return _convolve(value, weight, weight.shape[1] // 2, residual)

    @staticmethod
    def backward(ctx, grad):
        value, weight = ctx.saved_tensors
        before, grad_value, grad_weight = weight.shape[1] // 2, None, None
        with maybe_autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():
                output = _depthwise_convolution(value, weight[:, None, :, None])
                if ctx.needs_input_grad[0]:
                    (grad_value,) = torch.autograd.grad(output, value, grad, create_graph=True)
                if ctx.needs_input_grad[1]:
                    (grad_weight,) = torch.autograd.grad(output, weight, grad, create_graph=True)
                return grad_value, grad_weight, grad if ctx.needs_input_grad[2] else None
            if ctx.needs_input_grad[0]:
                grad_value = _convolve(grad, weight.flip(1), weight.shape[1] - 1 - before)
            if ctx.needs_input_grad[1]:
                grad_weight = _kernel_gradient(grad, value, weight)
        return grad_value, grad_weight, grad if ctx.needs_input_grad[2] else None


def _kernel_gradient(grad: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of each band of weights, then summed along its diagonals; in float32 or better."""
    heads, kernel_size = weight.shape
    dtype = _at_least_float32(weight.dtype)
    bands = torch.zeros(
        heads, CONVOLUTION_BLOCK, CONVOLUTION_BLOCK + kernel_size - 1, dtype=dtype, device=weight.device
    )
    for head, begin, end in _spans(value):
        windows = _windows(value[:, head], begin, end, kernel_size // 2, kernel_size)
        slots = _padded_length(end - begin, kernel_size)
        blocks = _take(grad[:, head], begin, end, slots).unflatten(1, (-1, CONVOLUTION_BLOCK)).flatten(0, 1)
        bands[head] += torch.bmm(blocks[: len(windows)], windows.mT).sum(0, dtype=dtype)
    sums = torch.zeros(heads, kernel_size + 1, dtype=dtype, device=weight.device)
    sums.index_add_(1, _taps(kernel_size, weight.device).flatten(), bands.flatten(1))
    return sums[:, :-1].to(weight.dtype)


def _convolve(
    value: torch.Tensor, weight: torch.Tensor, before: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + Σ_j weight[j] · value[t + j − before], shapes as in `_BlockedConvolution`."""
    # As the residual lies in memory: tokens before heads.
    output = torch.empty_like(value if residual is None else residual)
    bands = F.pad(weight, (0, 1))[:, _taps(weight.shape[1], weight.device)]
    for head, begin, end in _spans(value):
        windows = _windows(value[:, head], begin, end, before, weight.shape[1])
        products = value.new_empty(len(value), _padded_length(end - begin, weight.shape[1]), value.shape[3])
        blocks = products.view(-1, CONVOLUTION_BLOCK, value.shape[3])[: len(windows)]
        torch.bmm(bands[head].expand(len(windows), -1, -1), windows, out=blocks)
        products, span = products[:, : end - begin], output[:, head, begin:end]
        if residual is None:
            span.copy_(products)
        else:
            torch.add(residual[:, head, begin:end], products, out=span)
    return output


def _spans(value: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Head, begin and end of whole blocks of value (batch, heads, seq, head_dim) that together are about CONVOLUTION_SPAN."""
    batch, heads, seq_len, head_dim = value.shape
    span = max(CONVOLUTION_SPAN // max(batch * head_dim * CONVOLUTION_BLOCK, 1), 1) * CONVOLUTION_BLOCK
    for head, begin in itertools.product(range(heads), range(0, seq_len, span)):
        yield head, begin, min(begin + span, seq_len)


def _taps(kernel_size: int, device: torch.device) -> torch.Tensor:
    """Which weight stands where in a band, (CONVOLUTION_BLOCK, CONVOLUTION_BLOCK + kernel_size − 1); `kernel_size` itself
    stands for zero."""
    token = torch.arange(CONVOLUTION_BLOCK, device=device)[:, None]
    tap = torch.arange(CONVOLUTION_BLOCK + kernel_size - 1, device=device) - token
    return tap.where((tap >= 0) & (tap < kernel_size), kernel_size)


def _padded_length(count: int, kernel_size: int) -> int:
    """Whole blocks for so many tokens and, behind them, whole blocks for the rest of the kernel."""
    return (-(-count // CONVOLUTION_BLOCK) + -(-(kernel_size - 1) // CONVOLUTION_BLOCK)) * CONVOLUTION_BLOCK


def _windows(states: torch.Tensor, begin: int, end: int, before: int, kernel_size: int) -> torch.Tensor:
    """What each block of the outputs `begin` ... `end` depends on: (blocks of all rows, CONVOLUTION_BLOCK + kernel_size − 1,
    head_dim), overlapping views of one copy of `states` (batch, seq, head_dim). The last blocks of a row reach into the
    next one and are of no use."""
    slots = _padded_length(end - begin, kernel_size)
    taken = _take(states, begin - before, end - before + kernel_size - 1, slots)
    return taken.flatten(0, 1).unfold(0, CONVOLUTION_BLOCK + kernel_size - 1, CONVOLUTION_BLOCK).mT


def _take(states: torch.Tensor, low: int, high: int, slots: int) -> torch.Tensor:
    """Tokens `low` ... `high` of `states` (batch, seq, head_dim), zeros for those that do not exist and behind them: (batch,
    slots, head_dim)."""
    first, last = max(low, 0), min(high, states.shape[1])
    return F.pad(states[:, first:last], (0, 0, first - low, low + slots - last))


def _first(lengths: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """True at the first `lengths` of `size` positions: (batch, 1, 1, size)."""
    if lengths is None:
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _softmax_scores(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(query keyᵀ / √d) over the allowed keys, (batch, heads, queries, keys), in float32 or better."""
    dtype = _at_least_float32(query.dtype)
    scores = (query.to(dtype) * query.shape[-1] ** -0.5) @ key.to(dtype).transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1)


def _take_tokens(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of `states` (batch, seq, dim) at `positions` (batch, seq)."""
    batch_index = torch.arange(states.shape[0], device=states.device)[:, None]
    return states[batch_index, positions]
