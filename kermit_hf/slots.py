"""Slots: the columns of tokens, (batch, kv_heads, slots, ...), that near and far field read.

The queries are the last `length` of them.
"""

from typing import NamedTuple

import torch

from .functions import first_derivative_only
from .kernel_attention import KernelMemory


class Slots(NamedTuple):
    """What attention over `slots` columns of tokens reads.

    keys (without positions), values: (batch, kv_heads, slots, head_dim); gates: "log_forget" and "write_strength",
    (batch, kv_heads, slots), those that the model has. first_real: slot of each row's first real token, an int or
    (batch,), negative where it has left. sink_keys, sink_values: (batch, kv_heads, num_sink_tokens, head_dim). memory:
    of the tokens before the first slot, None if there are none. first_filled: slot of each row's first token that is
    still here, an int or (batch,); padding in the middle of a row leaves free slots before it. num_absorbed: how many
    slots, from the first on, the memory may keep for good; None is all that leave the window. sink_slots: (batch,
    num_sink_tokens), which of the slots the sinks are; None where they may be elsewhere.
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
    sink_slots: torch.Tensor | None = None


def slots_of_text(
    keys: torch.Tensor,
    values: torch.Tensor,
    gates: dict[str, torch.Tensor],
    first_real: int | torch.Tensor,
    num_sinks: int,
) -> Slots:
    """A text without a past. Its sinks are the first real tokens of each row; short rows repeat their last one, which no query
    sees."""
    index = torch.arange(num_sinks, device=keys.device)
    index = index + (first_real[:, None] if isinstance(first_real, torch.Tensor) else first_real)
    index = index.clamp(max=keys.shape[2] - 1).expand(keys.shape[0], num_sinks)
    sinks = take_slots(keys, index, dim=2), take_slots(values, index, dim=2)
    return Slots(keys, values, gates, first_real, *sinks, sink_slots=index)


def with_sinks_taken(slots: Slots) -> Slots:
    """The same with its sinks taken from its tokens by `TakePart`, if they are among them."""
    if slots.sink_slots is None:
        return slots
    sink_keys, keys = TakePart.apply(slots.keys, slots.sink_slots)
    sink_values, values = TakePart.apply(slots.values, slots.sink_slots)
    return slots._replace(keys=keys, values=values, sink_keys=sink_keys, sink_values=sink_values)


class TakePart(torch.autograd.Function):
    """Some slots of a tensor (batch, heads, slots, ...), a slice or such as `take_slots` takes, and the tensor itself, to be used
    from then on. The gradient of the former is added to that of the latter in place, where autograd would make two more as
    large as the tensor: nobody else may hold it, so all that goes into it has to come from an operation that makes its
    gradients anew."""

    @staticmethod
    def forward(ctx, tensor, slots):
        ctx.shape, ctx.slice = tensor.shape, slots if isinstance(slots, slice) else None
        ctx.set_materialize_grads(False)
        if ctx.slice is None:
            ctx.save_for_backward(slots)
        part = take_slots(tensor, slots, dim=2) if ctx.slice is None else tensor[:, :, slots]
        return part, tensor.view_as(tensor)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_part, grad):
        if grad is None and grad_part is not None:
            grad = grad_part.new_zeros(ctx.shape)
        if grad_part is None:
            return grad, None
        if ctx.slice is None:
            (slots,) = ctx.saved_tensors
            grad.scatter_add_(2, _index_of(ctx.shape, slots, dim=2), grad_part)
        else:
            grad[:, :, ctx.slice] += grad_part
        return grad, None


class Parts(NamedTuple):
    """Which slots a kernel takes of queries, and of keys and values. Like `TakePart` it gives back all three tensors as a whole, to be
    used from then on, and adds its gradients to theirs in place, asking for the same; expanded ones it refuses."""

    readers: slice
    tokens: slice

    def of(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return query[:, :, self.readers], key[:, :, self.tokens], value[:, :, self.tokens]


def gradients_so_far(
    grads: tuple[torch.Tensor | None, ...], shapes: list[torch.Size], like: torch.Tensor
) -> list[torch.Tensor]:
    """Of tensors of these shapes, zeros where there are none."""
    return [like.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, shapes, strict=True)]


def take_slots(tensor: torch.Tensor, slots: torch.Tensor, dim: int) -> torch.Tensor:
    """Selects, for each row of the batch (axis 0), the entries `slots` (batch, count) of axis `dim`."""
    return tensor.gather(dim, _index_of(tensor.shape, slots, dim))


def _index_of(shape: torch.Size, slots: torch.Tensor, dim: int) -> torch.Tensor:
    """The entries `slots` (batch, count) of axis `dim` of a tensor of this shape, as `gather` and `scatter` want them."""
    ones = [1] * len(shape)
    ones[0], ones[dim] = slots.shape
    return slots.view(ones).expand(*shape[:dim], slots.shape[1], *shape[dim + 1 :])


def num_older(slots: Slots, length: int, window_size: int) -> torch.Tensor:
    """How many real tokens, sinks included, lie behind each query's window: (length,), or (batch, 1, length)."""
    num_slots = slots.keys.shape[2]
    index = torch.arange(num_slots - length, num_slots, device=slots.keys.device)
    return index - window_size - column(slots.first_real) + 1


def all_have_older(slots: Slots, length: int, window_size: int, count: int) -> bool:
    """Whether `count` tokens or more lie behind every query's window, as far as that is known without looking."""
    first_query = slots.keys.shape[2] - length
    return isinstance(slots.first_real, int) and first_query - window_size - slots.first_real + 1 >= count


def column(first_real: int | torch.Tensor) -> int | torch.Tensor:
    """Slots of each row, an int or (batch,), as they broadcast against (batch, kv_heads, slots)."""
    return first_real.view(-1, 1, 1) if isinstance(first_real, torch.Tensor) else first_real
