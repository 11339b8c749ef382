"""KERMIT: a Llama-shaped decoder with a window of exact attention and a kernel memory of constant size behind it."""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_layers import KermitKernelAttention, KermitSoftmaxAttention
from .cache_kermit import LAYER_TYPE
from .checkpoints import load_whole
from .configuration_kermit import KermitConfig
from .feature_maps import FeatureMap
from .padding import Padding


# What a cache depends on, besides the shapes of keys and values.
CACHE_SETTINGS = (
    "window_size",
    "num_sink_tokens",
    "update_rule",
    "feature_map",
    "feature_dim",
    "forget_gate",
    "conv_kernel_size",
)

# `generate` prepares masks ahead of a compiled step; a kernel layer needs to know padding only.
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.setdefault(LAYER_TYPE, create_recurrent_attention_mask)


class KermitDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: KermitConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        attention = KermitKernelAttention if self.layer_type == LAYER_TYPE else KermitSoftmaxAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Padding | None = None,
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
class KermitPreTrainedModel(PreTrainedModel):
    config: KermitConfig
    config_class = KermitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KermitDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": KermitDecoderLayer, "attentions": KermitSoftmaxAttention}

    def __init__(self, config: KermitConfig, *inputs, **kwargs):
        # Fields may have been set since it was made, by `from_pretrained` for one.
        config.fit_layer_types()
        config.validate_architecture()
        config.validate_layer_type()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (KermitKernelAttention, FeatureMap)):
            module.init_weights()

    def redraw_features(self) -> None:
        """Draws new random features in every `"favor"` layer; caches made before are void."""
        for module in self.modules():
            if hasattr(module, "redraw"):
                module.redraw()

    def save_pretrained(self, *args, **kwargs):
        """As transformers saves, with every head in the config's `auto_map`: whichever head is saved, all of them load."""
        self.config.auto_map = {auto: f"modeling_kermit.{head.__name__}" for auto, head in AUTO_CLASSES.items()}
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers loads, but raises `ValueError` where a file is damaged or of another architecture."""
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


@auto_docstring
class KermitModel(KermitPreTrainedModel):
    def __init__(self, config: KermitConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([KermitDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
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
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not self.config.is_causal:
            if past_key_values is not None:
                raise ValueError("past_key_values: a model with is_causal=False has no past; allowed is None")
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        length = inputs_embeds.shape[1]
        if length == 0:
            raise ValueError(f"input_ids has shape {tuple(inputs_embeds.shape[:2])}; allowed are one token or more")
        given_positions = position_ids
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        if past_key_values is not None:
            self._bind_cache(past_key_values)
        masks, positions = {}, {}
        # Kernel layers first: they say what is wrong with a mask.
        for layer_type in sorted(set(self._layer_types()), key=LAYER_TYPE.__ne__):
            if layer_type == LAYER_TYPE:
                masks[layer_type] = Padding.from_any_mask(
                    attention_mask,
                    layer_type,
                    given_positions,
                    *inputs_embeds.shape[:2],
                    past_key_values,
                    self.config.is_causal,
                )
                positions[layer_type] = self._kernel_positions(length, past_key_values)
            else:
                masks[layer_type] = self._softmax_mask(
                    layer_type, inputs_embeds, attention_mask, position_ids, past_key_values
                )
        if masks.keys() != {LAYER_TYPE}:
            rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
            positions |= dict.fromkeys(masks.keys() - {LAYER_TYPE}, rotary)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer.layer_type],
                position_embeddings=positions[layer.layer_type],
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _layer_types(self) -> list[str]:
        """Of the layers that run: early exit lowers `num_hidden_layers` for a while."""
        return self.config.layer_types[: self.config.num_hidden_layers]

    def _softmax_mask(self, layer_type, inputs_embeds, attention_mask, position_ids, past_key_values):
        if isinstance(attention_mask, dict):
            return attention_mask[layer_type]
        create = create_causal_mask if layer_type == "full_attention" else create_sliding_window_causal_mask
        return create(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

    def _bind_cache(self, past_key_values: Cache) -> None:
        """`ValueError` unless the cache has the layers and settings of this model."""
        layer_types = self._layer_types()
        is_kernel = [layer_type == LAYER_TYPE for layer_type in layer_types]
        if not any(is_kernel):
            return
        if not past_key_values.layers and type(past_key_values) is DynamicCache:
            past_key_values.layers = DynamicCache(config=self.config).layers  # it was made without a config
        if [hasattr(layer, "bind") for layer in past_key_values.layers] != is_kernel:
            names = [type(layer).__name__ for layer in past_key_values.layers]
            raise ValueError(
                f"past_key_values: its layers are {', '.join(names) or 'none'}, but layer_types are "
                f"{', '.join(layer_types)}; allowed are DynamicCache(config=model.config), "
                "StaticCache(config=model.config, ...), or None"
            )
        settings = {name: getattr(self.config, name) for name in CACHE_SETTINGS}
        for layer, bound in zip(past_key_values.layers, is_kernel, strict=True):
            if bound:
                layer.bind(**settings)

    def _kernel_positions(self, length: int, past_key_values: Cache | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine of slot numbers, (slots, head_dim).

        Kernel layers rotate by distance, which the window bounds, so positions do not grow with the text, and rope types
        that depend on the length take the window for it.
        """
        if self.config.window_size == 0:
            return None
        if past_key_values is not None:
            layer = past_key_values.layers[self.config.layer_types.index(LAYER_TYPE)]
            length = layer.num_slots(length, self.config.window_size)
        rope_type = self.rotary_emb.rope_type
        frequencies = self.rotary_emb.original_inv_freq.float()
        if rope_type in ("dynamic", "longrope"):
            device = frequencies.device
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](self.config, device, seq_len=self.config.window_size)
        angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        scaling = self.rotary_emb.attention_scaling
        return angles.cos() * scaling, angles.sin() * scaling


