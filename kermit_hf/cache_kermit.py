"""The cache of a kernel attention layer: the last `window_size` tokens, the sink tokens, and one memory of constant size.

`DynamicCache(config=...)` and `StaticCache(config=..., max_cache_len=...)` build these layers by their layer type, so stock
`generate()` does. Keys are kept as they are before rotary position embedding: the window rotates them by their distance
to the query, the memory reads them without positions.
"""

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from .kernel_attention import KernelMemory
from .slots import Slots, take_slots


LAYER_TYPE = "kernel_attention"

# While recording, so many tokens can be taken back at most: without a bound a cache that is never cropped would grow.
MAX_ROLLBACK = 1024


class KermitCacheLayer(CacheLayerMixin):
    """Grows to `window_size` tokens and stays there.

    `update` appends tokens and sets `self.past`, the `Slots` that attention reads; `store` then takes the memory that
    attention made of the tokens that left the window. `activate_past_recording` makes the layer keep whatever `crop` may have to undo.
    """

    _layer_type = LAYER_TYPE
    is_compileable = False
    is_croppable = True
    is_sliding = False
    # Its shapes follow from the first update, not from a number of heads alone.
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.gates: dict[str, torch.Tensor] = {}
        self.sink_keys: torch.Tensor | None = None
        self.sink_values: torch.Tensor | None = None
        self.memory: KernelMemory | None = None
        self.conv_tail: torch.Tensor | None = None
        self.num_real: torch.Tensor | None = None
        self.num_filled: torch.Tensor | None = None
        self.past: Slots | None = None
        self.settings: dict[str, int | str | bool | None] = {}
        self.window_size = 0
        self.cumulative_length = 0
        self.unconfirmed = 0
        self.padded_until = 0
        self.record_past = False
        self.is_offloaded = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    # Reading and writing.

    def bind(self, **settings: int | str | bool | None) -> None:
        """Tells the layer the settings of the model that is about to read it; `ValueError` if it was filled under others."""
        for name, value in settings.items():
            if self.is_initialized and self.settings[name] != value:
                raise ValueError(
                    f"past_key_values: filled by a model with {name}={self.settings[name]!r}, but this model has "
                    f"{name}={value!r}; pass the cache of this model, or None"
                )
        self.settings = settings

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        window_size: int,
        num_sink_tokens: int,
        gates: dict[str, torch.Tensor] | None = None,
        num_pad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens, (batch, kv_heads, seq, head_dim), and returns the keys and values of all slots.

        `gates` holds the gates of each token by name, (batch, kv_heads, seq); `num_pad` (batch,) how many of the new tokens,
        always the first ones of a row, are padding. Raises `ValueError` for states of another model or batch size.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._initialize(key_states, value_states, gates or {}, window_size, num_sink_tokens)
        self._check(key_states, value_states)
        length = key_states.shape[2]
        new = {"keys": key_states, "values": value_states, **(gates or {})}
        past = {"keys": self.keys, "values": self.values, **self.gates}
        tokens = {name: _append(past[name], new[name], num_pad, dim=2) for name in new}
        keys, values = tokens.pop("keys"), tokens.pop("values")

        self._count(length, num_pad)
        slots = keys.shape[2]
        first_real = slots - (self.cumulative_length if self.num_real is None else self.num_real)
        first_filled = 0 if self.num_filled is None else slots - self.num_filled
        certain = self.keys.shape[2] - self.unconfirmed
        self.past = Slots(
            keys=keys,
            values=values,
            gates=tokens,
            first_real=first_real,
            sink_keys=_read_sinks(self.sink_keys, keys, first_real, first_filled),
            sink_values=_read_sinks(self.sink_values, values, first_real, first_filled),
            memory=self.memory,
            first_filled=first_filled,
            num_absorbed=max(certain - window_size, 0) if self.record_past else None,
        )
        self.unconfirmed = self._unconfirmed_after(length)
        return keys, values

    def store(self, memory: KernelMemory | None) -> None:
        """Keeps `memory`, which now holds also the first `past.num_absorbed` slots, and the slots behind them."""
        past, self.past = self.past, None
        tokens = {"keys": past.keys, "values": past.values, **past.gates}
        absorbed = past.num_absorbed
        if absorbed is None:
            absorbed = max(past.keys.shape[2] - self.window_size, 0)
        tokens = {name: tensor[:, :, absorbed:] for name, tensor in tokens.items()}
        self._write(tokens, (past.sink_keys, past.sink_values), memory)
        if self.is_offloaded:
            self.offload()

    def steady_state(self, batch: int, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor | None] | None:
        """What one more token reads, and `advance` takes, of a layer of these sizes after any long text: every row has its window full
        and all sinks behind it, and nothing may have to be rolled back. None in any other state."""
        if self.memory is None or self.record_past or self.is_offloaded or self.is_compileable:
            return None
        if self.keys.shape != (batch, kv_heads, self.window_size, head_dim):
            return None
        num_real, num_sinks = self.cumulative_length, self.sink_keys.shape[2]
        if self.num_real is not None:
            if int(self.num_filled.min()) < self.window_size:
                return None
            num_real = int(self.num_real.min())
        if num_real < self.window_size + num_sinks:
            return None
        return {
            "keys": self.keys,
            "values": self.values,
            "write_strength": None,
            "log_forget": None,
            **self.gates,
            "sink_keys": self.sink_keys,
            "sink_values": self.sink_values,
            "matrix": self.memory.matrix,
            "normalizer": self.memory.normalizer,
            "conv_tail": self.conv_tail,
        }

    def advance(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        matrix: torch.Tensor,
        normalizer: torch.Tensor | None,
        conv_tail: torch.Tensor | None,
        **gates: torch.Tensor | None,
    ) -> None:
        """Takes the `steady_state` of one token later."""
        self.keys, self.values, self.conv_tail = keys, values, conv_tail
        self.gates = {name: gates[name] for name in self.gates}
        self.memory = KernelMemory(matrix, normalizer)
        self.cumulative_length += 1
        if self.num_real is not None:
            self.num_real = self.num_real + 1

    def num_slots(self, length: int, window_size: int) -> int:
        """How many slots `length` new tokens will be read with."""
        return length + (self.keys.shape[2] if self.is_initialized else 0)

    def update_conv(self, states: torch.Tensor, kernel_size: int, num_pad: torch.Tensor | None = None) -> torch.Tensor:
        """Puts the last tokens before `states` (batch, seq, channels) in front of them, kernel_size - 1. The cache holds them as
        (batch, channels, tokens), and as many more as may still be rolled back."""
        batch, length, channels = states.shape
        if self.conv_tail is None:
            self.conv_tail = states.new_zeros(batch, channels, kernel_size - 1)
        if self.conv_tail.shape[:2] != (batch, channels):
            raise ValueError(
                f"past_key_values: the convolution state has shape {tuple(self.conv_tail.shape)}, but this model and batch "
                f"need {(batch, channels, kernel_size - 1)}; pass the cache of this model, or None"
            )
        full = _append(self.conv_tail.to(states.device).mT, states, num_pad, dim=1)
        # Called before `update`, which counts these tokens.
        kept = min(kernel_size - 1 + self._unconfirmed_after(length), full.shape[1])
        self._write_conv(full[:, full.shape[1] - kept :].mT)
        return full[:, full.shape[1] - length - kernel_size + 1 :]

    def _unconfirmed_after(self, length: int) -> int:
        return min(self.unconfirmed + length, MAX_ROLLBACK) if self.record_past else 0

    # What generate() asks of a layer.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From now on the last tokens, 1,024 at most, stay exact until `crop` confirms them, so that it can take them back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -`tokens_to_remove` tokens and confirms all others.

        Raises `ValueError` for a positive number and `RuntimeError` where tokens are gone that would be needed again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, of tokens to remove from the end")
        count = -tokens_to_remove
        if not self.is_initialized:
            return
        everything_is_here = self.keys.shape[2] == self.cumulative_length and self.conv_tail is None
        removable = self.cumulative_length - self.padded_until
        if not everything_is_here:
            removable = min(removable, self.unconfirmed)
        if count > removable:
            raise RuntimeError(
                f"crop({tokens_to_remove}): only the last {removable} tokens can be taken back, older ones are part of the "
                "memory or padding. Call `activate_past_recording()` before the tokens that may be rolled back."
            )
        if count:
            for name, tensor in self._tokens().items():
                self._set_token(name, tensor[:, :, : tensor.shape[2] - count])
            if self.conv_tail is not None:
                self.conv_tail = self.conv_tail[:, :, : self.conv_tail.shape[2] - count]
            self.cumulative_length -= count
            if self.num_real is not None:
                self.num_real, self.num_filled = self.num_real - count, self.num_filled - count
        self.unconfirmed = 0

    def reset(self) -> None:
        """Back to the state of a new layer."""
        self.__init__()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda tensor: tensor[indices.to(tensor.device) if isinstance(indices, torch.Tensor) else indices])

    def offload(self) -> None:
        # `update_conv` reads the tail before `Cache.update` has waited for the stream that prefetches: it stays where it is.
        conv_tail = self.conv_tail
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))
        self.conv_tail = conv_tail
        self.is_offloaded = True

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))
        self.is_offloaded = False

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the layer: what has to be moved, reordered or counted."""
        found = [*self._tokens().values(), self.sink_keys, self.sink_values, self.conv_tail]
        found += [self.num_real, self.num_filled]
        return [tensor for tensor in [*found, *(self.memory or ())] if tensor is not None]

    # Helpers.

    def _initialize(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        gates: dict[str, torch.Tensor],
        window_size: int,
        num_sink_tokens: int,
    ) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.window_size = window_size
        self.gates = {name: tensor[:, :, :0] for name, tensor in gates.items()}
        self.sink_keys = key_states.new_zeros(batch, heads, num_sink_tokens, head_dim)
        self.sink_values = value_states.new_zeros(batch, heads, num_sink_tokens, value_states.shape[-1])

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, past, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            if (*past.shape[:2], past.shape[3]) != (*new.shape[:2], new.shape[3]):
                raise ValueError(
                    f"past_key_values: cached {name} have (batch, heads, head_dim) = "
                    f"{(*past.shape[:2], past.shape[3])}, but this model and batch need "
                    f"{(*new.shape[:2], new.shape[3])}; pass the cache of this model and batch, or None"
                )

    def _count(self, length: int, num_pad: torch.Tensor | None) -> None:
        """Rows count their own tokens as soon as one of them was padded; before that one number serves all."""
        if num_pad is not None and self.num_real is None:
            self.num_real = torch.full((self.batch_size,), self.cumulative_length, device=self.device)
            self.num_filled = torch.full((self.batch_size,), self.keys.shape[2], device=self.device)
        if self.num_real is not None:
            num_new = length if num_pad is None else length - num_pad
            self.num_real, self.num_filled = self.num_real + num_new, self.num_filled + num_new
        if num_pad is not None:
            most = length if num_pad.is_meta else int(num_pad.max())
            self.padded_until = self.cumulative_length + most
        self.cumulative_length += length

    def _write(
        self, tokens: dict[str, torch.Tensor], sinks: tuple[torch.Tensor, torch.Tensor], memory: KernelMemory | None
    ) -> None:
        # Copies: a slice would keep the whole sequence it was cut from in memory.
        for name, tensor in tokens.items():
            self._set_token(name, tensor.clone(memory_format=torch.contiguous_format))
        self.sink_keys, self.sink_values = sinks
        self.memory = memory
        if self.num_filled is not None:
            self.num_filled = self.num_filled.clamp(max=self.keys.shape[2])

    def _write_conv(self, tail: torch.Tensor) -> None:
        self.conv_tail = tail.clone(memory_format=torch.contiguous_format)

    def _tokens(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "values": self.values, **self.gates} if self.is_initialized else {}

    def _set_token(self, name: str, tensor: torch.Tensor) -> None:
        if name in ("keys", "values"):
            setattr(self, name, tensor)
        else:
            self.gates[name] = tensor

    def _apply(self, transform) -> None:
        if not self.is_initialized:
            return
        for name, tensor in self._tokens().items():
            self._set_token(name, transform(tensor))
        self.sink_keys, self.sink_values = transform(self.sink_keys), transform(self.sink_values)
        for name in ("conv_tail", "num_real", "num_filled"):
            if getattr(self, name) is not None:
                setattr(self, name, transform(getattr(self, name)))
        if self.memory is not None:
            self.memory = KernelMemory(*(None if tensor is None else transform(tensor) for tensor in self.memory))
        self.batch_size = self.keys.shape[0]


class KermitStaticCacheLayer(KermitCacheLayer):
    """The same contents in buffers of fixed size and address, for `torch.compile`.

    It begins with `window_size` slots of padding, so every decoding step has the same shapes, and does not roll back.
    """

    _layer_type = None
    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int | torch.Tensor:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def num_slots(self, length: int, window_size: int) -> int:
        return length + window_size

    def activate_past_recording(self) -> None:
        raise ValueError("a static cache cannot be rolled back; use the default dynamic cache for assisted generation")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(f"crop({tokens_to_remove}): a static cache cannot be rolled back; use a dynamic cache")

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()
        self.cumulative_length.zero_()

    def _initialize(self, key_states, value_states, gates, window_size, num_sink_tokens):
        super()._initialize(key_states, value_states, gates, window_size, num_sink_tokens)
        for name, tensor in self._tokens().items():
            self._set_token(name, tensor.new_zeros(*tensor.shape[:2], window_size, *tensor.shape[3:]))
        self.num_real = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.num_filled = torch.zeros_like(self.num_real)
        self.cumulative_length = self.cumulative_length.to(self.device)
        _mark_static(*self.tensors(), self.cumulative_length)

    def _count(self, length, num_pad):
        num_new = length if num_pad is None else length - num_pad
        self.num_real.add_(num_new)
        self.num_filled.add_(num_new)
        self.cumulative_length.add_(length)

    def _write(self, tokens, sinks, memory):
        for name, buffer in self._tokens().items():
            buffer.copy_(tokens[name][:, :, tokens[name].shape[2] - buffer.shape[2] :])
        self.sink_keys.copy_(sinks[0])
        self.sink_values.copy_(sinks[1])
        self.num_filled.clamp_(max=self.keys.shape[2])
        if self.memory is None and memory is not None:
            self.memory = KernelMemory(*(None if tensor is None else tensor.clone() for tensor in memory))
            _mark_static(*(tensor for tensor in self.memory if tensor is not None))
        elif memory is not None:
            for buffer, tensor in zip(self.memory, memory, strict=True):
                if buffer is not None:
                    buffer.copy_(tensor)

    def _write_conv(self, tail):
        self.conv_tail.copy_(tail)


cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = KermitStaticCacheLayer


def _mark_static(*tensors: torch.Tensor) -> None:
    """Without a fixed address CUDA graphs cannot replay a step; while tracing there is nothing to mark."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def _append(past: torch.Tensor, new: torch.Tensor, num_pad: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Joins along `dim`; where a row of `new` begins with padding, its past moves up so that real tokens stay adjacent."""
    # The cache keeps the precision it began with, also when autocast begins or ends.
    past = past.to(new.device)
    new = new.to(past.dtype)
    joined = new if past.shape[dim] == 0 else torch.cat([past, new], dim)
    if num_pad is None or past.shape[dim] == 0:
        return joined
    slots = torch.arange(joined.shape[dim], device=joined.device)
    source = torch.where(slots < past.shape[dim] + num_pad[:, None], slots - num_pad[:, None], slots).clamp(min=0)
    return take_slots(joined, source, dim)


def _read_sinks(
    stored: torch.Tensor, tokens: torch.Tensor, first_real: int | torch.Tensor, first_filled: int | torch.Tensor
) -> torch.Tensor:
    """The first tokens of each row: from the slots while they are there, else as stored, zeros where yet to come."""
    count, slots = stored.shape[2], tokens.shape[2]
    if count == 0 or (isinstance(first_real, int) and first_real + count <= 0):
        return stored
    stored = stored.to(tokens.device)
    if isinstance(first_real, torch.Tensor):
        first_real, first_filled = first_real[:, None], first_filled[:, None]
    index = (torch.arange(count, device=tokens.device) + first_real).expand(tokens.shape[0], count)
    here = ((index >= first_filled) & (index < slots))[:, None, :, None]
    return torch.where(here, take_slots(tokens, index.clamp(0, slots - 1), dim=2), stored)
