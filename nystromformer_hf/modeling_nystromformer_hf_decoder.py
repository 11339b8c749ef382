"""Nyströmformer as a decoder: a Llama-shaped body with causal Nyström attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_nystromformer_hf_decoder import LAYER_TYPE
from .causal_nystrom_attention import (
    CausalNystromOutput,
    causal_convolution,
    causal_nystrom_blocked,
    causal_nystrom_reference,
    causal_nystrom_step,
    context_of_whole_text,
    has_values,
    take_slots,
)
from .checkpoints import load_whole
from .configuration_nystromformer_hf_decoder import NystromformerHFDecoderConfig


# What a cache depends on, besides the shapes of keys and values.
CACHE_SETTINGS = ("segment_size", "near_segments", "num_sink_tokens", "conv_kernel_size")

# Weights that a Llama-family checkpoint lacks; both have a start that needs no training.
OWN_WEIGHTS = ("self_attn.inverse_regularization", "self_attn.conv_weight")

# `generate` prepares masks ahead of a compiled step; these layers need to know padding only.
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.setdefault(LAYER_TYPE, create_recurrent_attention_mask)


class Padding(NamedTuple):
    """Where the new tokens of a batch are padding. Attention sees each row with its padding last, where no real token looks.

    real: (batch, seq), in the order of the input. order: (batch, seq), the token in each place, None if padding comes last
    already. inverse: the way back.
    """

    real: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> "Padding":
        """`mask`: (batch, seq), nonzero at real tokens."""
        pad = mask == 0
        real = ~pad
        if has_values(pad) and bool((pad[:, 1:] >= pad[:, :-1]).all()):
            return cls(real, None, None)
        order = pad.to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(real, order, order.argsort(dim=-1))

    def align(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, dim) with padding last."""
        return states if self.order is None else take_slots(states, self.order, dim=1)

    def restore(self, states: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The way back, along axis `dim`."""
        return states if self.inverse is None else take_slots(states, self.inverse, dim=dim)


class NystromformerHFDecoderAttention(nn.Module):
    """Exact attention to sinks and near segments, one landmark for each older segment, and a convolution of the values.

    With the eager implementation the second output holds the weights (batch, heads, seq, tokens so far): rows sum to one and,
    times the values, plus the convolution, are the attention's output. Tokens that a cache has let go of have no weight
    of their own any more.
    """

    def __init__(self, config: NystromformerHFDecoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias)
        if config.use_qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.inverse_regularization is not None:
            self.inverse_regularization = nn.Parameter(torch.empty(heads))
        if config.conv_kernel_size is not None:
            self.conv_weight = nn.Parameter(torch.empty(heads, 1, config.conv_kernel_size, 1))

    def init_weights(self) -> None:
        if self.config.inverse_regularization is not None:
            excess = torch.tensor(float(self.config.inverse_regularization) - 1, dtype=torch.float64)
            # The inverse of softplus, in the form that does not overflow.
            init.constant_(self.inverse_regularization, float(excess + torch.log(-torch.expm1(-excess))))
        if self.config.conv_kernel_size is not None:
            init.zeros_(self.conv_weight)

    def regularization(self) -> torch.Tensor | None:
        """γ > 1, (heads,), in float32."""
        if self.config.inverse_regularization is None:
            return None
        return 1 + F.softplus(self.inverse_regularization.float())

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Padding | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        padding, length = attention_mask, hidden_states.shape[1]
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if padding is not None:
            hidden_states = padding.align(hidden_states)
        query, key, value = self._project(hidden_states)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        regularization, total = self.regularization(), None
        if cache is None:
            context = context_of_whole_text(query, key, value, self.config.num_sink_tokens, regularization is not None)
        else:
            past_key_values.update(key, value, self.layer_idx, query, None if padding is None else padding.real)
            context = cache.context
        explicit = self.config._attn_implementation == "eager"
        settings = {
            "segment_size": self.config.segment_size,
            "near_segments": self.config.near_segments,
            "regularization": regularization,
            "scaling": self.scaling,
            "dropout": self.attention_dropout if self.training else 0.0,
        }
        if explicit:
            total = length if cache is None else int(past_key_values.get_seq_length(self.layer_idx))
            result = causal_nystrom_reference(query, context, num_tokens=total, **settings)
        else:
            form = causal_nystrom_step if length == 1 else causal_nystrom_blocked
            result = form(query, context, **settings)
        if cache is not None:
            cache.store(result.landmarks)

        output, weights = result.output, None
        if explicit:
            past_tokens = context.start + self.config.num_sink_tokens
            output, weights = _weigh_tokens(result, past_tokens, total - length, padding)
        elif padding is not None:
            output = padding.restore(output, dim=2)
        if self.training and regularization is not None and context.open_queries.shape[2] < self.config.segment_size:
            # No landmark was formed, but data parallel training waits for a gradient of γ.
            output = output + 0.0 * regularization.sum()
        if self.config.conv_kernel_size is not None:
            mixed = causal_convolution(context.values, self.conv_weight, context.start - context.first, length)
            output = output + (mixed if padding is None else padding.restore(mixed, dim=2))
        return self.o_proj(output.to(hidden_states.dtype).transpose(1, 2).flatten(2)), weights

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, heads, seq, head_dim) each, queries and keys normed, without positions."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class NystromformerHFDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NystromformerHFDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = NystromformerHFDecoderAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Padding | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@auto_docstring
class NystromformerHFDecoderPreTrainedModel(PreTrainedModel):
    config: NystromformerHFDecoderConfig
    config_class = NystromformerHFDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NystromformerHFDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": NystromformerHFDecoderLayer,
        "attentions": NystromformerHFDecoderAttention,
    }

    def __init__(self, config: NystromformerHFDecoderConfig, *inputs, **kwargs):
        config.validate_architecture()  # fields may have been set since it was made, by `from_pretrained` for one
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its own attention interface in the source; both of our forms can be switched as well.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "init_weights") and not hasattr(module, "post_init"):
            module.init_weights()

    def save_pretrained(self, *args, **kwargs):
        """As transformers saves, with every head in the config's `auto_map`: whichever is saved, all of them load."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto: f"{module}.{head.__name__}" for auto, head in AUTO_CLASSES.items()}
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers loads, but raises `ValueError` where a file is damaged or of another architecture."""
        return load_whole(
            super().from_pretrained, pretrained_model_name_or_path, *args, own_weights=OWN_WEIGHTS, **kwargs
        )


@auto_docstring
class NystromformerHFDecoderModel(NystromformerHFDecoderPreTrainedModel):
    def __init__(self, config: NystromformerHFDecoderConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [NystromformerHFDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        _check_inputs(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self._bind_cache(past_key_values, inputs_embeds.shape[1])
        padding = self._padding(inputs_embeds, attention_mask, position_ids, past_key_values)

        # Attention counts the real tokens of each row itself: positions do not depend on padding or `position_ids`.
        past = 0 if past_key_values is None else past_key_values.layers[0].num_tokens
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        positions = positions + (past[:, None] if isinstance(past, torch.Tensor) else past)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=positions)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=padding,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _bind_cache(self, past_key_values: Cache, length: int) -> None:
        """`ValueError` unless the cache has the layers and settings of this model, and room for `length` tokens.

        A `DynamicCache()` without layers, made for no model in particular, gets those of this one.
        """
        if type(past_key_values) is DynamicCache and not past_key_values.layers:
            past_key_values.layers = DynamicCache(config=self.config).layers
        layers = past_key_values.layers
        wrong = [type(layer).__name__ for layer in layers if not hasattr(layer, "num_complete")]
        if wrong or len(layers) != self.config.num_hidden_layers:
            names = [type(layer).__name__ for layer in layers]
            raise ValueError(
                f"past_key_values: its layers are {', '.join(names) or 'none'}, but this model has "
                f"{self.config.num_hidden_layers} of type {LAYER_TYPE}; allowed are DynamicCache(config=model.config), "
                "StaticCache(config=model.config, ...), or None"
            )
        settings = {name: getattr(self.config, name) for name in CACHE_SETTINGS}
        for layer in layers:
            layer.bind(**settings, regularized=self.config.inverse_regularization is not None)
        capacity = layers[0].get_max_length()
        total = _length_of(past_key_values) + length
        if 0 <= capacity < total:
            raise ValueError(
                f"past_key_values: holds max_cache_len={capacity} tokens, but with these {length} it would be {total}; allowed "
                f"are StaticCache(config=model.config, max_cache_len=...) of {total} or more, or DynamicCache(config=model.config)"
            )

    def _padding(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> Padding | None:
        """What attention needs to know of any mask that transformers passes: None, 2D, 4D or a dict of those."""
        batch, length = inputs_embeds.shape[:2]
        mask = attention_mask.get(LAYER_TYPE) if isinstance(attention_mask, dict) else attention_mask
        readable = has_values(inputs_embeds)
        if mask is not None and mask.dim() == 4:
            mask = _padding_of_4d_mask(mask, length)
        past_length = _length_of(past_key_values)
        if mask is not None and (
            mask.dim() != 2
            or mask.shape[0] != batch
            or mask.shape[1] < length
            # A static cache comes with masks as long as itself.
            or (
                not isinstance(attention_mask, dict)
                and readable
                and mask.shape[1] not in (length, past_length + length)
            )
        ):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; allowed are (batch, past + seq) = "
                f"{(batch, past_length + length)}, the new tokens alone, or a 4D mask of padding and causality alone"
            )
        if mask is not None:
            mask = mask[:, -length:]
        if readable and length > 1 and position_ids is not None:
            _check_positions(position_ids, mask)
        if mask is not None and readable:
            harmless = (mask != 0) if past_key_values is not None else ((mask[:, :-1] != 0) >= (mask[:, 1:] != 0))
            if bool(harmless.all()):
                # Nothing padded, or only behind the text, where no real token looks.
                mask = None
        return None if mask is None else Padding.from_mask(mask)


def _length_of(past_key_values: Cache | None) -> int:
    """Tokens so far; 0 where nobody can tell yet."""
    if past_key_values is None or torch.compiler.is_compiling():
        return 0
    length = past_key_values.get_seq_length()
    return int(length) if isinstance(length, int) or has_values(length) else 0


def _check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """`ValueError` unless there is a text in each row."""
    for name, inputs, axes in (
        ("input_ids", input_ids, "(batch, seq)"),
        ("inputs_embeds", inputs_embeds, "(batch, seq, hidden_size)"),
    ):
        if inputs is None:
            continue
        if inputs.dim() != axes.count(",") + 1:
            raise ValueError(
                f"{name} has shape {tuple(inputs.shape)}; allowed is {axes}, for a single text {name}[None]"
            )
        if inputs.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(inputs.shape)}; allowed are one token or more")


def _check_labels(name: str, labels: torch.Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(labels.shape) not in allowed:
        shapes = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; allowed is {shapes}")


@auto_docstring
class NystromformerHFDecoderForCausalLM(NystromformerHFDecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: NystromformerHFDecoderConfig):
        super().__init__(config)
        self.model = NystromformerHFDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            _check_labels("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    The decoder with a classification head on the last real token of each text.
    """
)
class NystromformerHFDecoderForSequenceClassification(NystromformerHFDecoderPreTrainedModel):
    # Its losses are means over texts, whatever number of labels the Trainer would have them divided by.
    accepts_loss_kwargs = False

    def __init__(self, config: NystromformerHFDecoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NystromformerHFDecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        if attention_mask is None:
            attention_mask = self._mask_of_padding(input_ids, inputs_embeds)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            batch = logits.shape[0]
            _check_labels("labels", labels, (batch,), (batch, 1), (batch, self.num_labels))
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _mask_of_padding(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The runs of pad tokens at both ends, (batch, seq); a pad token inside the text may be its end-of-text token."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or inputs.dim() < 2:
            return None  # the model raises
        if inputs_embeds is not None or self.config.pad_token_id is None:
            if inputs.shape[0] == 1:
                return None
            raise ValueError(
                f"attention_mask=None does not tell the padding of a batch of {inputs.shape[0]} with "
                f"pad_token_id={self.config.pad_token_id}; allowed are an attention_mask, input_ids with config.pad_token_id "
                "set, or a batch of one"
            )
        real = (input_ids != self.config.pad_token_id).int()
        return ((real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)).long()

    def _pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, seq, hidden_size) -> (batch, hidden_size)"""
        if attention_mask is None:
            return hidden_states[:, -1]
        if isinstance(attention_mask, dict) or attention_mask.dim() != 2:
            raise ValueError("attention_mask: pooling needs the padding of each row; allowed is shape (batch, seq)")
        real = attention_mask[:, -hidden_states.shape[1] :] != 0
        last = (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)
        return hidden_states[torch.arange(len(last), device=last.device), last]


def _weigh_tokens(
    result: CausalNystromOutput, past_tokens: int | torch.Tensor, past_length: int, padding: Padding | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (batch, heads, seq, total), one column for each token so far in the input's order, and the output
    (batch, heads, seq, head_dim) made from them, so that gradients reach it through the weights."""
    weights, values, unweighted = result.weights, result.values, result.unweighted
    if padding is not None:
        weights, unweighted = padding.restore(weights, dim=2), padding.restore(unweighted, dim=2)
    if padding is not None or isinstance(past_tokens, torch.Tensor):
        batch, total, device = weights.shape[0], weights.shape[-1], weights.device
        past_tokens = torch.as_tensor(past_tokens, device=device).expand(batch)[:, None]
        new = torch.arange(total - past_length, device=device).expand(batch, -1)
        if padding is not None and padding.inverse is not None:
            new = padding.inverse
        # Which tokens of earlier calls were padding is not known any more; they stand in front.
        old = torch.arange(past_length, device=device) - past_length + past_tokens
        token = torch.cat([old, past_tokens + new], 1)
        hidden = (token < 0)[:, None]
        token = token.clamp(0, total - 1)
        weights = take_slots(weights, token, dim=3).masked_fill(hidden[:, None], 0.0)
        values = take_slots(values, token, dim=2).masked_fill(hidden[..., None], 0.0)
    groups = weights.shape[1] // values.shape[1]
    return weights @ values.repeat_interleave(groups, 1) + unweighted, weights


def _padding_of_4d_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The (batch, keys) padding in a (batch, 1, seq, keys) mask; `ValueError` if it hides anything else."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = visible[:, :, -1:].any(1, keepdim=True)
    allowed = torch.ones(visible.shape[-2:], dtype=torch.bool, device=mask.device).tril(visible.shape[-1] - length)
    allowed = allowed & real
    # Rows of padding queries say nothing, whatever they hold.
    matters = real[..., -length:].transpose(-1, -2)
    if has_values(visible) and bool(((visible != allowed) & matters).any()):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} hides more than padding and the future, which attention cannot "
            "follow; allowed are masks of shape (batch, past + seq)"
        )
    return real[:, 0, 0].long()


def _check_positions(position_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    steps = position_ids[..., 1:] - position_ids[..., :-1]
    wrong = steps != 1
    if mask is not None:
        wrong = wrong & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(wrong.any()):
        raise ValueError(
            "position_ids do not count up by one, but attention goes by the order of tokens; allowed are consecutive "
            "positions, one text per row (no packed rows)"
        )


AUTO_CLASSES = {
    "AutoModel": NystromformerHFDecoderModel,
    "AutoModelForCausalLM": NystromformerHFDecoderForCausalLM,
    "AutoModelForSequenceClassification": NystromformerHFDecoderForSequenceClassification,
}
for _auto_class, _head in AUTO_CLASSES.items():
    _head.register_for_auto_class(_auto_class)

__all__ = [
    "NystromformerHFDecoderForCausalLM",
    "NystromformerHFDecoderForSequenceClassification",
    "NystromformerHFDecoderModel",
    "NystromformerHFDecoderPreTrainedModel",
]

# Only for classes named here does the Trainer shift labels that it smooths.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NystromformerHFDecoderConfig.model_type] = NystromformerHFDecoderForCausalLM.__name__
