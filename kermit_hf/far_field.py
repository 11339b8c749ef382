"""Far field: what queries read from the kernel memory of the tokens behind their window, as functions on tensors.

With W = `window_size`, the query in slot i reads slot i - W and before, and no sinks. The far field is therefore ordinary
causal kernel attention with the queries shifted by W.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import Kernel, find_kernel, find_step_kernel
from .functions import apply_function
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
from .slots import Parts, Slots, TakePart, all_have_older, column, num_older
from .window_attention import FarField, pad_zeros


class UpdateRule(NamedTuple):
    """The three forms of one rule, see `kernel_attention`; takes_mask, divides, of_parts: see `backends.Kernel`."""

    reference: Callable[..., KernelReadout]
    chunked: Callable[..., KernelReadout]
    step: Callable[..., KernelReadout]
    takes_mask: bool = False
    divides: bool = False
    of_parts: Callable | None = None


UPDATE_RULES = {
    "additive": UpdateRule(additive_reference, additive_chunked, additive_step),
    "delta": UpdateRule(delta_reference, delta_chunked, delta_step),
}


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


def read_far_field(
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
    with `hands_on` have to be used from now on instead of the given ones, by what `TakePart` asks for."""
    rule = UPDATE_RULES[update_rule]
    if slots.keys.shape[2] <= window_size:
        return None, slots.memory, query, slots
    kernel = None if explicit else _find_kernel(update_rule, map_queries, map_keys, query, slots)
    if kernel is not None:
        options = {"takes_mask": kernel.takes_mask, "divides": kernel.divides, "of_parts": kernel.of_parts}
        rule = rule._replace(chunked=kernel.chunked, step=kernel.step or kernel.chunked, **options)
        map_queries, map_keys = kernel.map_queries, kernel.map_keys
    if not is_causal:
        far = _far_both_ways(*map_queries(query), slots, window_size, rule, map_keys, explicit)
        return far, None, query, slots
    return _far_behind(query, slots, window_size, rule, map_queries, map_keys, explicit, hands_on)


def _find_kernel(
    update_rule: str, map_queries: Callable, map_keys: Callable, query: torch.Tensor, slots: Slots
) -> Kernel | None:
    if query.shape[2] == 1 and slots.memory is None:
        return None
    arguments = update_rule, map_queries, map_keys, query, slots.values
    if query.shape[2] == 1:
        return find_step_kernel(*arguments)
    return find_kernel(*arguments, is_gated="log_forget" in slots.gates)


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
        start = max(slots.first_real + num_sinks, 0)
    if start >= end:
        return None, slots.memory, query, slots
    reads_from = absorbed if start < absorbed < end else start
    count = end - reads_from

    # The query in slot i reads up to slot i - window_size: the last queries pair up with the last of these tokens.
    early, skip = max(length - count, 0), max(count - length, 0)
    gates = {name: _take_part(gate, start, end, False)[0] for name, gate in slots.gates.items()}
    options = {"divides": True} if rule.divides else {}
    memory, log_scale = slots.memory, None
    # Not where queries are padded, nor where tokens are read through a memory that is thrown away.
    if hands_on and rule.of_parts is not None and skip == 0 and reads_from == start:
        parts = Parts(slice(early, length), slice(start, end))
        read, query, slots = _read_parts(query, slots, parts, gates, rule, options)
    else:
        readers, query = _take_part(query, early, length, hands_on)
        keys, rest_of_keys = _take_part(slots.keys, start, end, hands_on)
        values, rest_of_values = _take_part(slots.values, start, end, hands_on)
        slots = slots._replace(keys=rest_of_keys, values=rest_of_values)

        query_features, log_scale = map_queries(readers)
        tokens = _far_tokens({"key": map_keys(keys), "value": values, **gates}, slots, start, rule.takes_mask)
        if reads_from > start:
            # Tokens that may still be rolled back are read through a memory that is thrown away.
            first = {name: tensor[:, :, : reads_from - start] for name, tensor in tokens.items()}
            memory = rule.chunked(first["key"], **first, memory=memory).memory
            tokens = {name: tensor[:, :, reads_from - start :] for name, tensor in tokens.items()}
        paired = pad_zeros(query_features, (0, 0, skip, 0))
        form = rule.reference if explicit else rule.step if count == 1 and memory is not None else rule.chunked
        read = form(paired, **tokens, memory=memory, **options)
    num_readers = length - early
    far = FarReadout(
        read.numerator[:, :, skip:],
        None if read.denominator is None else read.denominator[:, :, skip:],
        log_scale,
        None
        if all_have_older(slots, num_readers, window_size, num_sinks + 1)
        else num_older(slots, num_readers, window_size) <= num_sinks,
        pad_zeros(read.weights[:, :, skip:], (reads_from, num_slots - end)) if explicit else None,
        rule.divides,
    )
    return far, read.memory if absorbed >= end else memory, query, slots


