"""The two attention layers of KERMIT as modules: softmax attention as in Llama, and kernel attention behind a window.

What they compute with a kernel memory is in `kermit_attention`, as functions on tensors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import maybe_autocast

from .backends import find_layer_step, layer_map_weights
from .configuration_kermit import KermitConfig
from .depthwise_conv import depthwise_conv
from .feature_maps import FEATURE_MAPS
from .kermit_attention import KermitAttentionOutput, kermit_attention
from .padding import Padding
from .slots import Slots, slots_of_text


class KermitSoftmaxAttention(nn.Module):
    """Llama's attention with the biases of Qwen2 and the query/key norms of Qwen3: `"full_attention"`,
    `"sliding_attention"`."""

    def __init__(self, config: KermitConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)
        if config.use_qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def split_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, seq, heads * head_dim) each, as (batch, heads, seq, head_dim) with queries and keys normed."""
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split_heads(
            self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.flatten(2).contiguous()), weights


class KermitKernelAttention(KermitSoftmaxAttention):
    """Exact attention to the window and the sink tokens, a kernel memory for everything older: `"kernel_attention"`.

    With the eager implementation the second output holds the effective weights (batch, heads, seq, tokens so far).
    Additive rule: they sum to one and, times the values, are the attention's output. Delta rule: the memory's share is
    signed and stands before the output norm. Tokens that a cache has absorbed have no weight of their own any more.
    """

    def __init__(self, config: KermitConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        feature_map = FEATURE_MAPS[config.feature_map]
        self.feature_map = feature_map(self.head_dim, config.feature_dim, heads, key_value_heads)
        self.feature_map.unit_norm = config.update_rule == "delta"
        if config.window_size > 0:
            # The far field's logit is linear in the query; zero weights and bias leave the kernel's own scale as it is.
            self.far_query = nn.Parameter(torch.empty(heads, self.head_dim))
            self.far_bias = nn.Parameter(torch.empty(heads))
        if config.update_rule == "delta":
            self.write_proj = nn.Linear(config.hidden_size, key_value_heads)
            self.far_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.forget_gate:
            self.forget_proj = nn.Linear(config.hidden_size, key_value_heads)
        if config.conv_kernel_size:
            channels = (heads + 2 * key_value_heads) * self.head_dim
            self.conv_weight = nn.Parameter(torch.empty(channels, 1, config.conv_kernel_size))

    def init_weights(self) -> None:
        if self.config.window_size > 0:
            init.zeros_(self.far_query)
            init.zeros_(self.far_bias)
        if self.config.forget_gate:
            # Heads start with half-lives from about 20 to 10,000 tokens, so that some of them remember far.
            forget = torch.logspace(-1.5, -4, self.forget_proj.out_features, dtype=torch.float32)
            init.copy_(self.forget_proj.bias, torch.logit(1 - forget))
        if self.config.conv_kernel_size:
            identity = torch.zeros_like(self.conv_weight, device="cpu")
            identity[:, :, -1 if self.config.is_causal else self.config.conv_kernel_size // 2] = 1.0
            init.copy_(self.conv_weight, identity)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: Padding | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        padding, length = attention_mask, hidden_states.shape[1]
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if length == 1 and cache is not None and padding is None and not past_key_values.offloading:
            output = self._step(hidden_states, position_embeddings, cache)
            if output is not None:
                return self.o_proj(output), None
        if padding is not None:
            hidden_states = padding.align(hidden_states)
        query, key, value = self.split_heads(*self._project(hidden_states, padding, cache))
        gates = self._gates(hidden_states)

        if cache is None:
            first_real = 0 if padding is None else padding.num_pad
            slots = slots_of_text(key, value, gates, first_real, self.config.num_sink_tokens)
        else:
            past_key_values.update(
                key,
                value,
                self.layer_idx,
                self.config.window_size,
                self.config.num_sink_tokens,
                gates,
                None if padding is None else padding.num_pad,
            )
            slots = cache.past

        explicit = self.config._attn_implementation == "eager"
        far_logit = self._far_logit(query)
        # Under autocast its matrix products would run in half precision; it casts where it needs to.
        with maybe_autocast(query.device.type, enabled=False):
            result = kermit_attention(
                query,
                slots,
                position_embeddings,
                self.config.window_size,
                self.config.update_rule,
                self.feature_map.map_queries,
                self.feature_map.map_keys,
                far_logit,
                getattr(self, "far_norm", None),
                self.config.is_causal,
                explicit,
                self.scaling,
                self.attention_dropout if self.training else 0.0,
            )
        if cache is not None:
            cache.store(result.memory)
        output, weights = result.output, None
        if padding is not None:
            output = padding.restore(output, dim=2)
        if explicit:
            total = length if cache is None else int(past_key_values.get_seq_length(self.layer_idx))
            output, weights = _weigh_tokens(result, slots, total, padding)
        if self.training and slots.keys.shape[2] <= self.config.window_size + self.config.num_sink_tokens:
            output = output + self._unreached()
        return self.o_proj(output.to(hidden_states.dtype).transpose(1, 2).flatten(2)), weights

    def _step(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, cache
    ) -> torch.Tensor | None:
        """What goes into the output projection for one token, (batch, 1, heads * head_dim), where a backend computes it in one call, as
        for a cache that is steady; None elsewhere."""
        config = self.config
        if config._attn_implementation == "eager" or (self.training and self.attention_dropout > 0.0):
            return None
        is_delta = config.update_rule == "delta"
        query_norm, key_norm = (self.q_norm, self.k_norm) if config.use_qk_norm else (None, None)
        far_norm = self.far_norm if is_delta else None
        query_weight, key_weight = layer_map_weights(self.feature_map)
        weights = {
            "conv_weight": self.conv_weight if config.conv_kernel_size else None,
            "query_norm": None if query_norm is None else query_norm.weight,
            "key_norm": None if key_norm is None else key_norm.weight,
            "far_query": self.far_query if config.window_size else None,
            "far_bias": self.far_bias if config.window_size else None,
            "far_norm": None if far_norm is None else far_norm.weight,
            "query_weight": query_weight,
            "key_weight": key_weight,
        }
        norms = [norm for norm in (query_norm, key_norm, far_norm) if norm is not None]
        step = find_layer_step(config.update_rule, self.feature_map, norms, hidden_states, *weights.values())
        if step is None:
            return None
        # After the choice of a kernel: it looks at numbers, which tracing and the meta device do not have.
        state = cache.steady_state(hidden_states.shape[0], config.num_key_value_heads, self.head_dim)
        if state is None:
            return None
        # A cache that was begun under autocast may hold half precision.
        if any(tensor is not None and tensor.dtype != hidden_states.dtype for tensor in state.values()):
            return None
        if config.conv_kernel_size and state["conv_tail"].shape[1] != len(self.conv_weight):
            return None
        output, state = step(
            self.q_proj(hidden_states),
            self.k_proj(hidden_states),
            self.v_proj(hidden_states),
            self.write_proj(hidden_states) if is_delta else None,
            self.forget_proj(hidden_states) if config.forget_gate else None,
            state,
            weights,
            rotary,
            norms[0].variance_epsilon if norms else 0.0,
            self.scaling,
        )
        cache.advance(**state)
        return output

    def _unreached(self) -> torch.Tensor:
        """Zero, made from the far field's parameters: a text no longer than window and sinks does not reach them, but
        data parallel training waits for a gradient of each."""
        softmax = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "conv_weight"}
        far = [tensor for name, tensor in self.named_parameters() if name.split(".")[0] not in softmax]
        return sum(tensor.flatten()[:1].sum() for tensor in far if tensor.requires_grad) * 0.0

    def _far_logit(self, query: torch.Tensor) -> torch.Tensor:
        """(batch, heads, seq), float32. Without a window the far field is all there is, and its logit has no meaning."""
        if self.config.window_size == 0:
            return query.new_zeros(query.shape[:3], dtype=torch.float32)
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        return (query @ self.far_query[..., None].to(query.dtype)).squeeze(-1) + self.far_bias[:, None]

    def _project(
        self, hidden_states: torch.Tensor, padding: Padding | None, cache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        taps = self.config.conv_kernel_size
        if not taps:
            return projected
        if padding is not None:
            is_pad = padding.is_pad(hidden_states.shape[1])[..., None]
            projected = tuple(states.masked_fill(is_pad, 0.0) for states in projected)
        channels = [states.shape[-1] for states in projected]
        behind = ahead = 0
        if cache is not None:
            states = cache.update_conv(torch.cat(projected, -1), taps, None if padding is None else padding.num_pad)
            if states.shape[1] == taps:
                # One token: a product and a sum cost a fifth of a convolution.
                states = (states.float() * self.conv_weight[:, 0].mT.float()).sum(1, keepdim=True).to(states.dtype)
                return states.split(channels, -1)
            projected = states.split(channels, -1)
        else:
            behind = taps - 1 if self.config.is_causal else taps // 2
            ahead = taps - 1 - behind
        pairs = zip(projected, self.conv_weight.split(channels), strict=True)
        return tuple(depthwise_conv(states, weight, behind, ahead) for states, weight in pairs)

    def _gates(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """log_forget <= 0 and write_strength in (0, 1), (batch, kv_heads, seq), in float32."""
        gates = {}
        if self.config.forget_gate:
            gates["log_forget"] = F.logsigmoid(self.forget_proj(hidden_states).float()).transpose(1, 2)
        if self.config.update_rule == "delta":
            gates["write_strength"] = self.write_proj(hidden_states).float().sigmoid().transpose(1, 2)
        return gates


def _weigh_tokens(
    result: KermitAttentionOutput, slots: Slots, total: int, padding: Padding | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (batch, heads, seq, total), one column for each token so far in the input's order, and the output
    (batch, heads, seq, head_dim) made from them, so that gradients reach it through the weights."""
    weights, values = result.weights, slots.values.to(result.weights.dtype)
    # A cache may have let go of the first tokens; sinks among them are still there.
    missing = total - weights.shape[-1]
    weights, values = F.pad(weights, (missing, 0)), F.pad(values, (0, 0, missing, 0))
    if result.sink_weights is not None:
        first = slots.first_real + missing
        index = torch.arange(result.sink_weights.shape[-1], device=weights.device)
        index = (index + (first.view(-1, 1) if isinstance(first, torch.Tensor) else first)).clamp(max=total - 1)
        index = index.expand(weights.shape[0], -1)[:, None]
        weights = weights.scatter_add(-1, index[:, :, None].expand_as(result.sink_weights), result.sink_weights)
        gone = (index < missing)[..., None]
        sink_values = torch.where(gone, slots.sink_values.to(values.dtype), 0.0)
        values = values.scatter_add(2, index[..., None].expand_as(sink_values), sink_values)
    unweighted = result.unweighted
    if padding is not None:
        length = weights.shape[2]
        weights = padding.restore(weights, dim=2)
        weights = torch.cat([weights[..., :-length], padding.restore(weights[..., -length:], dim=3)], -1)
        values = torch.cat([values[:, :, :-length], padding.restore(values[:, :, -length:], dim=2)], 2)
        unweighted = None if unweighted is None else padding.restore(unweighted, dim=2)
    output = weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return output if unweighted is None else output + unweighted, weights
