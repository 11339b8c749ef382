"""KERMIT attention: near field and far field put together, as functions on tensors.

With W = `window_size`, the query in slot i (see `Slots`) attends exactly to slots i - W + 1 ... i and to the sink tokens, and
reads everything older, slot i - W and before, from the memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import find_fused_window, find_kernel, find_norm, find_window, find_window_step
from .far_field import normalized_value, normalized_weights, read_far_field, virtual_token
from .functions import apply_function
from .kernel_attention import KernelMemory
from .slots import Slots, all_have_older, num_older, with_sinks_taken
from .window_attention import FarField, Sinks, pad_zeros, window_blocked, window_reference, window_step


# Elements of one tensor of queries that a CPU treats at a time, 2 MiB in float32.
SEGMENT_ELEMENTS = 512 * 1024


class KermitAttentionOutput(NamedTuple):
    """output (batch, heads, length, head_dim); memory with `num_absorbed` more slots. From the explicit form also weights
    (batch, heads, length, slots), sink_weights (batch, heads, length, num_sink_tokens) or None, of sinks behind the
    window, and unweighted (batch, heads, length, head_dim) or None: the part of the output that no weight of a slot
    accounts for, because it comes from tokens that the memory has absorbed or from the delta rule's output norm."""

    output: torch.Tensor
    memory: KernelMemory | None
    weights: torch.Tensor | None = None
    sink_weights: torch.Tensor | None = None
    unweighted: torch.Tensor | None = None


