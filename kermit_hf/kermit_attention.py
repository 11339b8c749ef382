"""KERMIT attention: near field and far field put together, as functions on tensors.

Tokens sit in slots, (batch, kv_heads, slots, ...), the queries being the last `length` of them. With W = `window_size`, the
query in slot i attends exactly to slots i - W + 1 ... i and to the sink tokens, and reads everything older, slot i - W
and before, from the memory. The far field is therefore ordinary causal kernel attention with the queries shifted by W.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import find_fused_window, find_kernel, find_norm, find_window
from .kernel_attention import (
    KernelMemory,
    KernelReadout,
    additive_chunked,
    additive_reference,
    additive_step,
    delta_chunked,
    delta_reference,
    delta_step,
)
from .window_attention import FarField, Sinks, pad_zeros, window_blocked, window_reference, window_step


# Elements of one tensor of queries that a CPU treats at a time, 2 MiB in float32.
SEGMENT_ELEMENTS = 512 * 1024


class UpdateRule(NamedTuple):
    """The three forms of one rule, see `kernel_attention`; takes_mask, divides: see `backends.Kernel`."""

    reference: Callable[..., KernelReadout]
    chunked: Callable[..., KernelReadout]
    step: Callable[..., KernelReadout]
    takes_mask: bool = False
    divides: bool = False


UPDATE_RULES = {
    "additive": UpdateRule(additive_reference, additive_chunked, additive_step),
    "delta": UpdateRule(delta_reference, delta_chunked, delta_step),
}


class Slots(NamedTuple):
    """What attention over `slots` columns of tokens reads.

    keys (without positions), values: (batch, kv_heads, slots, head_dim); gates: "log_forget" and "write_strength",
    (batch, kv_heads, slots), those that the model has. first_real: slot of each row's first real token, an int or
    (batch,), negative where it has left. sink_keys, sink_values: (batch, kv_heads, num_sink_tokens, head_dim). memory:
    of the tokens before the first slot, None if there are none. first_filled: slot of each row's first token that is
    still here, an int or (batch,); padding in the middle of a row leaves free slots before it. num_absorbed: how many
    slots, from the first on, the memory may keep for good; None is all that leave the window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    gates: dict[str, torch.Tensor]
    first_real: int | torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    memory: KernelMemory | None = None
    first_filled: int | torch.Tensor = 0
    num_absorbed: int | None = None


class FarReadout(NamedTuple):
    """Of the last `readers` queries: those before them have nothing to read.

    numerator (batch, heads, readers, head_dim); denominator (batch, heads, readers), None for the delta rule; log_scale of
    the queries, (batch, heads, readers) or None; empty, which queries have nothing behind their window, broadcastable to
    (batch, heads, readers); weights (batch, heads, readers, slots), from the reference; divided: the numerator is their quotient.
    """

    numerator: torch.Tensor
    denominator: torch.Tensor | None
    log_scale: torch.Tensor | None
    empty: torch.Tensor | None
    weights: torch.Tensor | None
    divided: bool = False


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
    kernel = find_kernel(update_rule, map_queries, map_keys, query, slots.values)
    if kernel is not None and kernel.whole_texts:
        return attend(query, slots, rotary, far_logit)
    return _in_segments(attend, query, slots, rotary, far_logit, window_size, segment)


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
) -> KermitAttentionOutput:
    """The same attention, one segment after the other: each starts from the memory and the window that the last one left."""
    tokens = {"keys": slots.keys, "values": slots.values, **slots.gates}
    queries, logits = query.split(segment, 2), far_logit.split(segment, 2)
    # Where each segment ends and where the next one's window, which reaches back into it, starts. Pieces between these
    # borders, not slices: the gradient of each slice would be as large as the whole sequence.
    past, num_slots = slots.keys.shape[2] - query.shape[2], slots.keys.shape[2]
    ends = [*range(past + segment, num_slots, segment), num_slots]
    starts = [0] + [max(end - window_size, 0) for end in ends[:-1]]
    borders = sorted({0, num_slots, *starts, *ends})
    sizes = [end - start for start, end in pairwise(borders)]
    pieces = {name: dict(zip(borders[:-1], tensor.split(sizes, 2), strict=True)) for name, tensor in tokens.items()}
    memory, outputs = slots.memory, []
    for segment_query, segment_logit, start, end in zip(queries, logits, starts, ends, strict=True):
        inside = [border for border in borders if start <= border < end]
        near = {name: _join([parts[border] for border in inside]) for name, parts in pieces.items()}
        segment_slots = slots._replace(
            keys=near.pop("keys"),
            values=near.pop("values"),
            gates=near,
            first_real=slots.first_real - start,
            first_filled=slots.first_filled - start,
            memory=memory,
        )
        result = attend(segment_query, segment_slots, rotary, segment_logit)
        memory = result.memory
        outputs.append(result.output)
    return KermitAttentionOutput(torch.cat(outputs, 2), memory)