def _check_labels(name: str, labels: torch.Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(labels.shape) not in allowed:
        shapes = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; allowed is {shapes}")


@auto_docstring
class KermitForCausalLM(KermitPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: KermitConfig):
        if not config.is_causal:
            raise ValueError("is_causal=False cannot predict the next token or generate; allowed is is_causal=True")
        super().__init__(config)
        self.model = KermitModel(config)
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
    KERMIT with a classification head on one vector per text: the last real token's where the model is causal, the mean
    over real tokens where it is not.
    """
)
class KermitForSequenceClassification(KermitPreTrainedModel):
    # Its losses are means over texts, whatever number of labels the Trainer would have them divided by.
    accepts_loss_kwargs = False

    def __init__(self, config: KermitConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KermitModel(config)
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
        if inputs is None:
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
            return (
                hidden_states[:, -1] if self.config.is_causal else hidden_states.float().mean(1).to(hidden_states.dtype)
            )
        if isinstance(attention_mask, dict) or attention_mask.dim() != 2:
            raise ValueError("attention_mask: pooling needs the padding of each row; allowed is shape (batch, seq)")
        real = (attention_mask[:, -hidden_states.shape[1] :] != 0).float()
        if self.config.is_causal:
            index = torch.arange(real.shape[1], device=real.device)
            last = (index * real.to(index.dtype)).argmax(-1)
            return hidden_states[torch.arange(len(last), device=last.device), last]
        # A long text's sum does not fit half precision.
        total = (hidden_states.float() * real[..., None]).sum(1)
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


@auto_docstring
class KermitForTokenClassification(KermitPreTrainedModel):
    def __init__(self, config: KermitConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KermitModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _check_labels("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class KermitForQuestionAnswering(KermitPreTrainedModel):
    def __init__(self, config: KermitConfig):
        super().__init__(config)
        self.model = KermitModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
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
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            batch = start_logits.shape[0]
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                _check_labels(name, positions, (batch,), (batch, 1))
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {
    "AutoModel": KermitModel,
    "AutoModelForCausalLM": KermitForCausalLM,
    "AutoModelForSequenceClassification": KermitForSequenceClassification,
    "AutoModelForTokenClassification": KermitForTokenClassification,
    "AutoModelForQuestionAnswering": KermitForQuestionAnswering,
}
for _auto_class, _head in AUTO_CLASSES.items():
    _head.register_for_auto_class(_auto_class)

__all__ = [
    "KermitForCausalLM",
    "KermitForQuestionAnswering",
    "KermitForSequenceClassification",
    "KermitForTokenClassification",
    "KermitModel",
    "KermitPreTrainedModel",
]

# Only for classes named here does the Trainer shift labels that it smooths.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[KermitConfig.model_type] = KermitForCausalLM.__name__