def kermit_attention(
    query: torch.Tensor,
    slots: Slots,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    window_size: int,
    update_rule: str,
    map_queries: Callable,
    map_keys: Callable,
    far_logit: torch.Tensor,
    far_norm: Callable | None = None,
    is_causal: bool = True,
    explicit: bool = False,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> KermitAttentionOutput:
    """Attention of the last `length` slots.

    Args:
        query: (batch, heads, length, head_dim), without positions.
        slots: the tokens, see `Slots`.
        rotary: cosine and sine of slot numbers, both (slots or more, head_dim); None at `window_size` 0.
        update_rule: "additive" or "delta".
        map_queries, map_keys: methods of a `FeatureMap`; unit features for the delta rule.
        far_logit: (batch, heads, length), learned part of the far field's logit.
        far_norm: norm of the far field's value, for the delta rule.
        explicit: build all weights, in O(length * slots); the outputs agree with the linear form to rounding.
        scaling: of the near field's scores, 1 / sqrt(head_dim).
        dropout: probability, on the softmax weights.
    """
    attend = partial(
        _attend,
        window_size=window_size,
        update_rule=update_rule,
        map_queries=map_queries,
        map_keys=map_keys,
        far_norm=far_norm,
        is_causal=is_causal,
        explicit=explicit,
        scaling=scaling,
        dropout=dropout,
    )
    segment = _segment_size(query, window_size)
    if explicit or not is_causal or slots.num_absorbed is not None or query.shape[2] <= segment:
        return attend(query, slots, rotary, far_logit)
    is_gated = "log_forget" in slots.gates
    kernel = find_kernel(update_rule, map_queries, map_keys, query, slots.values, is_gated)
    if kernel is not None and kernel.whole_texts:
        return attend(query, slots, rotary, far_logit)
    segments = _in_segments(attend, query, slots, rotary, far_logit, window_size, segment)
    return _joined(segments, query.shape[2])


def _segment_size(query: torch.Tensor, window_size: int) -> int:
    """How many queries to treat at a time: on a CPU as many as keep everything about them in its caches."""
    batch, heads, length, head_dim = query.shape
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return length
    fitting = SEGMENT_ELEMENTS // max(batch * heads * head_dim, 1) // 64 * 64
    return max(fitting, 256, window_size)


def _in_segments(
    attend: Callable[..., KermitAttentionOutput],
    query: torch.Tensor,
    slots: Slots,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    far_logit: torch.Tensor,
    window_size: int,
    segment: int,
) -> Iterator[KermitAttentionOutput]:
    """The same attention, one segment after the other: each starts from the memory and the window that the last one left."""
    tokens = {"keys": slots.keys, "values": slots.values, **slots.gates}
    # Where each segment ends and where the next one's window, which reaches back into it, starts.
    past, num_slots = slots.keys.shape[2] - query.shape[2], slots.keys.shape[2]
    ends = [*range(past + segment, num_slots, segment), num_slots]
    starts = [0] + [max(end - window_size, 0) for end in ends[:-1]]
    cut = _cut_by_pieces if torch.is_grad_enabled() else _cut_by_slices
    parts = {name: cut(tensor, starts, ends) for name, tensor in tokens.items()}
    memory = slots.memory
    queries, logits = query.split(segment, 2), far_logit.split(segment, 2)
    for segment_query, segment_logit, start in zip(queries, logits, starts, strict=True):
        near = {name: next(part) for name, part in parts.items()}
        segment_slots = slots._replace(
            keys=near.pop("keys"),
            values=near.pop("values"),
            gates=near,
            first_real=slots.first_real - start,
            first_filled=slots.first_filled - start,
            memory=memory,
            sink_slots=None,
        )
        result = attend(segment_query, segment_slots, rotary, segment_logit)
        memory = result.memory
        yield result


def _cut_by_slices(tensor: torch.Tensor, starts: list[int], ends: list[int]) -> Iterator[torch.Tensor]:
    for start, end in zip(starts, ends, strict=True):
        yield tensor[:, :, start:end]


def _cut_by_pieces(tensor: torch.Tensor, starts: list[int], ends: list[int]) -> Iterator[torch.Tensor]:
    """The same, put together from pieces between all these borders: the gradient of each slice would be as large as the tensor."""
    borders = sorted({*starts, *ends})
    sizes = [end - start for start, end in pairwise(borders)]
    pieces = dict(zip(borders[:-1], tensor.split(sizes, 2), strict=True))
    for start, end in zip(starts, ends, strict=True):
        inside = [pieces[border] for border in borders if start <= border < end]
        yield torch.cat(inside, 2) if len(inside) > 1 else inside[0]


def _joined(segments: Iterator[KermitAttentionOutput], length: int) -> KermitAttentionOutput:
    """As one of so many queries. Without gradients each segment is written into its place as it comes, tokens before heads, as the
    projection behind the attention reads them."""
    if torch.is_grad_enabled():
        parts = list(segments)
        return KermitAttentionOutput(torch.cat([part.output for part in parts], 2), parts[-1].memory)
    output, start = None, 0
    for part in segments:
        batch, heads, count, head_dim = part.output.shape
        if output is None:
            # The first one may have nothing behind its window, and then the dtype of its states; all others have float32 at least.
            dtype = torch.promote_types(part.output.dtype, torch.float32)
            output = part.output.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
        output[:, :, start : start + count] = part.output
        start += count
    return KermitAttentionOutput(output, part.memory)


def _attend(
    query: torch.Tensor,
    slots: Slots,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    far_logit: torch.Tensor,
    window_size: int,
    update_rule: str,
    map_queries: Callable,
    map_keys: Callable,
    far_norm: Callable | None,
    is_causal: bool,
    explicit: bool,
    scaling: float,
    dropout: float,
) -> KermitAttentionOutput:
    length, num_slots = query.shape[2], slots.keys.shape[2]
    # A window over everything is ordinary attention, which torch has a kernel for.
    fuses = 0 < window_size < num_slots and length > 1 and dropout == 0.0 and not explicit
    fused = find_fused_window(query) if fuses else None
    hands_on = fused is not None and torch.is_grad_enabled()
    if hands_on:
        slots = with_sinks_taken(slots)
    far, memory, query, slots = read_far_field(
        query, slots, window_size, update_rule, map_queries, map_keys, is_causal, explicit, hands_on
    )
    far_field, far_weights = None, None
    if far is not None:
        early = length - far.numerator.shape[2]
        if far_norm is not None and not explicit:
            far_norm = find_norm(far_norm, far.numerator)
        far_value = normalized_value(far, far_norm)
        if explicit:
            far_weights = pad_zeros(normalized_weights(far), (0, 0, early, 0))
    if window_size == 0:
        output = F.dropout(pad_zeros(far_value, (0, 0, early, 0)), dropout)
        if not explicit:
            return KermitAttentionOutput(output, memory)
        return KermitAttentionOutput(output, memory, far_weights, None, output - _apply(far_weights, slots.values))
    if far is not None:
        far_field = virtual_token(far, far_value, far_logit[:, :, early:])

    cos, sin = rotary
    has_sinks = num_slots > window_size and slots.sink_keys.shape[2] > 0
    is_step = length == 1 and is_causal and not explicit
    if is_step and dropout == 0.0:
        sinks = (slots.sink_keys, slots.sink_values) if has_sinks else None
        step = find_window_step(query, slots.keys, slots.values, *(sinks or ()), *(far_field or ()))
        if step is not None:
            parts = window_size, slots.first_real, sinks, far_field, rotary, scaling
            return KermitAttentionOutput(step(query, slots.keys, slots.values, *parts), memory)
    if fused is not None:
        sinks = None
        if has_sinks:
            sinks = _turned_sink_keys(query, slots, window_size, cos, sin, scaling), slots.sink_values
        parts = window_size, slots.first_real, sinks, far_field, is_causal, rotary, scaling
        return KermitAttentionOutput(fused(query, slots.keys, slots.values, *parts), memory)
    if explicit:
        window = window_reference
    elif is_step:
        window = window_step
        query = query.to(torch.promote_types(query.dtype, torch.float32))
    else:
        window = find_window(query, slots.sink_keys.shape[2]) if num_slots > window_size else window_blocked
    turned_query = rotate(
        query, scaling * cos[num_slots - length : num_slots], scaling * sin[num_slots - length : num_slots]
    )
    sinks = None
    if has_sinks and window is window_step:
        turned_keys = _sink_keys_of_step(slots, window_size, cos, sin, query.dtype)
        sinks = _sinks(turned_query, slots, window_size, turned_keys)
    elif has_sinks:
        turned_keys = _turned_sink_keys(query, slots, window_size, cos, sin, scaling)
        sinks = _sinks(query, slots, window_size, turned_keys)
    if far_field is not None:
        far_field = _for_all_queries(far_field, length)
    near = window(
        turned_query,
        rotate(slots.keys, cos[:num_slots], sin[:num_slots]),
        slots.values,
        window_size,
        slots.first_real,
        sinks,
        far_field,
        is_causal,
        dropout,
    )
    if not explicit:
        return KermitAttentionOutput(near.output, memory)
    weights, unweighted = near.near, None
    if far is not None:
        weights = weights + near.far * far_weights
        unweighted = near.far * (far_field.value - _apply(far_weights, slots.values))
    return KermitAttentionOutput(near.output, memory, weights, near.sinks, unweighted)


def _apply(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return weights @ values.to(weights.dtype).repeat_interleave(weights.shape[1] // values.shape[1], 1)


def rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), halves of a head as real and imaginary parts.

    tensor (..., head_dim); cos, sin: of its tokens, (seq, head_dim), both halves alike."""
    return apply_function(_Rotate, tensor, cos.to(tensor.dtype), sin.to(tensor.dtype))


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: one pass, where autograd would take apart every step."""

    @staticmethod
    def forward(tensor, cos, sin):
        rotated = tensor * cos
        real, imaginary = tensor.chunk(2, -1)
        half = real.shape[-1]
        sin = sin[..., :half]
        # Not the views of `chunk`, which `torch.export` lets nobody write to.
        rotated[..., :half].addcmul_(imaginary, sin, value=-1)
        rotated[..., half:].addcmul_(real, sin)
        return rotated

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def _turned_sink_keys(
    query: torch.Tensor, slots: Slots, window_size: int, cos: torch.Tensor, sin: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Keys of sink tokens that lie behind the window, at rotary distance `window_size - index` whatever the true distance:
    (batch, kv_heads, num_sink_tokens, head_dim), scaled.

    Only the difference of two positions matters, so the few sink keys are turned by it, instead of all queries: backwards,
    hence the minus. The second factor `cos^2 + sin^2` is what turning the queries would have scaled them by.
    """
    distance = window_size - torch.arange(slots.sink_keys.shape[2], device=query.device)
    attention_scaling = (cos[:1].square() + sin[:1].square()).sqrt()
    scaling = scaling * attention_scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    return rotate(slots.sink_keys.to(dtype), scaling * cos[distance], -scaling * sin[distance])


def _sink_keys_of_step(
    slots: Slots, window_size: int, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sink keys for a single query that is itself turned and scaled: turned like the keys of slots i - W, i - W + 1, ... where i is
    the query's, so that sink k lies at distance W - k. In `dtype`, not scaled."""
    first = slots.keys.shape[2] - 1 - window_size
    here = slice(first, first + slots.sink_keys.shape[2])
    return rotate(slots.sink_keys.to(dtype), cos[here], sin[here])


def _sinks(query: torch.Tensor, slots: Slots, window_size: int, turned_keys: torch.Tensor) -> Sinks:
    """Scores of sinks: of unturned queries with `_turned_sink_keys`, or of a turned one with `_sink_keys_of_step`."""
    count, groups = turned_keys.shape[2], query.shape[1] // turned_keys.shape[1]
    if groups > 1:
        turned_keys = turned_keys.repeat_interleave(groups, 1)
    logits = query.to(turned_keys.dtype) @ turned_keys.mT
    if not all_have_older(slots, query.shape[2], window_size, count):
        hidden = num_older(slots, query.shape[2], window_size)[..., None] <= torch.arange(count, device=query.device)
        logits = logits.masked_fill(hidden, float("-inf"))
    return Sinks(logits, slots.sink_values)


def _for_all_queries(far: FarField, length: int) -> FarField:
    """The far field of the last of `length` queries, and nothing for those before them."""
    early = length - far.value.shape[2]
    if early == 0:
        return far
    return FarField(F.pad(far.value, (0, 0, early, 0)), F.pad(far.logit, (early, 0), value=float("-inf")))
