"""Slots: the columns of tokens, (batch, kv_heads, slots, ...), that near and far field read.

The queries are the last `length` of them.
"""

from typing import NamedTuple

import torch

from .kernel_attention import KernelMemory


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
