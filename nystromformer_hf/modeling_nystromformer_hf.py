"""Nyströmformer: a BERT-shaped encoder with landmark attention, right at any length, padding and batch mix.

Modules and parameters carry the names of transformers' own Nyströmformer, whose checkpoints therefore load as they are.
"""

import os
from typing import Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .backends import find_fused_attention
from .checkpoints import HUB_ARGUMENTS, load_whole
from .configuration_nystromformer_hf import NystromformerHFConfig
from .nystrom_attention import Padding, nystrom_attention, nystrom_attention_eager, read_padding, value_convolution


# The first two rows of the position table belong to no position, a habit inherited from RoBERTa.
POSITION_OFFSET = 2

# Weights that an encoder trained without convolution lacks, which fine-tuning may start from.
OWN_WEIGHTS = ("attention.self.conv.weight",)

# The same function, in one kernel instead of eight.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


def check_shape(name: str, tensor: torch.Tensor | None, *allowed: tuple[int, ...]) -> None:
    """`ValueError` unless the tensor is None or has one of the allowed shapes."""
    if tensor is not None and tuple(tensor.shape) not in allowed:
        shapes = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is {shapes}")


def check_axes(name: str, tensor: torch.Tensor | None, axes: tuple[str, ...]) -> None:
    """`ValueError` unless the tensor is None or has as many axes."""
    if tensor is not None and tensor.dim() != len(axes):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; allowed is ({', '.join(axes)}), for a single text {name}[None]"
        )


def activation(name: str) -> nn.Module:
    return ACT2FN[FUSED_ACTIVATIONS.get(name, name)]


class NystromformerHFEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings."""

    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.max_position_embeddings = config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        token_type_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """(batch, seq, hidden) from embedded words; `position_ids` (batch or 1, seq) start at 2, and repeat the table
        beyond its end."""
        tiled = POSITION_OFFSET + (position_ids - POSITION_OFFSET) % self.max_position_embeddings
        position_ids = torch.where(position_ids < POSITION_OFFSET, position_ids, tiled)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class NystromformerHFValueConvolution(nn.Module):
    """The kernels of `value_convolution`, one per head."""

    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, 1, config.conv_kernel_size, 1))

    def forward(self, value: torch.Tensor, lengths: torch.Tensor | None, residual: torch.Tensor | None = None):
        return value_convolution(value, self.weight, lengths, residual)


class NystromformerHFSelfAttention(nn.Module):
    """Nyström attention and the convolution of the values; the mathematics is in `nystrom_attention`."""

    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.conv = NystromformerHFValueConvolution(config) if config.conv_kernel_size is not None else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding: Padding | None = None,
        output_attentions: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if padding is not None:
            hidden_states = padding.pack(hidden_states)
        lengths = padding.lengths if padding is not None else None
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.query(hidden_states).view(hidden_shape).transpose(1, 2)
        key = self.key(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.value(hidden_states).view(hidden_shape).transpose(1, 2)

        # Attention weights exist in the eager form only: whoever asks for them gets that form.
        eager = output_attentions or self.config._attn_implementation == "eager"
        context, weights = self._attend(query, key, value, lengths, eager)
        context = context.transpose(1, 2).flatten(2)
        if padding is not None:
            context = padding.unpack(context)
            weights = padding.unpack_attention(weights) if weights is not None else None
        return context, weights

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the heads read, (batch, heads, seq, head_dim), the convolution included, and, in the eager form, their weights."""
        arguments = query, key, value, self.config.num_landmarks, lengths
        options = {
            "dropout": self.config.attention_probs_dropout_prob if self.training else 0.0,
            "refinement_steps": self.config.landmark_refinement_steps,
            "inverse_iterations": self.config.inverse_iterations,
            "inverse_init": self.config.inverse_init,
            "inverse_regularization": self.config.inverse_regularization,
        }
        kernels = None if self.conv is None else self.conv.weight[:, 0, :, 0]
        fused = None if eager else find_fused_attention(*arguments, kernels, **options)
        if fused is not None:
            return fused(*arguments, kernels), None
        context, weights = (nystrom_attention_eager if eager else nystrom_attention)(*arguments, **options)
        return context if self.conv is None else self.conv(value, lengths, context), weights