def _join(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


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
    far, memory, query, slots = _far_field(
        query, slots, window_size, update_rule, map_queries, map_keys, is_causal, explicit, hands_on=fused is not None
    )
    far_field, far_weights = None, None
    if far is not None:
        early = length - far.numerator.shape[2]
        if far_norm is not None and not explicit and query.shape[2] > 1:
            far_norm = find_norm(far_norm, far.numerator)
        far_value = _far_value(far, far_norm)
        far_weights = far.weights
        if explicit and far.denominator is not None:
            far_weights = far_weights / _positive(far.denominator)[..., None]
        if explicit:
            far_weights = pad_zeros(far_weights, (0, 0, early, 0))
    if window_size == 0:
        output = F.dropout(pad_zeros(far_value, (0, 0, early, 0)), dropout)
        if not explicit:
            return KermitAttentionOutput(output, memory)
        return KermitAttentionOutput(output, memory, far_weights, None, output - _apply(far_weights, slots.values))
    if far is not None:
        far_field = _virtual_token(far, far_value, far_logit[:, :, early:])

    cos, sin = rotary
    sink_keys = None
    if num_slots > window_size and slots.sink_keys.shape[2] > 0:
        sink_keys = _turned_sink_keys(query, slots, window_size, cos, sin, scaling)
    if fused is not None:
        sinks = None if sink_keys is None else (sink_keys, slots.sink_values)
        parts = window_size, slots.first_real, sinks, far_field, is_causal, rotary, scaling
        return KermitAttentionOutput(fused(query, slots.keys, slots.values, *parts), memory)
    if explicit:
        window = window_reference
    elif length == 1 and is_causal:
        window = window_step
    else:
        window = find_window(query, slots.sink_keys.shape[2]) if num_slots > window_size else window_blocked
    turned_query = rotate(
        query, scaling * cos[num_slots - length : num_slots], scaling * sin[num_slots - length : num_slots]
    )
    sinks = None if sink_keys is None else _sinks(query, slots, window_size, sink_keys)
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


def first_tokens(
    key: torch.Tensor, value: torch.Tensor, first_real: int | torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` real tokens of each row, (batch, kv_heads, count, head_dim); short rows repeat their last one,
    which no query sees."""
    index = torch.arange(count, device=key.device)
    index = index + (first_real[:, None] if isinstance(first_real, torch.Tensor) else first_real)
    index = index.clamp(max=key.shape[2] - 1).expand(key.shape[0], count)
    return take_slots(key, index, dim=2), take_slots(value, index, dim=2)


def take_slots(tensor: torch.Tensor, slots: torch.Tensor, dim: int) -> torch.Tensor:
    """Selects, for each row of the batch (axis 0), the entries `slots` (batch, count) of axis `dim`."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = slots.shape
    target = list(tensor.shape)
    target[dim] = slots.shape[1]
    return tensor.gather(dim, slots.view(shape).expand(target))


def _apply(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return weights @ values.to(weights.dtype).repeat_interleave(weights.shape[1] // values.shape[1], 1)


def rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), halves of a head as real and imaginary parts."""
    half = tensor.shape[-1] // 2
    return _Rotate.apply(tensor, cos[..., :half].to(tensor.dtype), sin[..., :half].to(tensor.dtype))


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: one pass, where autograd would take apart every step."""

    @staticmethod
    def forward(tensor, cos, sin):
        half = cos.shape[-1]
        rotated = tensor * torch.cat([cos, cos], -1)
        rotated[..., :half].addcmul_(tensor[..., half:], sin, value=-1)
        rotated[..., half:].addcmul_(tensor[..., :half], sin)
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


def _sinks(query: torch.Tensor, slots: Slots, window_size: int, turned_keys: torch.Tensor) -> Sinks:
    count, groups = turned_keys.shape[2], query.shape[1] // turned_keys.shape[1]
    logits = query.to(turned_keys.dtype) @ turned_keys.repeat_interleave(groups, 1).mT
    if not _all_have_older(slots, query.shape[2], window_size, count):
        hidden = _num_older(slots, query.shape[2], window_size)[..., None] <= torch.arange(count, device=query.device)
        logits = logits.masked_fill(hidden, float("-inf"))
    return Sinks(logits, slots.sink_values)


def _for_all_queries(far: FarField, length: int) -> FarField:
    """The far field of the last of `length` queries, and nothing for those before them."""
    early = length - far.value.shape[2]
    if early == 0:
        return far
    return FarField(F.pad(far.value, (0, 0, early, 0)), F.pad(far.logit, (early, 0), value=float("-inf")))


def _far_value(far: FarReadout, norm: Callable | None) -> torch.Tensor:
    if far.denominator is None:
        return norm(far.numerator)
    return far.numerator if far.divided else _Divide.apply(far.numerator, _positive(far.denominator)[..., None])


def _virtual_token(far: FarReadout, value: torch.Tensor, logit: torch.Tensor) -> FarField:
    """The far field as one token: its value, and the logit with which it enters the softmax."""
    if far.denominator is not None:
        logit = logit + _positive(far.denominator).log()
    if far.log_scale is not None:
        logit = logit + far.log_scale
    logit = logit.to(value.dtype)
    return FarField(value, logit if far.empty is None else logit.masked_fill(far.empty, float("-inf")))


class _Divide(torch.autograd.Function):
    """numerator (..., dim) / denominator (..., 1). Its gradient, taken from the result, goes over the numerator half as often
    as autograd's, and does not divide by the square of a denominator that may be tiny."""

    @staticmethod
    def forward(numerator, denominator):
        return numerator / denominator

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx, grad):
        denominator, quotient = ctx.saved_tensors
        grad = grad / denominator
        return grad, -(grad * quotient).sum(-1, keepdim=True)


def _far_field(
    query: torch.Tensor,
    slots: Slots,
    window_size: int,
    update_rule: str,
    map_queries: Callable,
    map_keys: Callable,
    is_causal: bool,
    explicit: bool,
    hands_on: bool,
) -> tuple[FarReadout | None, KernelMemory | None, torch.Tensor, Slots]:
    """What each query reads of slots older than its window, and the memory after the absorbed slots; also queries and slots, which
    with `hands_on` have to be used from now on instead of the given ones, by what `_TakePart` asks for."""
    rule = UPDATE_RULES[update_rule]
    if slots.keys.shape[2] <= window_size:
        return None, slots.memory, query, slots
    if not explicit and query.shape[2] > 1:
        kernel = find_kernel(update_rule, map_queries, map_keys, query, slots.values)
        if kernel is not None:
            options = {"takes_mask": kernel.takes_mask, "divides": kernel.divides}
            rule = rule._replace(chunked=kernel.chunked, step=kernel.chunked, **options)
            map_queries, map_keys = kernel.map_queries, kernel.map_keys
    if not is_causal:
        far = _far_both_ways(*map_queries(query), slots, window_size, rule, map_keys, explicit)
        return far, None, query, slots
    return _far_behind(query, slots, window_size, rule, map_queries, map_keys, explicit, hands_on)


def _far_behind(
    query: torch.Tensor,
    slots: Slots,
    window_size: int,
    rule: UpdateRule,
    map_queries: Callable,
    map_keys: Callable,
    explicit: bool,
    hands_on: bool,
) -> tuple[FarReadout | None, KernelMemory | None, torch.Tensor, Slots]:
    """For decoders: a memory of everything before the window."""
    num_slots, length, num_sinks = slots.keys.shape[2], query.shape[2], slots.sink_keys.shape[2]
    start, end = 0, num_slots - window_size
    absorbed = end if slots.num_absorbed is None else slots.num_absorbed
    if isinstance(slots.first_real, int):
        # Sinks never enter the memory. Without padding they are the same slots in every row, and a slice leaves them out.
        start = min(max(slots.first_real + num_sinks, 0), end)
    if start == end:
        return None, slots.memory, query, slots
    reads_from = absorbed if start < absorbed < end else start
    count = end - reads_from

    # The query in slot i reads up to slot i - window_size: the last queries pair up with the last of these tokens.
    early, skip = max(length - count, 0), max(count - length, 0)
    readers, query = _take_part(query, early, length, hands_on)
    keys, rest_of_keys = _take_part(slots.keys, start, end, hands_on)
    values, rest_of_values = _take_part(slots.values, start, end, hands_on)
    gates = {name: _take_part(gate, start, end, False)[0] for name, gate in slots.gates.items()}
    slots = slots._replace(keys=rest_of_keys, values=rest_of_values)

    query_features, log_scale = map_queries(readers)
    tokens = _far_tokens({"key": map_keys(keys), "value": values, **gates}, slots, start, rule.takes_mask)
    memory = slots.memory
    if reads_from > start:
        # Tokens that may still be rolled back are read through a memory that is thrown away.
        first = {name: tensor[:, :, : reads_from - start] for name, tensor in tokens.items()}
        memory = rule.chunked(first["key"], **first, memory=memory).memory
        tokens = {name: tensor[:, :, reads_from - start :] for name, tensor in tokens.items()}
    paired = pad_zeros(query_features, (0, 0, skip, 0))
    form = rule.reference if explicit else rule.step if count == 1 and memory is not None else rule.chunked
    options = {"divides": True} if rule.divides else {}
    read = form(paired, **tokens, memory=memory, **options)
    num_readers = length - early
    far = FarReadout(
        read.numerator[:, :, skip:],
        None if read.denominator is None else read.denominator[:, :, skip:],
        log_scale,
        None
        if _all_have_older(slots, num_readers, window_size, num_sinks + 1)
        else _num_older(slots, num_readers, window_size) <= num_sinks,
        pad_zeros(read.weights[:, :, skip:], (reads_from, num_slots - end)) if explicit else None,
        rule.divides,
    )
    return far, read.memory if absorbed >= end else memory, query, slots


def _take_part(tensor: torch.Tensor, start: int, end: int, hands_on: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots start ... end, and the tensor to go on with."""
    if hands_on:
        return _TakePart.apply(tensor, start, end)
    if end - start == tensor.shape[2]:
        return tensor, tensor
    # `split`, because its gradient writes what it fills with zeros once, and that of a slice twice.
    return tensor.split([start, end - start, tensor.shape[2] - end], 2)[1], tensor


class _TakePart(torch.autograd.Function):
    """Slots start ... end, and the tensor itself, to be used from then on. The gradient of the former is added to that of the latter
    in place, where autograd would make two more as large as the tensor: nobody else may hold it, so all that goes into it
    has to come from an operation that makes its gradients anew."""

    @staticmethod
    def forward(ctx, tensor, start, end):
        ctx.start, ctx.end, ctx.shape = start, end, tensor.shape
        ctx.set_materialize_grads(False)
        return tensor[:, :, start:end], tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_part, grad):
        if grad is None and grad_part is not None:
            grad = grad_part.new_zeros(ctx.shape)
        if grad_part is not None:
            grad[:, :, ctx.start : ctx.end] += grad_part
        return grad, None, None


def _far_both_ways(
    query_features: torch.Tensor,
    log_scale: torch.Tensor | None,
    slots: Slots,
    window_size: int,
    rule: UpdateRule,
    map_keys: Callable,
    explicit: bool,
) -> FarReadout:
    """For encoders: a memory of everything before the window plus one, read backwards, of everything behind it."""
    form = rule.reference if explicit else rule.chunked
    num_slots = slots.keys.shape[2]
    num_sinks = slots.sink_keys.shape[2]
    numerator = denominator = weights = 0
    # Without a window the forward memory holds the query's own token; the backward one must not count it again.
    for shift, flip in ((window_size, False), (max(window_size, 1), True)):
        count = num_slots - shift
        if count <= 0:
            continue
        start, end = (shift, num_slots) if flip else (0, count)
        parts = {"value": slots.values, **slots.gates}
        parts = {name: _take_part(tensor, start, end, False)[0] for name, tensor in parts.items()}
        key = map_keys(_take_part(slots.keys, start, end, False)[0])
        tokens = _far_tokens({"key": key, **parts}, slots, start, rule.takes_mask)
        queries = query_features[:, :, :count] if flip else query_features[:, :, shift:]
        if flip:
            queries, tokens = queries.flip(2), {name: tensor.flip(2) for name, tensor in tokens.items()}
        read = form(queries, **tokens)
        around = (0, shift) if flip else (shift, 0)
        back = (lambda tensor, *axes: tensor.flip(axes)) if flip else (lambda tensor, *axes: tensor)
        numerator = numerator + F.pad(back(read.numerator, 2), (0, 0, *around))
        if read.denominator is not None:
            denominator = denominator + F.pad(back(read.denominator, 2), around)
        if explicit:
            weights = weights + F.pad(back(read.weights, 2, 3), (*around[::-1], *around))

    older = _num_older(slots, num_slots, window_size)
    index = torch.arange(num_slots, device=query_features.device)
    num_foldable = num_slots - _column(slots.first_real) - num_sinks
    newer = torch.minimum(num_slots - max(window_size, 1) - index, torch.as_tensor(num_foldable))
    empty = (older <= num_sinks) & (newer <= 0)
    return FarReadout(
        numerator,
        denominator if isinstance(denominator, torch.Tensor) else None,
        log_scale,
        empty,
        weights if explicit else None,
    )


def _far_tokens(tokens: dict[str, torch.Tensor], slots: Slots, start: int, takes_mask: bool) -> dict[str, torch.Tensor]:
    """Features of keys, values and gates of the slots from `start` on, as arguments of a rule: padding and sinks become tokens that
    leave the memory as it is."""
    first = slots.first_real + slots.sink_keys.shape[2]
    if isinstance(first, int) and first <= start:
        return tokens
    if isinstance(slots.first_filled, torch.Tensor):
        first = torch.maximum(first, slots.first_filled)
    key = tokens["key"]
    index = torch.arange(start, start + key.shape[2], device=key.device)
    enters = (index >= _column(first)).expand(1 if isinstance(first, int) else len(first), 1, -1)
    if takes_mask:
        tokens = tokens | {"key_mask": enters}
    elif "write_strength" not in tokens:
        tokens = tokens | {"key": key * enters[..., None]}
    return tokens | {name: tokens[name] * enters for name in slots.gates}


def _num_older(slots: Slots, length: int, window_size: int) -> torch.Tensor:
    """How many real tokens, sinks included, lie behind each query's window: (length,), or (batch, 1, length)."""
    num_slots = slots.keys.shape[2]
    index = torch.arange(num_slots - length, num_slots, device=slots.keys.device)
    return index - window_size - _column(slots.first_real) + 1


def _all_have_older(slots: Slots, length: int, window_size: int, count: int) -> bool:
    """Whether `count` tokens or more lie behind every query's window, as far as that is known without looking."""
    first_query = slots.keys.shape[2] - length
    return isinstance(slots.first_real, int) and first_query - window_size - slots.first_real + 1 >= count


def _column(first_real: int | torch.Tensor) -> int | torch.Tensor:
    return first_real.view(-1, 1, 1) if isinstance(first_real, torch.Tensor) else first_real


def _positive(denominator: torch.Tensor) -> torch.Tensor:
    return denominator.clamp(min=1e-30)
