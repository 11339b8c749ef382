"""The cache of causal Nyström attention: sinks, near segments, open segment, and a landmark for each complete segment.

`DynamicCache(config=...)` and `StaticCache(config=..., max_cache_len=...)` build these layers by their layer type, so stock
`generate()` does. Every row counts its own real tokens, padding left out, and slots are counted from a border of its
segments: rows whose segments end at different steps therefore share one layout. Keys hold their positions.
"""

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from .causal_nystrom_attention import Context, Landmarks, append, has_values, overwrite, take_slots


LAYER_TYPE = "causal_nystrom_attention"

# Everything but the counts. `keys` and `values` begin a fixed number of tokens before the open segment, `queries` with it,
# and the history with the first token; behind the last one it has room.
TOKENS = ("keys", "values", "queries")
HISTORY = ("history_keys", "history_values")
STATE = (*TOKENS, "sink_keys", "sink_values", "landmark_keys", "landmark_values", *HISTORY)
COUNTS = ("num_tokens", "num_confirmed", "num_complete")

# Tokens that a history which had to grow has room for at least.
LEAST_ROOM = 64


class NystromformerHFDecoderCacheLayer(CacheLayerMixin):
    """Grows by one landmark a segment, and by every key and value only where the inverse has a finite regularisation.

    `update` appends tokens and sets `self.context`, which attention reads; `store` then takes its landmarks. Counts are
    ints until a row is padded, then (batch,): num_tokens, real ones so far; num_confirmed, those that `crop` will not
    take back; num_complete, segments in front of `queries`. What stands behind a row's count is void, so `crop` only
    has to count back.
    """

    _layer_type = LAYER_TYPE
    is_compileable = False
    is_croppable = True
    is_sliding = False
    # Its shapes follow from the first update, not from a number of heads alone.
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        for name in STATE:
            setattr(self, name, None)
        for name in COUNTS:
            setattr(self, name, 0)
        self.recorded: torch.Tensor | None = None
        self.context: Context | None = None
        self.settings: dict[str, int | bool | None] = {}
        self.cumulative_length = 0
        self.unconfirmed = 0
        self.padded_until = 0
        self.record_past = False
        self.is_offloaded = False

    # Reading and writing.

    def bind(self, **settings: int | bool | None) -> None:
        """Tells the layer the settings of the model that is about to read it; `ValueError` if it was filled under others."""
        for name, value in settings.items():
            if self.is_initialized and self.settings[name] != value:
                raise ValueError(
                    f"past_key_values: filled by a model with {name}={self.settings[name]!r}, but this model has "
                    f"{name}={value!r}; pass the cache of this model, or None"
                )
        self.settings = settings

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        query_states: torch.Tensor,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens, (batch, heads, seq, head_dim) each, keys and queries with positions; returns keys and values of all slots.

        `real`, (batch, seq): which columns of the input hold real tokens, of which the rows here have as many in front. Raises
        `ValueError` for states of another model or batch size.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._initialize(key_states, value_states, query_states)
        self._check(key_states, value_states, query_states)
        if real is not None:
            self._count_rows()
        length, sinks = key_states.shape[2], self.settings["num_sink_tokens"]
        start = self.num_tokens - sinks
        first = self.num_complete * self.settings["segment_size"] - self._behind
        filled = start - first
        slots = self.keys.shape[2]
        keys = append(self.keys, key_states, filled)
        history, rows = (None, None), None
        if self.settings["regularized"]:
            history = (
                self._extend_history("history_keys", key_states),
                self._extend_history("history_values", value_states),
            )
        queries = append(self.queries, query_states, filled - self._behind)
        differ = isinstance(filled, torch.Tensor) and has_values(filled)
        if self.settings["regularized"] and not self.is_compileable and differ:
            # Rows differ: without this every step would read all keys for landmarks that no row, or only some rows, need yet.
            open_tokens = filled - self._behind + length
            queries = queries[:, :, : max(int(open_tokens.max()), 0)]
            rows = (open_tokens >= self.settings["segment_size"]).nonzero().squeeze(1)
        self.context = Context(
            keys=keys,
            values=append(self.values, value_states, filled),
            first=first,
            start=start,
            first_query_slot=(filled, filled) if isinstance(filled, int) else (self._behind - sinks, slots),
            num_sink_tokens=sinks,
            sink_keys=append(self.sink_keys, key_states[:, :, :sinks], self.num_tokens, sinks),
            sink_values=append(self.sink_values, value_states[:, :, :sinks], self.num_tokens, sinks),
            landmarks=Landmarks(self.landmark_keys.to(keys.device), self.landmark_values.to(keys.device)),
            num_complete=self.num_complete,
            open_queries=queries,
            open_slot=min(self._behind, keys.shape[2]),
            history_keys=history[0],
            history_values=history[1],
            history_rows=rows,
        )
        self._count(length, real)
        return self.context.keys, self.context.values

    def store(self, landmarks: Landmarks) -> None:
        """Keeps the landmarks that attention made of `context`, and the tokens that are still needed one by one."""
        context, self.context = self.context, None
        size, sinks = self.settings["segment_size"], self.settings["num_sink_tokens"]
        complete = _at_least_zero(self.num_confirmed - sinks) // size
        shift = (complete - context.num_complete) * size
        most = self._behind + size - 1 + self.unconfirmed
        state = {
            "keys": _drop(context.keys, shift, most),
            "values": _drop(context.values, shift, most),
            "queries": _drop(context.open_queries, shift, most - self._behind),
            "sink_keys": context.sink_keys,
            "sink_values": context.sink_values,
            "landmark_keys": landmarks.keys,
            "landmark_values": landmarks.values,
        }
        self._write(state, complete)
        if self.is_offloaded:
            self.offload()

    # What generate() asks of a layer.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From now on tokens stay until `crop` confirms them, so that it can take them back."""
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
        if count:
            removed = count
            if self.recorded is not None:
                removed = self.recorded[:, -count:].sum(-1) + max(count - self.recorded.shape[1], 0)
            gone = self.num_complete * self.settings["segment_size"]
            missing = gone + (gone > 0) * self.settings["num_sink_tokens"] - (self.num_tokens - removed)
            if count > self.cumulative_length - self.padded_until or bool(torch.as_tensor(missing > 0).any()):
                raise RuntimeError(
                    f"crop({tokens_to_remove}): some of the last {count} tokens are part of a landmark, or padding. Call "
                    "`activate_past_recording()` before the tokens that may be rolled back."
                )
            self.num_tokens = self.num_tokens - removed
            self.cumulative_length -= count
        self.num_confirmed = self.num_tokens
        self.unconfirmed, self.recorded = 0, None

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
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))
        self.is_offloaded = True

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))
        self.is_offloaded = False

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the layer: what has to be moved, reordered or counted."""
        return list(self._named_tensors().values())

    # Helpers.

    @property
    def _behind(self) -> int:
        """Tokens in front of the open segment that `keys` and `values` hold: the near segments, and what the convolution reads."""
        size, taps = self.settings["segment_size"], self.settings["conv_kernel_size"]
        return max(self.settings["near_segments"], -(-((taps or 1) - 1) // size)) * size

    def _initialize(self, key_states: torch.Tensor, value_states: torch.Tensor, query_states: torch.Tensor) -> None:
        states = {"keys": key_states, "values": value_states, "queries": query_states}
        for name, count in self._capacity().items():
            source = states["keys" if name.endswith("keys") else "queries" if name == "queries" else "values"]
            heads = query_states.shape[1] if name == "landmark_values" else source.shape[1]
            setattr(self, name, source.new_zeros(source.shape[0], heads, count, source.shape[3]))

    def _capacity(self) -> dict[str, int]:
        """Places along axis 2 at the start. The zeros in front of the first token are what the convolution reads there."""
        capacity = dict.fromkeys(STATE, 0) | {"keys": self._behind, "values": self._behind}
        if not self.settings["regularized"]:
            for name in HISTORY:
                del capacity[name]
        return capacity

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor, query_states: torch.Tensor) -> None:
        for name, new in (("keys", key_states), ("values", value_states), ("queries", query_states)):
            past = getattr(self, name)
            if (*past.shape[:2], past.shape[3]) != (*new.shape[:2], new.shape[3]):
                raise ValueError(
                    f"past_key_values: cached {name} have (batch, heads, head_dim) = "
                    f"{(*past.shape[:2], past.shape[3])}, but this model and batch need "
                    f"{(*new.shape[:2], new.shape[3])}; pass the cache of this model and batch, or None"
                )

    def _extend_history(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Writes `new` behind the tokens so far, of which it returns those behind the sinks.

        In place, in a buffer that is enlarged by an eighth when it is full, so that a token costs the same whatever is there
        already; in a new tensor where gradients are recorded, for they need the old one as it was.
        """
        past, used = getattr(self, name).to(new.device), self.cumulative_length
        end = used + new.shape[2]
        if torch.is_grad_enabled():
            past = append(past, new, self.num_tokens)[:, :, :end]
        else:
            foreign = past.requires_grad
            if not torch.compiler.is_compiling():
                foreign = foreign or (past.is_inference() and not torch.is_inference_mode_enabled())
            if past.shape[2] < end or foreign:
                enlarged = new.new_zeros(*new.shape[:2], end + max(end // 8, LEAST_ROOM), new.shape[3])
                enlarged[:, :, :used] = past[:, :, :used]
                past = enlarged
            overwrite(past, new, self.num_tokens)
        setattr(self, name, past)
        return past[:, :, self.settings["num_sink_tokens"] : end]

    def _count_rows(self) -> None:
        """Rows count their own tokens as soon as one of them is padded; before that one number serves all."""
        for name in COUNTS:
            count = getattr(self, name)
            if isinstance(count, int):
                setattr(self, name, torch.full((self.batch_size,), count, device=self.device))

    def _count(self, length: int, real: torch.Tensor | None) -> None:
        if self.record_past and isinstance(self.num_tokens, torch.Tensor):
            recorded = (
                self.recorded,
                self.num_tokens.new_ones(self.batch_size, length) if real is None else real.long(),
            )
            self.recorded = torch.cat([columns for columns in recorded if columns is not None], 1)
        self.num_tokens = self.num_tokens + (length if real is None else real.sum(-1))
        self.cumulative_length += length
        self.unconfirmed = self.unconfirmed + length if self.record_past else 0
        if not self.record_past:
            self.num_confirmed = self.num_tokens
            if real is not None:
                # A row may have its padding anywhere in these columns.
                self.padded_until = self.cumulative_length

    def _write(self, state: dict[str, torch.Tensor], complete: int | torch.Tensor) -> None:
        behind_sinks = max(self.cumulative_length - self.settings["num_sink_tokens"], 0)
        num_landmarks = complete if isinstance(complete, int) else behind_sinks // self.settings["segment_size"]
        for name, tensor in state.items():
            tensor = tensor[:, :, : num_landmarks if name.startswith("landmark") else None]
            # A slice would keep the whole sequence it was cut from in memory; a compiled graph does not know whether it is one.
            size = tensor.numel() * tensor.element_size()
            whole = not torch.compiler.is_compiling() and tensor.untyped_storage().nbytes() == size
            setattr(self, name, tensor if whole else tensor.clone(memory_format=torch.contiguous_format))
        self.num_complete = complete

    def _named_tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in (*STATE, *COUNTS, "recorded")}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    def _apply(self, transform) -> None:
        if not self.is_initialized:
            return
        for name, tensor in self._named_tensors().items():
            setattr(self, name, transform(tensor))
        self.batch_size = self.keys.shape[0]


class NystromformerHFDecoderStaticCacheLayer(NystromformerHFDecoderCacheLayer):
    """The same contents in buffers of fixed size and address, for `torch.compile`; it does not roll back.

    Every step forms the landmark of the open segment anew; rows in which it is not complete overwrite it later.
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

    def activate_past_recording(self) -> None:
        raise ValueError("a static cache cannot be rolled back; use the default dynamic cache for assisted generation")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(f"crop({tokens_to_remove}): a static cache cannot be rolled back; use a dynamic cache")

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()
        self.cumulative_length.zero_()

    def _capacity(self) -> dict[str, int]:
        size, sinks = self.settings["segment_size"], self.settings["num_sink_tokens"]
        tokens = max(self.max_cache_len - sinks, 0)
        return {
            **super()._capacity(),
            "keys": self._behind + size - 1,
            "values": self._behind + size - 1,
            "queries": size - 1,
            "sink_keys": sinks,
            "sink_values": sinks,
            "landmark_keys": tokens // size,
            "landmark_values": tokens // size,
            **(dict.fromkeys(HISTORY, self.max_cache_len) if self.settings["regularized"] else {}),
        }

    def _initialize(self, key_states, value_states, query_states):
        super()._initialize(key_states, value_states, query_states)
        self._count_rows()
        self.cumulative_length = self.cumulative_length.to(self.device)
        # Without a fixed address CUDA graphs cannot replay a step; while tracing there is nothing to mark.
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def _extend_history(self, name, new):
        buffer = getattr(self, name)
        overwrite(buffer, new, self.num_tokens)
        return buffer[:, :, self.settings["num_sink_tokens"] :]

    def _count(self, length, real):
        self.num_tokens.add_(length if real is None else real.sum(-1))
        self.num_confirmed.copy_(self.num_tokens)
        self.cumulative_length.add_(length)

    def _write(self, state, complete):
        for name, tensor in state.items():
            buffer = getattr(self, name)
            buffer.copy_(tensor[:, :, : buffer.shape[2]])
        self.num_complete.copy_(complete)


cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = NystromformerHFDecoderStaticCacheLayer


def _at_least_zero(count: int | torch.Tensor) -> int | torch.Tensor:
    return count.clamp(min=0) if isinstance(count, torch.Tensor) else max(count, 0)


def _drop(tensor: torch.Tensor, count: int | torch.Tensor, most: int) -> torch.Tensor:
    """Without the first `count` slots of axis 2, and at most `most` slots where rows differ."""
    if isinstance(count, int):
        return tensor[:, :, count:]
    slots = count[:, None] + torch.arange(min(most, tensor.shape[2]), device=tensor.device)
    return take_slots(tensor, slots.clamp(max=tensor.shape[2] - 1), dim=2)