def _read_parts(
    query: torch.Tensor,
    slots: Slots,
    parts: Parts,
    gates: dict[str, torch.Tensor],
    rule: UpdateRule,
    options: dict[str, bool],
) -> tuple[KernelReadout, torch.Tensor, Slots]:
    """By a kernel that takes the parts itself. Also queries and slots to go on with."""
    key = slots.keys[:, :, parts.tokens]
    marks = _far_tokens({"key": key, **gates}, slots, parts.tokens.start, rule.takes_mask)
    if marks.pop("key") is not key:
        raise AssertionError("a kernel of parts has to take a mask or write strengths: it does not see changed keys")
    states = query, slots.keys, slots.values
    read, (query, keys, values) = rule.of_parts(*states, parts, **marks, memory=slots.memory, **options)
    return read, query, slots._replace(keys=keys, values=values)


def _take_part(tensor: torch.Tensor, start: int, end: int, hands_on: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots start ... end, and the tensor to go on with."""
    if hands_on:
        return TakePart.apply(tensor, slice(start, end))
    if end - start == tensor.shape[2]:
        return tensor, tensor
    # `split`, because its gradient writes what it fills with zeros once, and that of a slice twice.
    return tensor.split([start, end - start, tensor.shape[2] - end], 2)[1], tensor


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

    older = num_older(slots, num_slots, window_size)
    index = torch.arange(num_slots, device=query_features.device)
    num_foldable = num_slots - column(slots.first_real) - num_sinks
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
    enters = (index >= column(first)).expand(1 if isinstance(first, int) else len(first), 1, -1)
    if takes_mask:
        tokens = tokens | {"key_mask": enters}
    elif "write_strength" not in tokens:
        tokens = tokens | {"key": key * enters[..., None]}
    return tokens | {name: tokens[name] * enters for name in slots.gates}


def normalized_value(far: FarReadout, norm: Callable | None) -> torch.Tensor:
    """(batch, heads, readers, head_dim): the numerator divided by its denominator, for the delta rule normed by `norm`."""
    if far.denominator is None:
        return norm(far.numerator)
    if far.divided:
        return far.numerator
    return apply_function(_Divide, far.numerator, _positive(far.denominator)[..., None])


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


def normalized_weights(far: FarReadout) -> torch.Tensor:
    """(batch, heads, readers, slots), from the reference: divided by the denominators, for the delta rule as they are."""
    return far.weights if far.denominator is None else far.weights / _positive(far.denominator)[..., None]


def virtual_token(far: FarReadout, value: torch.Tensor, logit: torch.Tensor) -> FarField:
    """The far field as one token: its value, and the logit with which it enters the softmax."""
    if far.denominator is not None:
        logit = logit + _positive(far.denominator).log()
    if far.log_scale is not None:
        logit = logit + far.log_scale
    logit = logit.to(value.dtype)
    return FarField(value, logit if far.empty is None else logit.masked_fill(far.empty, float("-inf")))


def _positive(denominator: torch.Tensor) -> torch.Tensor:
    return denominator.clamp(min=1e-30)