class NystromformerHFOutput(nn.Module):
    """What attention or the feed-forward network hands back: projected, added to its input, normalised."""

    def __init__(self, config: NystromformerHFConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class NystromformerHFAttention(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.self = NystromformerHFSelfAttention(config)
        self.output = NystromformerHFOutput(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        context, _ = self.self(hidden_states, **kwargs)
        return self.output(context, hidden_states)


class NystromformerHFIntermediate(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class NystromformerHFLayer(GradientCheckpointingLayer):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = NystromformerHFAttention(config)
        self.intermediate = NystromformerHFIntermediate(config)
        self.output = NystromformerHFOutput(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, **kwargs)
        return apply_chunking_to_forward(self.feed_forward_chunk, self.chunk_size_feed_forward, 1, hidden_states)

    def feed_forward_chunk(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(hidden_states), hidden_states)


class NystromformerHFEncoder(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.layer = nn.ModuleList([NystromformerHFLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, padding: Padding | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, padding=padding, **kwargs)
        return hidden_states


@auto_docstring
class NystromformerHFPreTrainedModel(PreTrainedModel):
    config: NystromformerHFConfig
    base_model_prefix = "nystromformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NystromformerHFEmbeddings", "NystromformerHFLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": NystromformerHFLayer,
        "attentions": NystromformerHFSelfAttention,
    }

    def __init__(self, config: NystromformerHFConfig, *inputs, **kwargs):
        config.validate()  # fields may have been set since it was made, by `from_pretrained` for one
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NystromformerHFValueConvolution):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, NystromformerHFLMPredictionHead):
            init.zeros_(module.bias)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its own attention interface in the source; both of our forms can be switched as well.
        return True

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

    @classmethod
    def from_nystromformer(cls, source: PreTrainedModel | PreTrainedConfig | str | os.PathLike, **kwargs) -> Self:
        """Take over a model of transformers' own Nyströmformer; its parameters have the same names.

        Args:
            source: the model, its configuration (weights are then drawn anew), or the checkpoint folder or Hub id that
                holds both. A head that `source` lacks is drawn anew, as `from_pretrained` does.
            kwargs: fields of the configuration to change; with a folder or Hub id also arguments of `from_pretrained`.

        Raises:
            ValueError: where `source` is another model.
        """
        if isinstance(source, PreTrainedConfig):
            return cls(cls.config_class.from_nystromformer(source, **kwargs))
        if isinstance(source, PreTrainedModel):
            config = cls.config_class.from_nystromformer(source.config, **kwargs)
            return cls.from_pretrained(None, config=config, state_dict=source.state_dict(), dtype=source.dtype)
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config, kwargs = cls.config_class.from_nystromformer(source, return_unused_kwargs=True, **kwargs)
        return cls.from_pretrained(source, config=config, **{**kwargs, **where})


@auto_docstring
class NystromformerHFModel(NystromformerHFPreTrainedModel):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.embeddings = NystromformerHFEmbeddings(config)
        self.encoder = NystromformerHFEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | BaseModelOutput:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Rows of the position table, which starts at 2. By default the real tokens of each row are numbered from
            there, wherever its padding is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "input_ids and inputs_embeds are both given or both missing; allowed is exactly one of them"
            )
        check_axes("input_ids", input_ids, ("batch", "seq"))
        check_axes("inputs_embeds", inputs_embeds, ("batch", "seq", "hidden_size"))
        batch, seq_len = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if seq_len == 0:
            raise ValueError(f"input_ids has shape {(batch, seq_len)}; allowed are one token or more")
        if input_ids is not None:
            if not input_ids.is_meta:
                self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            check_shape(name, ids, (batch, seq_len), (1, seq_len))

        padding = None
        if attention_mask is not None:
            if attention_mask.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; allowed is (batch, sequence) = "
                    f"{tuple(inputs_embeds.shape[:2])}, nonzero at real tokens"
                )
            inspect = not (attention_mask.is_meta or is_tracing(attention_mask))
            padding = read_padding(attention_mask.to(inputs_embeds.device), inspect)
        if position_ids is None:
            if padding is not None and padding.rank is not None:
                position_ids = padding.rank + POSITION_OFFSET
            else:
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + POSITION_OFFSET

        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        hidden_states = self.encoder(hidden_states, padding=padding, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class NystromformerHFPredictionHeadTransform(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class NystromformerHFLMPredictionHead(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.transform = NystromformerHFPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # tied to the decoder's

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class NystromformerHFOnlyMLMHead(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.predictions = NystromformerHFLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


@auto_docstring
class NystromformerHFForMaskedLM(NystromformerHFPreTrainedModel):
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "nystromformer.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.nystromformer = NystromformerHFModel(config)
        self.cls = NystromformerHFOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Tokens to predict; -100 where there is nothing to predict.
        """
        outputs = self.nystromformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class NystromformerHFClassificationHead(nn.Module):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = activation(config.classifier_activation or config.hidden_act)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.activation(self.dense(self.dropout(features)))
        return self.out_proj(self.dropout(features))


def first_tokens(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """States (batch, hidden) of each row's first real token, the <s> or [CLS] of a text."""
    if attention_mask is None:
        return hidden_states[:, 0]
    first = (attention_mask != 0).to(torch.uint8).argmax(dim=-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), first]


@auto_docstring
class NystromformerHFForSequenceClassification(NystromformerHFPreTrainedModel):
    # Its losses are means over texts, whatever number of labels the Trainer would have them divided by.
    accepts_loss_kwargs = False

    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.nystromformer = NystromformerHFModel(config)
        self.classifier = NystromformerHFClassificationHead(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes, numbers to regress on where `num_labels` is 1, or several classes at once as 0 and 1.
        """
        outputs = self.nystromformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(first_tokens(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            batch = logits.shape[0]
            check_shape("labels", labels, (batch,), (batch, 1), (batch, self.num_labels))
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class NystromformerHFForMultipleChoice(NystromformerHFPreTrainedModel):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.nystromformer = NystromformerHFModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.classifier_activation or "relu")
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MultipleChoiceModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Tokens of each choice; all other inputs have `num_choices` as their second dimension as well.
        token_type_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Which part of its input each token belongs to.
        position_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            As in the base model.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length, hidden_size)`, *optional*):
            Embedded words, in the place of `input_ids`.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the right choice.
        """
        check_axes("input_ids", input_ids, ("batch", "num_choices", "seq"))
        check_axes("inputs_embeds", inputs_embeds, ("batch", "num_choices", "seq", "hidden_size"))
        inputs = input_ids if input_ids is not None else inputs_embeds
        num_choices = 1 if inputs is None else inputs.shape[1]  # without inputs the model raises
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            x.flatten(0, 1) if x is not None else None
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.nystromformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        pooled = self.pre_classifier(first_tokens(outputs.last_hidden_state, attention_mask))
        logits = self.classifier(self.activation(pooled)).view(-1, num_choices)
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:1]))
            loss = fixed_cross_entropy(logits.float(), labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class NystromformerHFForTokenClassification(NystromformerHFPreTrainedModel):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.nystromformer = NystromformerHFModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | TokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Classes of the tokens; -100 where there is none.
        """
        outputs = self.nystromformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class NystromformerHFForQuestionAnswering(NystromformerHFPreTrainedModel):
    def __init__(self, config: NystromformerHFConfig):
        super().__init__(config)
        self.nystromformer = NystromformerHFModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | QuestionAnsweringModelOutput:
        outputs = self.nystromformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        start_logits, end_logits = start_logits.contiguous(), end_logits.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            batch = start_logits.shape[0]
            check_shape("start_positions", start_positions, (batch,), (batch, 1))
            check_shape("end_positions", end_positions, (batch,), (batch, 1))
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {
    "AutoModel": NystromformerHFModel,
    "AutoModelForMaskedLM": NystromformerHFForMaskedLM,
    "AutoModelForSequenceClassification": NystromformerHFForSequenceClassification,
    "AutoModelForTokenClassification": NystromformerHFForTokenClassification,
    "AutoModelForQuestionAnswering": NystromformerHFForQuestionAnswering,
    "AutoModelForMultipleChoice": NystromformerHFForMultipleChoice,
}
for auto_class, head in AUTO_CLASSES.items():
    head.register_for_auto_class(auto_class)


__all__ = [
    "NystromformerHFForMaskedLM",
    "NystromformerHFForMultipleChoice",
    "NystromformerHFForQuestionAnswering",
    "NystromformerHFForSequenceClassification",
    "NystromformerHFForTokenClassification",
    "NystromformerHFModel",
    "NystromformerHFPreTrainedModel",
]
